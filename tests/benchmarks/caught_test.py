"""Which notes a run rejects: kinds as in the pictures, labels as the scores of the kinds say."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.study import caught, recipe, study_page
from benchmarks.study.arms import Part
from bis_jax.settings import locations
from bis_jax.toy import drawing, pictures, questions
from bis_jax.toy.records import Knobs


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  c = recipe.get_config()
  c.corpus.cache = str(tmp_path_factory.mktemp("cache"))
  c.corpus.toy.rollouts, c.corpus.toy.images, c.corpus.toy.benchmark_items = 60, 20, 180
  drawing.draw(locations.locate(c).toy, workers=1, **c.corpus.toy.to_dict())
  return c


@pytest.fixture(scope="module")
def noted(config):
  return caught.notes(locations.locate(config).benchmark, Knobs(**config.corpus.toy.to_dict()))


def _items(config):
  with open(locations.locate(config).benchmark / "test.jsonl") as file:
    return [json.loads(line) for line in file]


def test_notes_are_of_the_kinds_in_the_picture(config, noted):
  """At least one tile of the item's pictures is the kind's tile, to the pixel."""
  items, folder = _items(config), locations.locate(config).benchmark
  for note in noted[::7]:
    tiles = [pictures._tile(1, ink, note.kind).tobytes() for ink in ("white", *pictures.INKS)]
    seen = [np.asarray(Image.open(folder / name)) for name in items[note.item]["image"]]
    n = pictures.TILE
    drawn = {
      picture[row : row + n, column : column + n].tobytes()
      for picture in seen
      for row in range(0, picture.shape[0], n)
      for column in range(0, picture.shape[1], n)
    }
    assert drawn & set(tiles)


def test_labels_are_what_the_kinds_score(config, noted):
  items = _items(config)
  for note in noted:
    text = items[note.item]["response"]["steps"][note.step]
    score = questions.SCORES[questions._score(note.kind) - 1]
    assert (f"scores {score}," in text) == note.right
  assert len({note.kind for note in noted}) > 30
  wrong = [note for note in noted if not note.right]
  with_errors = [item for item in items if -1 in item["response"]["process_correctness"]]
  assert 10 < len(wrong) == len(with_errors)  # of every item the first error


def _run(folder, config, items, noted, reject):
  """A workdir whose scores reject the notes that `reject` says; returns it."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(config.to_json())
  threshold = {"thresholds": {"tuned_on_test": {"threshold": 0.3}}}
  (folder / "evaluation.json").write_text(json.dumps(threshold))
  scores = [[0.3] * len(item["response"]["steps"]) for item in items]
  for note in noted:
    if reject(note):
      scores[note.item][note.step] = 0.29
  lines = [json.dumps({"index": i, "scores": row}) for i, row in enumerate(scores)]
  (folder / "scores.jsonl").write_text("\n".join(reversed(lines)))
  return folder


def test_what_is_rejected_is_counted_by_kind(tmp_path, config, noted, capsys):
  new = max(note.kind for note in noted if not note.right)
  assert new not in recipe.KNOWN
  n_new = len({note.kind for note in noted if note.kind not in recipe.KNOWN and note.right})
  rules = {
    "bis_0.1_seed0": lambda note: not note.right and note.kind in recipe.KNOWN,
    "bis_0.1_seed1": lambda note: note.kind == new,
  }
  runs = [
    _run(tmp_path / "grid" / name, config, _items(config), noted, rule)
    for name, rule in rules.items()
  ]
  first, second = map(caught.of_run, runs)
  assert first == (1, 0, 0, 0, 0)
  assert second[:3:2] == (0, 0) and second.right_new == pytest.approx(1 / n_new)
  assert second.wrong_new > 0 and second.not_learned == 1
  caught.main(*map(str, runs))
  assert "grid/bis_0.1_seed0" in (shown := capsys.readouterr().out) and "100.0 %" in shown
  caught.write(tmp_path, [Part("grid", ("bis", "random"), (0.1,))])
  [arm] = json.loads((tmp_path / "caught.json").read_text())
  assert arm["wrong_known"] == pytest.approx(0.5) and arm["not_learned"] == 0.5
  [row] = study_page._caught_table([arm]).rows
  assert row[0] == "bis 10 %" and row[1] == "50.0 %" and row[-1] == "0.5"
