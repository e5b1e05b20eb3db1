"""Turns items and their scores into the content of evaluation.json, with bootstrap intervals.

    {"benchmark": {"items", "steps", "correct_steps", "error_steps", "neutral_steps"},
     "thresholds": {"fixed_0.5": {"threshold": 0.5, "origin": "...", <threshold measures>,
                                  "roc_auc": ..., "intervals": {<measure>: [low, high]}},
                    "tuned_on_dev": {...}, "tuned_on_test": {...}},
     "roc_auc", "average_precision_error", "brier", "ece", "intervals": {...},
     "reliability": [{"low", "high", "steps", "mean_score", "share_correct"}, ...],
     "per_source": {"MMMU": {"items", "steps", ..., "constant_macro_f1", <score measures>,
                             "thresholds": {"fixed_0.5": {"macro_f1", "f1_correct", ...}}}},
     "per_policy_model": {...}, "bootstrap": {"draws", "seed", "level"}}

The threshold measures are those of `step_metrics.overall_measures` and `first_error_measures`.
`roc_auc` knows no threshold; each threshold's block repeats it so that a block stands alone. A
measure that doesn't exist for the data is null.
"""

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
_SINGLE_SOURCE = ("macro_f1_pooled", "accuracy", "f1_correct", "f1_error")
# Draws whose step weights are held at once: 16 x 27,000 steps are 3.5 MB, which stays in cache.
_DRAW_CHUNK = 16


def evaluate(
  items: Sequence,
  scores: Sequence[np.ndarray],
  *,
  dev: ScoredSteps | None = None,
  bootstrap_draws: int = 1000,
  seed: int = 0,
) -> dict:
  """Returns the content of evaluation.json (module docstring), made of plain JSON values.

  `items` have `.labels`, `.data_source` and `.policy_model` (`BenchmarkItem`s); `scores` holds for
  each item, in the same order, one probability a step. `dev` are scored steps of held-out training
  rollouts: with them `tuned_on_dev` is reported too. Intervals are 95 % percentile bootstraps over
  items with every threshold held where it is; `bootstrap_draws=0` leaves them out. Raises
  ValueError, with the item's index, where scores and labels don't match.
  """
  labels = [item.labels for item in items]
  steps = step_metrics.scored_steps(labels, scores, [item.data_source for item in items])
  thresholds = {"fixed_0.5": 0.5}
  if dev is not None:
    thresholds["tuned_on_dev"] = step_metrics.tune_threshold(dev)
  thresholds["tuned_on_test"] = step_metrics.tune_threshold(steps)

  draws = draw_items(len(items), bootstrap_draws, seed)
  policies = np.array([item.policy_model for item in items], object)[steps.item]
  report = _measured(steps, draws, thresholds)
  for name, block in report["thresholds"].items():
    block["origin"] = ORIGINS[name]
    block["roc_auc"] = report["roc_auc"]
  neutral = sum(label == 0 for item_labels in labels for label in item_labels)
  return {
    "benchmark": {**_sizes(steps), "items": len(items), "neutral_steps": neutral},
    **report,
    "reliability": reliability(steps),
    "per_source": {
      name: _source_report(_subset(steps, steps.group == g), draws, thresholds)
      for g, name in enumerate(steps.group_names)
    },
    "per_policy_model": {
      policy: {**_sizes(part), **_measured(part, draws, thresholds)}
      for policy in dict.fromkeys(policies)
      for part in [_subset(steps, policies == policy)]
    },
    "bootstrap": {"draws": bootstrap_draws, "seed": seed, "level": LEVEL},
  }


