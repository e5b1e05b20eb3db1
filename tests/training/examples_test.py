"""True labels: those of the pictures, step by step, also after rejections and truncation."""

import json
import pathlib
import re

import numpy as np
import pytest

from bis_jax.corpus.corpus import Corpus
from bis_jax.corpus.preparation import prepare
from bis_jax.corpus.records import Rollout
from bis_jax.inputs import pack, pipeline
from bis_jax.models.processor import make_processor
from bis_jax.settings import locations
from bis_jax.toy import drawing
from bis_jax.toy.questions import SCORES
from bis_jax.training.examples import RolloutExamples

REJECTED = {"bars_sum.jsonl": (0, 7), "rows_sum.jsonl": (11,)}  # lines that are made unreadable
NOTE = re.compile(r"[Tt]he (.+) scores (\w+), (?:total )?(\d+)")


@pytest.fixture(scope="module")
def config(small_config, tmp_path_factory):
  """Half of the solutions have a wrong step."""
  c = small_config.copy_and_resolve_references()
  with c.unlocked():
    c.corpus.cache = str(tmp_path_factory.mktemp("cache"))
    c.corpus.toy.rollouts, c.corpus.toy.slip = 360, 6.0
    c.labels.kind = "truth"
  return c


@pytest.fixture(scope="module")
def where(config) -> locations.Locations:
  """A drawn corpus, some of whose records are unreadable, prepared."""
  where = locations.locate(config)
  drawing.draw(where.toy, workers=1, **config.corpus.toy)
  for name, bad in REJECTED.items():
    path = where.annotations / name
    lines = path.read_text().splitlines()
    for line in bad:
      lines[line] = "{"
    path.write_text("\n".join(lines) + "\n")
  prepare(where.annotations, where.images, where.prepared, max_rejected_fraction=0.1, workers=1)
  return where


def shown_scores(captions: pathlib.Path) -> dict[str, dict[str, int]]:
  """Returns {picture: {panel: score}}, from the captions; of a pair each has the panels of both."""
  shown: dict[str, dict[str, int]] = {}
  for caption in map(json.loads, captions.read_text().splitlines()):
    facts = [re.fullmatch(r"The (.+) scores (\w+)\.", s).groups() for s in caption["sentences"]]
    for picture in caption["image"]:
      shown[picture] = {panel: SCORES.index(word) + 1 for panel, word in facts}
  return shown


def truth_of(rollout: Rollout, shown: dict[str, dict[str, int]]) -> list[int]:
  """Returns for every step whether its note and its total are those of the picture."""
  panels = shown[rollout.images[0]]
  taken_from = re.search(r"Start with (\d+)", rollout.question)
  start, sign = (int(taken_from[1]), -1) if taken_from else (0, 1)
  seen: set[str] = set()
  truth = []
  for step in rollout.steps:
    if found := NOTE.search(step):
      panel, word, total = found.groups()
      seen.add(panel)
      right_total = start + sign * sum(panels[name] for name in seen)
      truth.append(int(SCORES.index(word) + 1 == panels[panel] and int(total) == right_total))
    else:  # a preface claims nothing
      truth.append(int(not step.startswith("Final") or step == f"Final answer: {rollout.answer}"))
  return truth


def test_labels_are_what_the_pictures_show(config, where):
  corpus, shown = Corpus.open(where.prepared), shown_scores(where.toy / "captions.jsonl")
  assert len(corpus) == 360 - 3
  examples = RolloutExamples(corpus, np.arange(len(corpus)), config)
  truths = [truth_of(corpus.rollout(i), shown) for i in range(len(corpus))]
  for i, truth in enumerate(truths):
    example = examples[i]
    assert example.targets.tolist() == truth, example.id
    assert example.targets.dtype == example.weights.dtype == np.float32
    assert (example.weights == 1).all()
  unlike = sum(one != other for one, other in zip(truths, truths[1:], strict=False))
  assert unlike > 150, "a shift by one line would not show"


def test_labels_stay_with_their_steps_where_trailing_ones_are_cut(config, where):
  corpus, shown = Corpus.open(where.prepared), shown_scores(where.toy / "captions.jsonl")
  chosen = np.arange(0, len(corpus), 5)
  examples, processor = (
    RolloutExamples(corpus, chosen, config),
    make_processor(config, where.tokenizer),
  )
  measured = pipeline.measure(examples, processor.prompt, processor.images, max_length=110)
  assert 10 < np.count_nonzero(measured.dropped_steps) < len(chosen)
  plan = pack.plan(measured.costs, np.array([256, 128, 32]))
  checked = 0
  for batch in pipeline.BatchIterator(measured, plan, rows_per_batch=8):
    for row, marker in zip(*np.nonzero(batch["example_index"] >= 0), strict=True):
      example, step = batch["example_index"][row, marker], batch["step_index"][row, marker]
      truth = truth_of(corpus.rollout(int(chosen[example])), shown)
      assert batch["marker_target"][row, marker] == truth[step]
      assert batch["marker_weight"][row, marker] == 1
      checked += 1
  assert checked == measured.costs[:, 2].sum()
