"""How much a step's position predicts its label: nothing, all, and a share counted by hand."""

import json
import pathlib

import numpy as np
import pytest
from etils import epath
from sklearn.metrics import mutual_info_score

from benchmarks.study import positions, study_page
from bis_jax.run import stages
from bis_jax.settings import locations
from bis_jax.settings.workdir import claim
from configs import qwen_bis10


def test_the_share_is_the_mutual_information_over_the_entropy():
  rng = np.random.default_rng(0)
  place = rng.integers(0, 5, 2000)
  label = rng.random(2000) < 0.1 + 0.2 * place
  entropy = mutual_info_score(label, label)
  wanted = mutual_info_score(place, label) / entropy
  assert positions.share_predicted(place, label) == pytest.approx(wanted)


@pytest.mark.parametrize(
  "place, label, predicted",
  [
    ([0, 0, 1, 1], [True, True, False, False], 1.0),
    ([0, 0, 1, 1], [True, False, True, False], 0.0),
    ([0, 1, 2, 3], [True, True, True, True], 0.0),  # there is nothing to tell
  ],
)
def test_all_or_nothing_is_told(place, label, predicted):
  assert positions.share_predicted(np.array(place), np.array(label)) == pytest.approx(predicted)


def _select(workdir: pathlib.Path, strategy: str, cache: pathlib.Path) -> None:
  """Writes the files that a run writes before it trains."""
  c = qwen_bis10.get_config("toy")
  c.corpus.cache = str(cache)
  c.corpus.toy.rollouts, c.corpus.toy.images, c.corpus.toy.benchmark_items = 1000, 300, 18
  c.corpus.workers, c.selection.strategy = 1, strategy
  claim(epath.Path(workdir), c)
  corpus = stages.prepare_corpus(c, locations.require(c, locations.locate(c)))
  stages.select_rollouts(c, corpus, epath.Path(workdir) / "manifest.json")


def test_a_run_by_bis_is_told_more_by_place_than_one_at_random(tmp_path, capsys):
  for strategy in ("random", "bis"):
    _select(tmp_path / strategy, strategy, cache=tmp_path / "cache")
  capsys.readouterr()  # what was said on the way
  positions.main(str(tmp_path / "random"), str(tmp_path / "bis"))
  _, random, bis = (line.split() for line in capsys.readouterr().out.splitlines())
  assert random[1] == bis[1] and 90 <= int(bis[1]) <= 100
  assert float(bis[2]) > 3 * float(random[2])  # mixed


def test_the_study_tells_of_the_runs_that_are_done(tmp_path):
  for part, name in (
    ("larger", "bis_0.1_seed0"),
    ("larger", "bis_0.1_seed1"),
    ("grid", "bis_0.1_seed0"),
  ):
    _select(tmp_path / part / name, "bis", cache=tmp_path / "cache")
  (tmp_path / "larger" / "bis_0.1_seed0" / "evaluation.json").write_text("{}")
  positions.write(tmp_path, ["larger", "slip_4"])
  predicted = json.loads((tmp_path / "positions.json").read_text())
  kept, mixed, share = positions.of_run(tmp_path / "larger" / "bis_0.1_seed0")
  assert predicted == {"larger/bis_0.1_seed0": [kept, mixed, share]}
  row = ["larger/bis_0.1_seed0", f"{kept}", f"{100 * mixed:.1f} %", f"{100 * share:.1f} %"]
  assert row in study_page._positions_table(predicted).rows
