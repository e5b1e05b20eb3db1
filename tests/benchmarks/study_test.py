"""The study: its runs, resuming, the comparison of arms, and its page."""

import json
import pathlib
import stat
import sys

import numpy as np
import pytest
from scipy import stats

from benchmarks.study import arms, recipe, results, strategies, study_page, sweeps
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


def test_no_two_runs_abreast_draw_the_same_corpus(tmp_path, stub, monkeypatch):
  monkeypatch.setattr(sweeps.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
  monkeypatch.setattr(sweeps.os, "sched_setaffinity", lambda pid, cores: None)
  part = Part("n_mc_4", ("random", "bis"), (0.1, 0.25), {"corpus.toy.n_mc": 4})
  other = Part("pictures", ("bis",), (0.1,), {"corpus.toy.images": 500})
  seen = []
  next_arm = sweeps._next

  def spied(waiting, drawn, running):
    arm = next_arm(waiting, drawn, running)
    if arm:
      others = [other for other, _, _ in running.values()]
      seen.append((arm, frozenset(drawn), others))
    return arm

  monkeypatch.setattr(sweeps, "_next", spied)
  sweeps.sweep([(PART, [0, 1]), (part, [0, 1]), (other, [0])], tmp_path / "out", {})
  assert len(stub()) == 17 and any(others for _, _, others in seen)
  for arm, drawn, others in seen:
    assert arm.corpus in drawn or arm.corpus not in {other.corpus for other in others}


def test_an_arm_that_fails_ends_the_study_after_the_others(tmp_path, stub, monkeypatch):
  monkeypatch.setenv("FAIL", "bis_0.1_seed1")
  with pytest.raises(SystemExit, match="bis_0.1_seed1.log"):
    sweeps.sweep([(PART, [0, 1])], tmp_path / "out", {})
  assert len(stub()) == 7


def test_parts_have_their_own_number_of_seeds():
  """Five for what the claims compare, at most `most`, and others than the main ones in "fresh"."""
  seeds = {}
  for part, own in arms.seeds_of(arms.MAIN + arms.CONFIRM + arms.ABLATIONS, 5):
    for strategy in part.strategies:
      for fraction in part.fractions:
        seeds.setdefault((part.name, strategy, fraction), own)
  for strategy in ("random", "bis", "bis_by_position"):
    assert seeds["grid", strategy, 0.1] == seeds[arms.SECOND, strategy, 0.1] == range(5)
    assert seeds[arms.FRESH, strategy, 0.1] == range(100, 105)
  assert seeds["full", "full", 1.0] == range(3)
  assert seeds["truth", "bis", 0.1] == seeds["grid", "mixed", 0.1] == range(3)
  assert {len(own) for _, own in arms.seeds_of(arms.QUICK, 2)} == {1, 2}


def test_what_is_compared_can_be_run():
  """Every setting is a key with a value in its range, and all strategies run."""
  compared = {strategy for part in arms.MAIN for strategy in part.strategies}
  assert set(STRATEGIES) - compared == {"reliability_only", "semdedup"}  # as `reliable`; by texts
  assert {f for part in arms.MAIN for f in part.fractions} == {0.05, 0.1, 0.25, 0.5, 1.0}
  whole = (*arms.MAIN, *arms.CONFIRM, *arms.WEAK, *arms.ABLATIONS)
  assert {*arms.SELECTIONS, arms.SECOND, "rare"} <= {part.name for part in whole}
  for part in (*whole, *arms.QUICK, arms.START):
    for quick in ({}, arms.QUICK_SETTINGS):
      c = recipe.get_config()
      c.update_from_flattened_dict(dict(quick) | dict(part.settings))
      for strategy in part.strategies:
        c.selection.strategy, c.selection.fraction = strategy, part.fractions[0]
        config_lib.check(c)
  names = [(p.name, s, f) for p in whole for s in p.strategies for f in p.fractions]
  assert len(set(names)) == len(names)


def test_the_backbone_has_seen_other_kinds_and_is_trained_once(tmp_path, stub):
  ours = recipe.get_config().corpus.toy
  for form in ("learn", "settle"):
    theirs = recipe.get_config(form).corpus.toy
    config_lib.check(recipe.get_config(form))
    assert ours.first_kind != theirs.first_kind and ours.seed != theirs.seed  # other pictures
  out = sweeps.make_backbone(tmp_path / "out", {})
  assert stub() == ["learn", "learn", "settle", "settle"]  # trained, exported
  said = (tmp_path / "out" / "settle" / "arguments").read_text()
  assert f"--out={out}" in said  # the last call
  for folder in ("backbone_learn", "backbone_settle"):
    (tmp_path / "out" / folder).mkdir()
    (tmp_path / "out" / folder / "config.json").write_text("{}")
  assert sweeps.make_backbone(tmp_path / "out", {}) == out and len(stub()) == 4


def test_drop_prefers_errors_at_which_the_score_falls_at_once():
  rollouts = [[15, 3, 0], [15, 14, 0, 0], [0, 0], [16, 12, 16], [16, 16, 16]]
  lengths = np.array(list(map(len, rollouts)))
  correct = np.concatenate(rollouts)
  ours = strategies.drop(correct, np.full(correct.size, 16), lengths)
  np.testing.assert_allclose(ours, [1 + 3 / 16, 1 + 14 / 16, 2.0, 12 / 16, 1.0])


def test_surprise_is_what_position_does_not_predict():
  rollouts = [[16, 0, 16], [16, 0, 16], [16, 0, 16], [16, 0, 16], [0, 16, 16], [16, 0, 0], [8, 8]]
  lengths = np.array(list(map(len, rollouts)))
  correct = np.concatenate(rollouts)
  ours = strategies.surprise(correct, np.full(correct.size, 16), lengths)
  assert np.argsort(-ours)[:2].tolist() == [4, 5] and len(set(ours[:4])) == 1
  share = np.array([6 / 8, 2 / 8, 6 / 8])  # of a positive label, with one more of each
  shares = [1 - share[0], share[1], share[2]]
  assert ours[4] == pytest.approx(-np.log(shares).mean())
  assert ours[6] == pytest.approx(-np.log(2 / 3) * 0.5)  # of half the continuations


def test_seeds_needed_are_those_of_a_simulation():
  by_seed = dict(enumerate([0.70, 0.72, 0.71, 0.74, 0.68]))
  n = results.seeds_needed(by_seed, 0.04)
  rng = np.random.default_rng(0)
  deviation = np.std(list(by_seed.values()), ddof=1)

  def power(n: int) -> float:
    a, b = rng.normal(0, deviation, (2, 20_000, n))
    return (stats.ttest_1samp(a - b + 0.04 * 0.71, 0, axis=1).pvalue < 0.05).mean()

  assert power(n - 1) < 0.8 + 0.01 and power(n) > 0.8 - 0.01
  assert results.seeds_needed({0: 0.7}, 0.04) is None


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
  blank = {"tuned_on_test": {"errors_lost": 0.25}}
  (place / "evaluation.json").write_text(
    json.dumps({"thresholds": thresholds, "blank_images": blank})
  )
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
    ("second", "bis", 0.1): (0.95, 0.97),
    ("second", "random", 0.1): (0.90, 0.92),
    ("second", "full", 1.0): (0.96, 0.94),
    ("fresh", "bis", 0.1): (0.85,),
    ("truth", "full", 1.0): (0.90, 0.90),
    ("truth", "random", 0.1): (0.80,),
    ("soft", "random", 0.1): (0.75,),
    ("alpha_0", "bis", 0.1): (0.79, 0.80),
    ("n_mc_4", "bis", 0.1): (0.5, 0.9),
    ("n_mc_4", "random", 0.1): (0.3, 0.7),  # equal differences, but not equal ratios
  }
  for (part, strategy, fraction), values in scores.items():
    for seed, value in enumerate(values):
      _workdir(tmp_path / part, strategy, fraction, seed, value)
  return tmp_path


