"""Turns items and their scores into the content of evaluation.json, with bootstrap intervals."""

# Legend: I items, W rows of item weights: ones, then one row per bootstrap draw.

import dataclasses
from collections.abc import Sequence

import numpy as np

from bis_jax.evaluation import step_metrics
from bis_jax.evaluation.step_metrics import ScoredSteps

LEVEL = 0.95
ORIGINS = {
  "fixed_0.5": "fixed before any score was seen",
  "tuned_on_dev": "best overall_source_weighted on a held-out slice of the training corpus",
  "tuned_on_test": "best overall_source_weighted on this very benchmark (the released rule)",
}
# Draws whose step weights are held at once: 16 x 27,000 steps are 3.5 MB, which stays in cache.
_DRAW_CHUNK = 16


def evaluate(
  items: Sequence,
  scores: Sequence[np.ndarray],
  *,
  dev: ScoredSteps | None = None,
  tuned_on_dev: float | None = None,
  bootstrap_draws: int = 1000,
  seed: int = 0,
) -> dict:
  """Returns the content of evaluation.json; a metric that does not exist for the data is None.

  Args:
    items: have `.labels`, `.data_source` and `.policy_model` (`BenchmarkItem`s).
    scores: one probability per step of each item.
    dev: scored steps of held-out training rollouts for `tuned_on_dev`.
    tuned_on_dev: that threshold if it is known; not reported if it is neither.
    bootstrap_draws: draws of items for 95 % percentile intervals, thresholds held fixed; 0: none.
  """
  labels = [item.labels for item in items]
  steps = step_metrics.scored_steps(labels, scores, [item.data_source for item in items])
  thresholds = {"fixed_0.5": 0.5}
  if dev is not None:
    tuned_on_dev = step_metrics.tune_threshold(dev)
  if tuned_on_dev is not None:
    thresholds["tuned_on_dev"] = tuned_on_dev
  thresholds["tuned_on_test"] = step_metrics.tune_threshold(steps)

  weights = _item_weights(len(items), bootstrap_draws, seed)
  policies = np.array([item.policy_model for item in items], object)[steps.item]
  report = _measured(steps, weights, thresholds)
  for name, block in report["thresholds"].items():
    block |= {"origin": ORIGINS[name], "roc_auc": report["roc_auc"]}
  neutral = sum(label == 0 for item_labels in labels for label in item_labels)
  return {
    "benchmark": {**_sizes(steps), "items": len(items), "neutral_steps": neutral},
    **report,
    "reliability": _reliability_diagram(steps),
    "per_source": {
      name: _source_report(_subset(steps, steps.group == g), weights, thresholds)
      for g, name in enumerate(steps.group_names)
    },
    "per_policy_model": {
      policy: {**_sizes(part), **_measured(part, weights, thresholds)}
      for policy in dict.fromkeys(policies)
      for part in [_subset(steps, policies == policy)]
    },
    "bootstrap": {"draws": bootstrap_draws, "seed": seed, "level": LEVEL},
  }


def without_images(
  items: Sequence, scores: Sequence[np.ndarray], blank: Sequence[np.ndarray]
) -> dict:
  """Returns the thresholds' blocks of scores `blank`, for which all images were grey.

  `errors_lost` is the share of the errors caught by `scores`, at the threshold of that name for them,
  that `blank` does not catch with as many correct steps below its threshold; None if there are none.
  """
  labels, groups = [item.labels for item in items], [item.data_source for item in items]
  seen, blind = (step_metrics.scored_steps(labels, each, groups) for each in (scores, blank))
  blocks = evaluate(items, blank, bootstrap_draws=0)["thresholds"]
  for name, threshold in (("fixed_0.5", 0.5), ("tuned_on_test", step_metrics.tune_threshold(seen))):
    caught = (seen.labels == -1) & (seen.scores < threshold)
    correct = np.sort(blind.scores[seen.labels == 1])
    alarms = np.count_nonzero(seen.scores[seen.labels == 1] < threshold)
    lost = caught & (blind.scores >= np.append(correct, np.inf)[alarms])
    blocks[name]["errors_lost"] = float(lost.sum() / caught.sum()) if caught.any() else None
  return blocks


def compare(
  items: Sequence,
  scores: Sequence[np.ndarray],
  baseline: Sequence[np.ndarray],
  *,
  bootstrap_draws: int = 1000,
  seed: int = 0,
) -> dict:
  """Returns by how much `scores` exceed `baseline` in every metric, by a paired bootstrap.

  Each metric has {"difference", "interval", "share_of_draws_better"}; a tie is half a win. Brier
  score and ECE are better if lower, so their negative differences are good.
  """
  labels, groups = [item.labels for item in items], [item.data_source for item in items]
  runs = [step_metrics.scored_steps(labels, run, groups) for run in (scores, baseline)]
  weights = _item_weights(len(items), bootstrap_draws, seed)
  report = {}
  for name in ("fixed_0.5", "tuned_on_test"):
    cut = [0.5 if name == "fixed_0.5" else step_metrics.tune_threshold(run) for run in runs]
    measured = [threshold_measures(run, t, weights) for run, t in zip(runs, cut, strict=True)]
    report[name] = {"thresholds": cut, **_differences(*measured)}
  report["threshold_free"] = _differences(*[score_measures(run, weights) for run in runs])
  report["bootstrap"] = {"draws": bootstrap_draws, "seed": seed, "level": LEVEL}
  return report


