"""The content of evaluation.json, and its bootstrap against samples drawn item by item."""

import json
import types

import numpy as np
import pytest

from bis_jax.evaluation import step_evaluation, step_metrics


def item(labels, source="MMMU", policy="m"):
  return types.SimpleNamespace(labels=labels, data_source=source, policy_model=policy)


def test_evaluation_holds_every_named_measure(random_run):
  items, scores = random_run(0)
  dev = step_metrics.scored_steps([[1, -1], [1, -1]], [[0.9, 0.6], [0.8, 0.2]], ["x", "y"])
  report = step_evaluation.evaluate(items, scores, dev=dev, bootstrap_draws=20)
  assert list(report["thresholds"]) == ["fixed_0.5", "tuned_on_dev", "tuned_on_test"]
  assert report["thresholds"]["tuned_on_dev"]["threshold"] == 0.8
  for block in report["thresholds"].values():
    for name in (
      "threshold",
      "origin",
      "overall_source_weighted",
      "macro_f1_pooled",
      "macro_f1_source_mean",
      "accuracy",
      "f1_correct",
      "f1_error",
      "roc_auc",
      "first_error_f1",
    ):
      assert name in block
    low, high = block["intervals"]["macro_f1_pooled"]
    assert low <= block["macro_f1_pooled"] <= high
  for name in ("roc_auc", "average_precision_error", "brier", "ece"):
    assert 0 <= report[name] <= 1
  assert set(report["per_policy_model"]) == {"model-0", "model-1", "model-2"}
  sizes = [block["steps"] for block in report["per_source"].values()]
  assert (
    sum(sizes)
    == report["benchmark"]["steps"]
    == sum(map(len, scores)) - (report["benchmark"]["neutral_steps"])
  )
  weighted = sum(
    block["thresholds"]["tuned_on_test"]["macro_f1"] * block["steps"]
    for block in report["per_source"].values()
  )
  np.testing.assert_allclose(
    weighted / sum(sizes),
    report["thresholds"]["tuned_on_test"]["overall_source_weighted"],
    atol=1e-12,
  )
  assert sum(b["steps"] for b in report["reliability"]) == sum(sizes)


def test_errors_lost_are_those_caught_only_with_the_image():
  items = [item([1, -1, -1, 0]), item([-1, 1, 1, -1])]
  scores = [np.array([0.9, 0.1, 0.2, 0.1]), np.array([0.3, 0.4, 0.8, 0.7])]
  blank = [np.array([0.5, 0.1, 0.3, 0.9]), np.array([0.2, 0.25, 0.9, 0.1])]
  blocks = step_evaluation.without_images(items, scores, blank)
  # Below 0.5: three errors and a correct step, as with grey images, where all errors are.
  assert blocks["fixed_0.5"]["errors_lost"] == 0.0
  assert blocks["fixed_0.5"]["accuracy"] == pytest.approx(6 / 7)
  sharp = [np.array([0.9, 0.1, 0.2, 0.1]), np.array([0.3, 0.8, 0.8, 0.7])]
  blocks = step_evaluation.without_images(items, sharp, blank)
  assert blocks["fixed_0.5"]["errors_lost"] == pytest.approx(1 / 3)  # 0.3 costs a false alarm
  none = step_evaluation.without_images(items, [np.ones(4), np.ones(4)], blank)
  assert none["fixed_0.5"]["errors_lost"] is None
  all_flagged = step_evaluation.without_images(items, [np.zeros(4), np.zeros(4)], blank)
  assert all_flagged["fixed_0.5"]["errors_lost"] == 0.0
  json.dumps(none, allow_nan=False)


def test_constant_predictor_is_the_better_of_both_constants(random_run):
  items, scores = random_run(1)
  report = step_evaluation.evaluate(items, scores, bootstrap_draws=0)
  for source, block in report["per_source"].items():
    mine = [i for i in items if i.data_source == source]
    by_hand = [
      step_evaluation.evaluate(mine, [np.full(len(i.labels), c) for i in mine], bootstrap_draws=0)
      for c in (0.0, 1.0)
    ]
    best = max(r["thresholds"]["fixed_0.5"]["macro_f1_pooled"] for r in by_hand)
    assert block["constant_macro_f1"] == best


