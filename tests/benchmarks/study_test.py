"""The study: its runs, resuming, the comparison of arms, and its page."""

import json
import pathlib
import stat
import sys

import numpy as np
import pytest
from scipy import stats

from benchmarks.study import arms, recipe, results, study_page, sweeps
from benchmarks.study.arms import Part
from bis_jax.selection.strategies import STRATEGIES
from bis_jax.settings import config_check as config_lib

# Replaces Python in a sweep: writes the files of an arm, and fails if it is told to.
STUB = """#!/bin/sh
for flag in "$@"; do case $flag in
  --workdir=*) workdir=${flag#*=} ;;
  --config.seed=*) seed=${flag#*=} ;;
esac; done
case $workdir in *$FAIL*) exit 3 ;; esac
mkdir -p "$workdir"
echo "$workdir" >> "$ORDER"
echo "$@" > "$workdir/arguments"
echo "{}" > "$workdir/evaluation.json"
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
  """Runs of sweeps become a file of their workdirs, in order."""
  script = tmp_path / "python"
  script.write_text(STUB)
  script.chmod(script.stat().st_mode | stat.S_IXUSR)
  monkeypatch.setattr(sys, "executable", str(script))
  monkeypatch.setenv("ORDER", str(tmp_path / "order"))
  monkeypatch.setenv("FAIL", "nothing")
  return lambda: (
    [pathlib.Path(line).name for line in (tmp_path / "order").read_text().splitlines()]
    if (tmp_path / "order").exists()
    else []
  )


PART = Part("grid", ("random", "bis"), (0.1, 0.25), {"selection.alpha": 0.2})


def test_every_arm_of_a_part_runs_once_with_its_settings(tmp_path, stub):
  sweeps.sweep([(PART, [0, 1, 2])], tmp_path / "out", {"optim.learning_rate": 0.001})
  wanted = {f"{s}_{f}_seed{n}" for s in PART.strategies for f in PART.fractions for n in range(3)}
  assert set(stub()) == wanted and len(stub()) == 12
  said = (tmp_path / "out" / "grid" / "bis_0.25_seed2" / "arguments").read_text()
  for flag in (
    "--config=benchmarks/study/recipe.py",
    "--config.optim.learning_rate=0.001",
    "--config.selection.alpha=0.2",
    "--config.selection.strategy=bis",
    "--config.selection.fraction=0.25",
    "--config.seed=2",
  ):
    assert flag in said.split()
  lines = map(json.loads, (tmp_path / "out" / "timings.jsonl").read_text().splitlines())
  assert {(line["part"], line["arm"]) for line in lines} == {("grid", arm) for arm in wanted}


def test_arms_that_are_done_are_not_run_again(tmp_path, stub):
  sweeps.sweep([(PART, [0])], tmp_path / "out", {})
  (tmp_path / "out" / "grid" / "bis_0.1_seed0" / "evaluation.json").unlink()
  sweeps.sweep([(PART, [0])], tmp_path / "out", {})
  assert len(stub()) == 5 and stub()[-1] == "bis_0.1_seed0"
  sweeps.sweep([(PART, [0])], tmp_path / "out", {})
  assert len(stub()) == 5


def test_no_two_runs_abreast_make_the_same_corpus_or_backbone(tmp_path, stub, monkeypatch):
  monkeypatch.setattr(sweeps.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
  monkeypatch.setattr(sweeps.os, "sched_setaffinity", lambda pid, cores: None)
  part = Part("n_mc_4", ("random", "bis"), (0.1, 0.25), {"corpus.toy.n_mc": 4})
  other = Part("pictures", ("bis",), (0.1,), {"corpus.toy.images": 500})
  seen = []
  next_arm = sweeps._next

  def spied(waiting, made, running):
    arm = next_arm(waiting, made, running)
    if arm:
      others = [other for other, _, _ in running.values()]
      seen.append((arm, frozenset(made), others))
    return arm

  monkeypatch.setattr(sweeps, "_next", spied)
  sweeps.sweep([(PART, [0, 1]), (part, [0, 1]), (other, [0])], tmp_path / "out", {})
  assert len(stub()) == 17 and any(others for _, _, others in seen)
  for arm, made, others in seen:
    assert not any((arm.makes & other.makes) - made for other in others)
  # Another picture is another backbone.
  assert [("backbone", 500, 0) in arm.makes for arm, _, _ in seen].count(True) == 1


def test_an_arm_that_fails_ends_the_study_after_the_others(tmp_path, stub, monkeypatch):
  monkeypatch.setenv("FAIL", "bis_0.1_seed1")
  with pytest.raises(SystemExit, match="bis_0.1_seed1.log"):
    sweeps.sweep([(PART, [0, 1])], tmp_path / "out", {})
  assert len(stub()) == 7


def test_ablations_and_the_outline_have_three_seeds():
  whole = arms.seeds_of(arms.MAIN + arms.ABLATIONS, 5)
  assert [len(seeds) for part, seeds in whole if part in arms.MAIN] == [5] * len(arms.MAIN)
  assert {len(seeds) for part, seeds in whole if part in arms.ABLATIONS} == {3}
  assert whole[-1][0].fractions == whole[-2][0].fractions == (0.5,)
  # Some parts of the outline are parts of the whole as well.
  assert {len(seeds) for _, seeds in arms.seeds_of(arms.QUICK, 5)} == {3}
  assert {len(seeds) for _, seeds in arms.seeds_of(arms.QUICK, 2)} == {2}


# Strategies that the study has not compared yet.
_LATER = {"bis_by_position", "bis_grouped", "bis_posterior", "semdedup"}


def test_what_is_compared_can_be_run():
  """Every setting is a key with a value in its range, and all strategies of the paper run."""
  compared = {strategy for part in arms.MAIN for strategy in part.strategies}
  assert compared == set(STRATEGIES) - {"reliability_only"} - _LATER
  assert {f for part in arms.MAIN for f in part.fractions} == {0.05, 0.1, 0.25, 0.5, 1.0}
  tried = [part for name in arms.CANDIDATES for part in arms.candidate_parts(name)]
  every = (*arms.MAIN, *arms.ABLATIONS, *arms.QUICK, *tried, arms.DRAWN, arms.START)
  for part in every:
    for quick in ({}, arms.QUICK_SETTINGS):
      c = recipe.get_config()
      c.update_from_flattened_dict(dict(quick) | dict(part.settings))
      c.selection.strategy, c.selection.fraction = part.strategies[0], part.fractions[0]
      config_lib.check(c)
  names = [(p.name, s, f) for p in (*arms.MAIN, *arms.ABLATIONS) for s in p.strategies
           for f in p.fractions]  # fmt: skip
  assert len(set(names)) == len(names)


def test_paired_differences_are_students():
  rng = np.random.default_rng(0)
  a = {seed: float(value) for seed, value in enumerate(rng.normal(0.8, 0.02, 6))}
  b = {seed: float(value) for seed, value in enumerate(rng.normal(0.7, 0.05, 5))}
  ours = results.paired(a, b)
  x, y = np.array([a[s] for s in range(5)]), np.array([b[s] for s in range(5)])
  interval = stats.ttest_rel(x, y).confidence_interval(0.95)
  assert ours["seeds"] == 5 and ours["difference"] == pytest.approx((x - y).mean())
  assert ours["interval"] == pytest.approx([interval.low, interval.high])
  ratio = stats.ttest_1samp(x / y - 1, 0).confidence_interval(0.95)
  assert ours["relative_interval"] == pytest.approx([ratio.low, ratio.high])
  assert results.paired(a, {9: 1.0}) is None
  assert results.paired({0: 0.5}, {0: 0.4})["interval"] is None


def _workdir(folder: pathlib.Path, strategy: str, fraction: float, seed: int, value: float):
  place = folder / f"{strategy}_{fraction:g}_seed{seed}"
  place.mkdir(parents=True)
  block = dict.fromkeys(results.MEASURES, value / 2) | {"overall_source_weighted": value}
  thresholds = {"tuned_on_test": block, "fixed_0.5": block}
  (place / "evaluation.json").write_text(json.dumps({"thresholds": thresholds}))
  config = {"seed": seed, "selection": {"strategy": strategy, "fraction": fraction}}
  (place / "config.json").write_text(json.dumps(config))
  key = "evaluation/tuned_on_test/overall_source_weighted"
  lines = [{"step": step, "loss": 0.5, key: value * step / 200} for step in (100, 200)]
  (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def finished(tmp_path):
  """Two seeds of every arm of a small study: BIS above random at a tenth, below at a quarter."""
  scores = {
    ("grid", "bis", 0.1): (0.80, 0.81),
    ("grid", "random", 0.1): (0.700, 0.708),
    ("grid", "bis", 0.25): (0.70, 0.71),
    ("grid", "random", 0.25): (0.80, 0.81),
    ("full", "full", 1.0): (0.82, 0.80),
    ("passes_5", "bis", 0.1): (0.85,),
    ("larger", "bis", 0.1): (0.95, 0.97),
    ("larger", "random", 0.1): (0.90, 0.92),
    ("larger", "full", 1.0): (0.96, 0.94),
    ("slip_4", "bis", 0.1): (0.91,),
    ("slip_4", "random", 0.1): (0.90,),
    ("alpha_0", "bis", 0.1): (0.79, 0.80),
    ("n_mc_4", "bis", 0.1): (0.5, 0.9),
    ("n_mc_4", "random", 0.1): (0.3, 0.7),  # equal differences, but not equal ratios
  }
  for (part, strategy, fraction), values in scores.items():
    for seed, value in enumerate(values):
      _workdir(tmp_path / part, strategy, fraction, seed, value)
  return tmp_path


def test_the_page_says_what_the_workdirs_hold(finished):
  words = study_page.write(finished, arms.MAIN + arms.ABLATIONS)
  assert "BIS 10 % reaches 80.50 ± 0.71 and random 10 % 70.40 ± 0.57" in words
  assert "a relative gain of +14.3 %" in words
  assert "The mean of BIS is above random's in 3 of 4 settings." in words
  assert "BIS is better than random beyond the seeds' noise at 10 %: +14.3 %" in words
  assert "10 %, of 48,000, three passes: +5.5 %" in words
  assert "BIS is worse than random beyond the seeds' noise at 25 %: -12.4 %" in words
  assert "The seeds do not tell BIS from random at 10 %, N = 4: +47.6 %" in words
  written = json.loads((finished / "results.json").read_text())
  [row] = [e for e in written["arms"] if e["part"] == "alpha_0"]
  assert row["values"]["tuned_on_test"]["overall_source_weighted"] == {"0": 0.79, "1": 0.80}
  assert row["values"]["fixed_0.5"]["accuracy"] == {"0": 0.395, "1": 0.40} and row["steps"] == 200
  [recipe_gap] = [
    c for c in written["comparisons"] if (c["part"], c["against"]) == ("alpha_0", "recipe")
  ]
  assert recipe_gap["difference"] == pytest.approx(-0.06)  # in as many passes, seed 0
  assert (finished / "table.md").read_text().splitlines() == [
    "| | 10 % | 25 % | 10 %, five passes | 10 %, three passes, of 48,000 rollouts | all |",
    "|---|---|---|---|---|---|",
    "| random | 70.40 ± 0.57 | 80.50 ± 0.71 |  | 91.00 ± 1.41 |  |",
    "| bis | 80.50 ± 0.71 | 70.50 ± 0.71 | 85.00 (1 seed) | 96.00 ± 1.41 |  |",
    "| full |  |  |  | 95.00 ± 1.41 | 81.00 ± 1.41 |",
  ]
  html = (finished / "index.html").read_text()
  for text in ("overall_source_weighted", "alpha 0", "tuned_on_test", "80.50 ± 0.71"):
    assert text in html
  against = [f"overall_against_{name}" for name in ("fraction", "step_grid", "step_passes_5")]
  against += ["overall_against_step_larger", "gain_over_random", "larger_by_seed"]
  for name in against:
    assert (finished / "plots" / f"{name}.png").stat().st_size > 10_000


def test_a_part_with_all_of_its_own_rollouts_is_compared_with_them(finished):
  entries = results.read(finished, arms.MAIN + arms.ABLATIONS)
  by_pair = {(c["part"], c["strategy"], c["against"]): c for c in results.comparisons(entries)}
  of_48, small = by_pair["larger", "bis", "full"], by_pair["passes_5", "bis", "full"]
  assert of_48["difference"] == pytest.approx((0.95 - 0.96 + 0.97 - 0.94) / 2)
  assert small["difference"] == pytest.approx(0.85 - 0.82)
  assert by_pair["larger", "full", "full"]["difference"] == pytest.approx(0.14)  # of both corpora
  # One of the larger corpus: all are those of the part that it is like.
  assert by_pair["slip_4", "bis", "random"]["difference"] == pytest.approx(0.01)
  assert by_pair["slip_4", "bis", "full"]["difference"] == pytest.approx(-0.05)
  assert by_pair["slip_4", "bis", "recipe"]["difference"] == pytest.approx(-0.04)
  assert by_pair["slip_4", "random", "bis"]["difference"] == pytest.approx(-0.01)
  assert ("slip_4", "bis", "bis") not in by_pair
  assert by_pair["n_mc_4", "bis", "full"]["difference"] == pytest.approx(0.7 - 0.81)
  assert ("grid", "bis", "recipe") not in by_pair and ("full", "full", "full") not in by_pair
  drawn = study_page._runs(entries, "larger")
  assert {run.curve[-1][1] for run in drawn if run.strategy == "full"} == {0.96, 0.94}
  words = study_page.write(finished, arms.MAIN)
  assert "All of these in one pass (200 steps): 95.00 ± 1.41; after 200 of them, by a" in words
  half = study_page._on_the_way(results.find(entries, "larger", "full", 1.0), 150)
  assert half == "; after 100 of them, by a part of the benchmark, 47.5"


def test_the_recipe_is_chosen_by_full_and_random(tmp_path, stub):
  scores = dict(zip(arms.CANDIDATES, [(0.7, 0.6), (0.8, 0.7), (0.9, 0.5)], strict=True))
  for name, values in scores.items():
    for part, value in zip(arms.candidate_parts(name), values, strict=True):
      _workdir(tmp_path / part.name, part.strategies[0], part.fractions[0], 1000, value)
  evaluated = results.evaluate_candidates(tmp_path, 1000)
  assert [line["mean"] for line in evaluated] == pytest.approx([0.65, 0.75, 0.7])
  assert sweeps.choose(tmp_path, {}, []) == arms.CANDIDATES[evaluated[1]["name"]]
  assert stub() == []  # nothing is run again