WHOLE = arms.MAIN + arms.CONFIRM + arms.WEAK + arms.ABLATIONS


def test_one_seed_has_no_interval_and_no_full_of_another_corpus(tmp_path):
  for part, strategy, fraction, value in (
    ("grid", "bis", 0.1, 0.8),
    ("grid", "random", 0.1, 0.7),
    ("grid", "random", 0.25, 0.79),
    ("full", "full", 1.0, 0.82),
    ("second", "bis", 0.1, 0.95),
    ("second", "random", 0.1, 0.9),
  ):
    _workdir(tmp_path / part, strategy, fraction, 0, value)
  words = study_page.write(tmp_path, WHOLE)
  assert "a relative gain of +14.3 % over one seed; against all, -2.4 %." in words
  assert "a relative gain of +5.6 % over one seed.\n" in words
  assert "A random quarter is -3.00 points from all rollouts." in words
  for part, seed in (("truth", 0), ("truth", 1), ("grid", 1), ("soft", 0)):  # soft lacks a seed
    _workdir(tmp_path / part, "random", 0.1, seed, 0.9 if part == "truth" else 0.8)
  words = study_page.write(tmp_path, WHOLE)
  assert "True labels add +20.00 points to random 10 %" in words and "soft +10.00 (50 %)." in words
  _workdir(tmp_path / "grid", "bis_by_position", 0.1, 0, 0.84)
  assert (
    "Best of the others is bis_by_position: 84.00, +20.0 % against random, +5.0 % against bis."
    in study_page.write(tmp_path, WHOLE)
  )