@pytest.mark.parametrize(
  ("items", "scores"),
  [
    ([item((1,))], [[0.7]]),
    ([item((-1,))], [[0.7]]),
    ([item((0, 0))], [[0.7, 0.1]]),
    ([item((1, -1)), item((0,), "WeMath", "n")], [[0.5, 0.5], [0.5]]),
    ([item((1, 1, -1))] * 3, [[1.0, 1.0, 1.0]] * 3),
  ],
)
def test_degenerate_benchmarks_give_strict_json(items, scores):
  report = step_evaluation.evaluate(items, [np.array(s) for s in scores], bootstrap_draws=10)
  json.dumps(report, allow_nan=False)
  assert report["thresholds"]["tuned_on_test"]["roc_auc"] in (None, 0.5)


def test_bootstrap_draws_are_the_measures_of_resampled_items(random_run):
  items, scores = random_run(2, n_items=12)  # few, so that some draws lack a source or a class
  steps = step_metrics.scored_steps(
    [i.labels for i in items], scores, [i.data_source for i in items]
  )
  draws = step_evaluation.draw_items(12, 40, seed=5)
  got = step_evaluation.threshold_measures(steps, 0.5, draws)
  got |= step_evaluation.score_measures(steps, draws)
  assert draws.sum(1).tolist() == [12] * 40
  for d, counts in enumerate(draws.astype(int)):
    sample = np.repeat(np.arange(12), counts)
    report = step_evaluation.evaluate(
      [items[i] for i in sample], [scores[i] for i in sample], bootstrap_draws=0
    )
    want = report["thresholds"]["fixed_0.5"] | {
      name: report[name] for name in ("average_precision_error", "brier", "ece")
    }
    for name, values in got.items():
      np.testing.assert_allclose(values[d], want[name], atol=1e-12, err_msg=name)


def test_intervals_are_seeded_and_widen_on_fewer_items(random_run):
  items, scores = random_run(3, n_items=400)
  width = {}
  for n in (400, 25):
    runs = [
      step_evaluation.evaluate(items[:n], scores[:n], seed=seed, bootstrap_draws=300)
      for seed in (0, 0, 1)
    ]
    spans = [run["thresholds"]["fixed_0.5"]["intervals"]["accuracy"] for run in runs]
    assert spans[0] == spans[1] != spans[2]
    width[n] = spans[0][1] - spans[0][0]
  assert 2 < width[25] / width[400] < 8  # about the root of 16


def test_paired_bootstrap_sees_through_noise_that_both_runs_share(random_run):
  items, scores = random_run(4, n_items=200)
  better = [
    np.clip(s + 0.05 * np.array(i.labels), 0, 1) for i, s in zip(items, scores, strict=True)
  ]
  report = step_evaluation.compare(items, better, scores, bootstrap_draws=200)
  gain = report["fixed_0.5"]["macro_f1_pooled"]
  assert gain["interval"][0] > 0 and gain["share_of_draws_better"] == 1
  alone = step_evaluation.evaluate(items, better, bootstrap_draws=200)
  low, high = alone["thresholds"]["fixed_0.5"]["intervals"]["macro_f1_pooled"]
  assert gain["interval"][1] - gain["interval"][0] < 0.8 * (high - low)
  one, other = (
    step_evaluation.evaluate(items, run, bootstrap_draws=0)["thresholds"]["tuned_on_test"]
    for run in (better, scores)
  )
  tuned = report["tuned_on_test"]
  assert tuned["thresholds"] == [one["threshold"], other["threshold"]]
  assert tuned["accuracy"]["difference"] == one["accuracy"] - other["accuracy"]
  same = step_evaluation.compare(items, scores, scores, bootstrap_draws=50)
  assert same["threshold_free"]["roc_auc"]["difference"] == 0
  assert same["threshold_free"]["roc_auc"]["share_of_draws_better"] == 0.5