def draw_items(n_items: int, draws: int, seed: int) -> np.ndarray:
  """Returns float64[draws, I]: how often each bootstrap sample has each item."""
  generator = np.random.default_rng(seed)
  return generator.multinomial(n_items, np.full(n_items, 1 / n_items), draws).astype(np.float64)


def interval(values: np.ndarray) -> list[float] | None:
  """Returns the [low, high] percentiles of the draws in which the metric exists."""
  defined = values[~np.isnan(values)]
  if not len(defined):
    return None
  return np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


def threshold_measures(
  steps: ScoredSteps, threshold: float, weights: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns every metric that needs a threshold, float64[W] by name; `weights` float64[W, I]."""
  counts = np.tensordot(weights, step_metrics.outcome_counts(steps, threshold), axes=1)
  first_errors = weights @ step_metrics.first_error_counts(steps, threshold)
  return step_metrics.overall_measures(counts) | step_metrics.first_error_measures(first_errors)


def score_measures(steps: ScoredSteps, weights: np.ndarray) -> dict[str, np.ndarray]:
  """Returns the metrics without threshold, float64[W] by name; `weights` float64[W, I]."""
  roc_auc, precision = np.empty(len(weights)), np.empty(len(weights))
  for start in range(0, len(weights), _DRAW_CHUNK):
    chunk = slice(start, start + _DRAW_CHUNK)
    tied = step_metrics.tied_counts(steps.labels, steps.scores, weights[chunk][:, steps.item])
    roc_auc[chunk] = step_metrics.roc_auc(*tied)
    precision[chunk] = step_metrics.average_precision_error(*tied)
  sums = np.tensordot(weights, step_metrics.calibration_sums(steps), axes=1)
  ranking = {"roc_auc": roc_auc, "average_precision_error": precision}
  return ranking | step_metrics.calibration_measures(sums)


def _item_weights(n_items: int, draws: int, seed: int) -> np.ndarray:
  return np.concatenate([np.ones((1, n_items)), draw_items(n_items, draws, seed)])


def _reliability_diagram(steps: ScoredSteps) -> list[dict]:
  bins = step_metrics.ECE_BINS
  sums = step_metrics.calibration_sums(steps).sum(0).tolist()
  return [
    {
      "low": b / bins,
      "high": (b + 1) / bins,
      "steps": int(count),
      "mean_score": score_sum / count if count else None,
      "share_correct": correct / count if count else None,
    }
    for b, (count, score_sum, correct, _) in enumerate(sums)
  ]


def _measured(
  steps: ScoredSteps, weights: np.ndarray, thresholds: dict[str, float], *, one_source: bool = False
) -> dict:
  # `thresholds` are {name: threshold}; all metrics have intervals.
  blocks = {}
  for name, threshold in thresholds.items():
    measures = threshold_measures(steps, threshold, weights)
    if one_source:  # then the three kinds of overall macro-F1 are the same
      measures["macro_f1"] = measures.pop("macro_f1_pooled")
      del measures["overall_source_weighted"], measures["macro_f1_source_mean"]
    blocks[name] = {"threshold": threshold, **_with_intervals(measures)}
  return {"thresholds": blocks, **_with_intervals(score_measures(steps, weights))}


def _source_report(steps: ScoredSteps, weights: np.ndarray, thresholds: dict[str, float]) -> dict:
  sizes = _sizes(steps)
  majority = max(sizes["correct_steps"], sizes["error_steps"])
  return {
    **sizes,
    # Always calling the majority class: its F1 is 2 m / (m + n), that of the other class is 0.
    "constant_macro_f1": majority / (majority + sizes["steps"]),
    **_measured(steps, weights, thresholds, one_source=True),
  }


def _sizes(steps: ScoredSteps) -> dict[str, int]:
  correct = int((steps.labels == 1).sum())
  return {
    "items": len(np.unique(steps.item)),
    "steps": len(steps.labels),
    "correct_steps": correct,
    "error_steps": len(steps.labels) - correct,
  }


def _subset(steps: ScoredSteps, kept: np.ndarray) -> ScoredSteps:
  per_step = {name: getattr(steps, name)[kept] for name in ("labels", "scores", "item", "group")}
  return dataclasses.replace(steps, **per_step)


def _with_intervals(measures: dict[str, np.ndarray]) -> dict:
  report: dict = {name: _number(values[0]) for name, values in measures.items()}
  if len(next(iter(measures.values()))) > 1:
    report["intervals"] = {name: interval(values[1:]) for name, values in measures.items()}
  return report


def _differences(ours: dict[str, np.ndarray], baseline: dict[str, np.ndarray]) -> dict:
  report = {}
  for name in ours:
    difference = ours[name] - baseline[name]
    drawn = difference[1:][~np.isnan(difference[1:])]
    report[name] = {
      "difference": _number(difference[0]),
      "interval": interval(drawn),
      "share_of_draws_better": float(np.mean((np.sign(drawn) + 1) / 2)) if len(drawn) else None,
    }
  return report


def _number(value: np.ndarray) -> float | None:
  return None if np.isnan(value) else float(value)