def test_the_page_says_what_the_workdirs_hold(finished):
  predicted = {f"grid/{name}_0.1_seed0": [480, 0.1, 0.2] for name in ("bis", "random")}
  (finished / "positions.json").write_text(json.dumps(predicted))
  words = study_page.write(finished, WHOLE)
  assert "BIS 10 % (200 steps) reaches 80.50 ± 0.71 and random 10 % 70.40 ± 0.57" in words
  assert "a relative gain of +14.3 %" in words
  assert "All rollouts after 200 steps, on a part of the benchmark: 95.0." in words
  assert "A random quarter is -0.50 (-19.56 to +18.56) points from all rollouts" in words
  assert "true labels of all rollouts add +9.00 (-3.71 to +21.71) points." in words
  assert "True labels add +10.00 points to random 10 % with hard labels" in words
  assert "of this gap close: soft +5.00 (50 %)." in words
  assert "With the deviation of random 10 %, 3 paired seeds show" in words
  assert "The mean of BIS is above random's in 4 of 5 settings." in words
  assert "BIS is better than random beyond the seeds' noise at 10 %: +14.3 %" in words
  assert "10 %, second corpus: +5.5 %" in words
  assert "BIS is worse than random beyond the seeds' noise at 25 %: -12.4 %" in words
  assert "The seeds do not tell BIS from random at 10 %, N = 4: +47.6 %" in words
  written = json.loads((finished / "results.json").read_text())
  [row] = [e for e in written["arms"] if e["part"] == "alpha_0"]
  assert row["values"]["tuned_on_test"]["overall_source_weighted"] == {"0": 0.79, "1": 0.80}
  assert row["values"]["fixed_0.5"]["accuracy"] == {"0": 0.395, "1": 0.40} and row["steps"] == 200
  assert row["errors_lost"] == {"0": 0.25, "1": 0.25}
  [recipe_gap] = [
    c for c in written["comparisons"] if (c["part"], c["against"]) == ("alpha_0", "recipe")
  ]
  assert recipe_gap["difference"] == pytest.approx(-0.01)
  assert (finished / "table.md").read_text().splitlines() == [
    "| | 10 % | 25 % | 10 %, with fresh seeds | 10 %, on the second corpus | all |",
    "|---|---|---|---|---|---|",
    "| random | 70.40 ± 0.57 | 80.50 ± 0.71 |  | 91.00 ± 1.41 |  |",
    "| bis | 80.50 ± 0.71 | 70.50 ± 0.71 | 85.00 (1 seed) | 96.00 ± 1.41 |  |",
    "| full |  |  |  | 95.00 ± 1.41 | 81.00 ± 1.41 |",
  ]
  html = (finished / "index.html").read_text()
  for text in ("overall_source_weighted", "alpha 0", "tuned_on_test", "80.50 ± 0.71", "25 %"):
    assert text in html
  for name in ("against_fraction", "against_mixed", "against_step"):
    assert (finished / "plots" / f"overall_{name}.png").stat().st_size > 10_000
  for name in ("gain_over_random", "tenths_by_seed"):
    assert (finished / "plots" / f"{name}.png").stat().st_size > 10_000


def test_a_part_with_all_of_its_own_rollouts_is_compared_with_them(finished):
  entries = results.read(finished, WHOLE)
  by_pair = {(c["part"], c["strategy"], c["against"]): c for c in results.comparisons(entries)}
  assert by_pair["second", "bis", "full"]["difference"] == pytest.approx((0.95 - 0.96 + 0.03) / 2)
  assert by_pair["n_mc_4", "bis", "full"]["difference"] == pytest.approx(0.7 - 0.81)
  assert by_pair["alpha_0", "bis", "random"]["difference"] == pytest.approx(0.795 - 0.704)
  assert by_pair["alpha_0", "bis", "recipe"]["difference"] == pytest.approx(-0.01)
  assert by_pair["truth", "full", "recipe"]["difference"] == pytest.approx(0.09)
  assert ("grid", "bis", "recipe") not in by_pair and ("full", "full", "full") not in by_pair