def compare(
  items: Sequence,
  scores: Sequence[np.ndarray],
  baseline: Sequence[np.ndarray],
  *,
  bootstrap_draws: int = 1000,
  seed: int = 0,
) -> dict:
  """Returns how much better `scores` are than `baseline` on the same items, measure by measure.

  Paired bootstrap: both runs are measured on the same drawn items. For the thresholds `fixed_0.5`
  and `tuned_on_test` (each run's own), and for the measures without threshold under
  `threshold_free`: {"difference", "interval": [low, high], "share_of_draws_better"}, where a tie
  is half a win. For Brier score and ECE lower is better, and a negative difference good.
  """
  labels, groups = [item.labels for item in items], [item.data_source for item in items]
  runs = [step_metrics.scored_steps(labels, run, groups) for run in (scores, baseline)]
  draws = draw_items(len(items), bootstrap_draws, seed)
  everything = np.ones(len(items))
  report = {}
  for name in ("fixed_0.5", "tuned_on_test"):
    cut = [0.5 if name == "fixed_0.5" else step_metrics.tune_threshold(run) for run in runs]
    pairs = zip(runs, cut, strict=True)
    on_all, on_draws = zip(
      *[(threshold_measures(r, t, everything), threshold_measures(r, t, draws)) for r, t in pairs],
      strict=True,
    )
    report[name] = {"thresholds": cut, **_differences(on_all, on_draws)}
  on_all = [score_measures(run, everything) for run in runs]
  report["threshold_free"] = _differences(on_all, [score_measures(run, draws) for run in runs])
  report["bootstrap"] = {"draws": bootstrap_draws, "seed": seed, "level": LEVEL}
  return report


def draw_items(n_items: int, draws: int, seed: int) -> np.ndarray:
  """Returns float64[draws, n_items]: how often each of `draws` bootstrap samples has each item."""
  generator = np.random.default_rng(seed)
  return generator.multinomial(n_items, np.full(n_items, 1 / n_items), draws).astype(np.float64)


def threshold_measures(
  steps: ScoredSteps, threshold: float, item_weights: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns every measure that needs a threshold, by name, with the leading axes of the weights.

  `item_weights` float64[..., I] counts each item that often: ones for the measure itself, a row of
  `draw_items` for a bootstrap sample.
  """
  items, starts = np.unique(steps.item, return_index=True)
  weights = item_weights[..., items]
  counts = np.zeros((len(items), len(steps.group_names), 4))
  if len(items):
    by_item = np.add.reduceat(step_metrics.step_counts(steps, threshold), starts)
    counts[np.arange(len(items)), steps.group[starts]] = by_item
  summed = np.tensordot(weights, counts, axes=1)
  first_errors = weights @ step_metrics.first_error_counts(steps, threshold).astype(np.float64)
  return {
    **step_metrics.overall_measures(summed),
    **step_metrics.first_error_measures(first_errors),
  }


def score_measures(steps: ScoredSteps, item_weights: np.ndarray) -> dict[str, np.ndarray]:
  """Returns ROC-AUC, average precision of errors, Brier score and ECE, by name; NaN if undefined.

  `item_weights` float64[..., I] as in `threshold_measures`.
  """
  weights = item_weights.reshape(-1, item_weights.shape[-1])
  ranking = np.empty((len(weights), 2))
  for start in range(0, len(weights), _DRAW_CHUNK):
    chunk = slice(start, start + _DRAW_CHUNK)
    tied = step_metrics.tied_counts(steps.labels, steps.scores, weights[chunk][:, steps.item])
    ranking[chunk, 0] = step_metrics.roc_auc(*tied)
    ranking[chunk, 1] = step_metrics.average_precision_error(*tied)
  bins = step_metrics.calibration_sums(steps)
  items, starts = np.unique(steps.item, return_index=True)
  by_item = np.add.reduceat(bins, starts) if len(items) else bins
  sums = np.tensordot(weights[:, items], by_item, axes=1)
  measures = {
    "roc_auc": ranking[:, 0],
    "average_precision_error": ranking[:, 1],
    **step_metrics.calibration_measures(sums),
  }
  return {name: value.reshape(item_weights.shape[:-1]) for name, value in measures.items()}


def reliability(steps: ScoredSteps) -> list[dict]:
  """Returns the bars of the reliability diagram: one a bin of scores, empty bins with nulls."""
  sums = step_metrics.calibration_sums(steps).sum(0)
  bins = []
  for b, (count, score_sum, correct, _) in enumerate(sums.tolist()):
    bins.append(
      {
        "low": b / step_metrics.ECE_BINS,
        "high": (b + 1) / step_metrics.ECE_BINS,
        "steps": int(count),
        "mean_score": score_sum / count if count else None,
        "share_correct": correct / count if count else None,
      }
    )
  return bins


def _measured(steps: ScoredSteps, draws: np.ndarray, thresholds: dict[str, float]) -> dict:
  """Returns the `thresholds` block and the threshold-free measures, each with its intervals."""
  everything = np.ones(draws.shape[-1])
  blocks = {}
  for name, threshold in thresholds.items():
    on_all = threshold_measures(steps, threshold, everything)
    on_draws = threshold_measures(steps, threshold, draws)
    blocks[name] = {"threshold": threshold, **_with_intervals(on_all, on_draws)}
  free = _with_intervals(score_measures(steps, everything), score_measures(steps, draws))
  return {"thresholds": blocks, **free}


def _source_report(steps: ScoredSteps, draws: np.ndarray, thresholds: dict[str, float]) -> dict:
  """Returns one source's block: there the four overall measures are one, `macro_f1`."""
  report = _measured(steps, draws, thresholds)
  for block in report["thresholds"].values():
    for part in (block, block.get("intervals", {})):
      if part:
        part["macro_f1"] = part.pop("macro_f1_pooled")
        for name in ("overall_source_weighted", "macro_f1_source_mean"):
          del part[name]
  majority = int((steps.labels == 1).sum() * 2 >= len(steps.labels)) * 1.0
  constant = dataclasses.replace(steps, scores=np.full(len(steps.labels), majority))
  constant_macro_f1 = step_metrics.macro_f1(step_metrics.group_counts(constant, 0.5).sum(0))[0]
  return {**_sizes(steps), "constant_macro_f1": float(constant_macro_f1), **report}


def _sizes(steps: ScoredSteps) -> dict[str, int]:
  correct = int((steps.labels == 1).sum())
  return {
    "items": len(np.unique(steps.item)),
    "steps": len(steps.labels),
    "correct_steps": correct,
    "error_steps": len(steps.labels) - correct,
  }


def _subset(steps: ScoredSteps, kept: np.ndarray) -> ScoredSteps:
  return dataclasses.replace(
    steps,
    labels=steps.labels[kept],
    scores=steps.scores[kept],
    item=steps.item[kept],
    group=steps.group[kept],
  )


def _with_intervals(on_all: dict[str, np.ndarray], on_draws: dict[str, np.ndarray]) -> dict:
  measures = {name: _number(value) for name, value in on_all.items()}
  if len(next(iter(on_draws.values()))):
    measures["intervals"] = {name: _interval(values) for name, values in on_draws.items()}
  return measures


def _differences(on_all: Sequence[dict], on_draws: Sequence[dict]) -> dict:
  report = {}
  for name, value in on_all[0].items():
    drawn = on_draws[0][name] - on_draws[1][name]
    defined = drawn[~np.isnan(drawn)]
    report[name] = {
      "difference": _number(value - on_all[1][name]),
      "interval": _interval(drawn),
      "share_of_draws_better": _number(np.mean((np.sign(defined) + 1) / 2))
      if len(defined)
      else None,
    }
  return report


def _interval(values: np.ndarray) -> list[float] | None:
  """Returns the [low, high] percentiles of the draws in which the measure exists."""
  defined = values[~np.isnan(values)]
  if not len(defined):
    return None
  return [float(x) for x in np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def _number(value: np.ndarray) -> float | None:
  return None if np.isnan(value) else float(value)
