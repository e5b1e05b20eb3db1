"""The metrics of a step reward model on human-labelled steps, as pure float64 NumPy functions.

Labels are 1 (correct) and -1 (erroneous); 0 (neutral) is left out of every metric. A score is the
probability that a step is correct, and s >= t calls it correct. Every metric is in [0, 1], or NaN
if it does not exist for the data. Counts may have leading axes: thresholds, or bootstrap draws.
"""

# Legend: I items, S labelled steps, G sources (or other groups), U distinct scores.

import dataclasses
from collections.abc import Sequence

import numpy as np

ECE_BINS = 10
# Columns of every array of counts; the positive class is "correct".
TRUE_POSITIVE, FALSE_POSITIVE, FALSE_NEGATIVE, TRUE_NEGATIVE = range(4)
# Columns of every array of first-error counts.
ERROR_ITEMS, ERROR_FOUND, CLEAN_ITEMS, CLEAN_FOUND = range(4)


@dataclasses.dataclass(frozen=True)
class ScoredSteps:
  """The labelled (non-neutral) steps of a benchmark, flat and sorted by item."""

  # Example: two items of sources "A" and "B" with the labels (1, 0, -1) and (1,).
  labels: np.ndarray  # int8[S]                        [1, -1, 1]
  scores: np.ndarray  # float64[S] in [0, 1]           [0.9, 0.2, 0.7]
  item: np.ndarray  # int64[S], number of the item     [0, 0, 1]
  group: np.ndarray  # int64[S], into group_names      [0, 0, 1]
  # In order of first labelled step, in which the released evaluation adds sources up.
  group_names: tuple[str, ...]
  n_items: int


def scored_steps(
  labels: Sequence[Sequence[int]], scores: Sequence[np.ndarray], groups: Sequence[str]
) -> ScoredSteps:
  """Returns the labelled steps of items, given as one entry per item; raises ValueError.

  The message names the item whose labels and scores do not fit or whose score is not in [0, 1].
  """
  if not len(labels) == len(scores) == len(groups):
    raise ValueError(
      f"{len(labels)} items but {len(scores)} score arrays and {len(groups)} groups: give one each"
    )
  n = len(labels)
  for i, (item_labels, item_scores) in enumerate(zip(labels, scores, strict=True)):
    if np.shape(item_scores) != (len(item_labels),):
      raise ValueError(
        f"item {i} has {len(item_labels)} labelled steps but scores of shape "
        f"{np.shape(item_scores)}: score every step of the item once"
      )
  flat_labels = np.array([label for item_labels in labels for label in item_labels], np.int8)
  flat_scores = np.concatenate([np.zeros(0), *scores])
  item = np.repeat(np.arange(n), list(map(len, labels)))
  bad = np.flatnonzero(~((flat_scores >= 0) & (flat_scores <= 1)))
  if len(bad):
    raise ValueError(
      f"item {item[bad[0]]} has the score {flat_scores[bad[0]]}: scores are probabilities in [0, 1]"
    )
  labelled = flat_labels != 0
  item = item[labelled]
  group_of = {}
  group = np.array([group_of.setdefault(groups[i], len(group_of)) for i in item], np.int64)
  return ScoredSteps(flat_labels[labelled], flat_scores[labelled], item, group, tuple(group_of), n)


def macro_f1(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns (macro-F1, F1 of the correct class, F1 of the erroneous class) of counts[..., 4].

  F1 is 2 TP / (2 TP + FP + FN), 0 for an absent class; macro-F1 is the mean of both.
  """
  tp, fp, fn, tn = np.moveaxis(counts, -1, 0)
  f1_correct = _ratio(2 * tp, 2 * tp + fp + fn)
  f1_error = _ratio(2 * tn, 2 * tn + fn + fp)
  return (f1_correct + f1_error) / 2, f1_correct, f1_error


def overall_measures(group_counts: np.ndarray) -> dict[str, np.ndarray]:
  """Returns the metrics that the literature calls "overall", by name, of counts[..., G, 4]."""
  pooled, f1_correct, f1_error = macro_f1(group_counts.sum(-2))
  by_group = macro_f1(group_counts)[0]
  steps = group_counts.sum(-1)
  total = steps.sum(-1)
  weighted_sum = np.zeros(total.shape)
  for g in range(steps.shape[-1]):  # in this order, to be the released number to the last bit
    weighted_sum = weighted_sum + by_group[..., g] * steps[..., g]
  right = group_counts[..., TRUE_POSITIVE] + group_counts[..., TRUE_NEGATIVE]
  return {
    # Macro-F1 of each source, averaged with its steps as weight: the paper's "micro-F1".
    "overall_source_weighted": _ratio(weighted_sum, total),
    # Macro-F1 over all steps.
    "macro_f1_pooled": pooled,
    # Unweighted mean of the sources' macro-F1.
    "macro_f1_source_mean": _ratio(by_group.sum(-1), (steps > 0).sum(-1)),
    # Share of steps called right: the true micro-F1.
    "accuracy": _ratio(right.sum(-1), total),
    "f1_correct": f1_correct,
    "f1_error": f1_error,
  }


def outcome_counts(steps: ScoredSteps, threshold: float) -> np.ndarray:
  """Returns float64[I, G, 4]: true/false positives and false/true negatives of each item."""
  correct, called_correct = steps.labels == 1, steps.scores >= threshold
  positive = np.where(correct, TRUE_POSITIVE, FALSE_POSITIVE)
  negative = np.where(correct, FALSE_NEGATIVE, TRUE_NEGATIVE)
  counts = np.zeros((steps.n_items, len(steps.group_names), 4))
  np.add.at(counts, (steps.item, steps.group, np.where(called_correct, positive, negative)), 1)
  return counts


def first_error_counts(steps: ScoredSteps, threshold: float) -> np.ndarray:
  """Returns float64[I, 4], ProcessBench's outcomes; 0 for an item without a labelled step.

  Columns: has an error; and its first erroneous step is the first one scored below `threshold`;
  has no error; and no step is scored below. Neutral steps are skipped on both sides.
  """
  items, starts = np.unique(steps.item, return_index=True)
  nowhere = len(steps.item)
  position = np.arange(nowhere)
  truth = np.minimum.reduceat(np.where(steps.labels == -1, position, nowhere), starts)
  called = np.minimum.reduceat(np.where(steps.scores < threshold, position, nowhere), starts)
  has_error, agree = truth < nowhere, truth == called
  counts = np.zeros((steps.n_items, 4))
  counts[items] = np.stack([has_error, has_error & agree, ~has_error, ~has_error & agree], axis=-1)
  return counts


def first_error_measures(counts: np.ndarray) -> dict[str, np.ndarray]:
  """Returns ProcessBench's metrics of counts[..., 4] summed over items (arXiv:2412.06559).

  F1 is the harmonic mean of the accuracies on items with an error (exact first step) and without.
  """
  on_error = _ratio(counts[..., ERROR_FOUND], counts[..., ERROR_ITEMS])
  on_clean = _ratio(counts[..., CLEAN_FOUND], counts[..., CLEAN_ITEMS])
  return {
    "first_error_f1": _ratio(2 * on_error * on_clean, on_error + on_clean),
    "first_error_accuracy_on_error": on_error,
    "first_error_accuracy_on_clean": on_clean,
  }


def tied_counts(
  labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (correct, erroneous) float64[..., U]: step counts at each distinct score, increasing.

  `weights` float64[..., S] counts each step that often (the draws of a bootstrap).
  """
  order = np.argsort(scores, kind="stable")
  starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
  ordered = np.ones(len(scores)) if weights is None else weights[..., order]
  correct = labels[order] == 1
  return (
    np.add.reduceat(ordered * correct, starts, axis=-1),
    np.add.reduceat(ordered * ~correct, starts, axis=-1),
  )


def roc_auc(correct: np.ndarray, erroneous: np.ndarray) -> np.ndarray:
  """Returns P(a correct step outscores an erroneous one), ties half, of `tied_counts`."""
  below = np.cumsum(erroneous, axis=-1) - erroneous
  wins = (correct * (below + erroneous / 2)).sum(-1)
  return _ratio(wins, correct.sum(-1) * erroneous.sum(-1), empty=np.nan)


def average_precision_error(correct: np.ndarray, erroneous: np.ndarray) -> np.ndarray:
  """Returns the average precision of finding erroneous steps by low score, of `tied_counts`.

  Precision times gained recall, summed over increasing scores (scikit-learn's definition).
  """
  found, flagged = np.cumsum(erroneous, axis=-1), np.cumsum(correct + erroneous, axis=-1)
  precision_gain = (_ratio(found, flagged) * erroneous).sum(-1)
  return _ratio(precision_gain, erroneous.sum(-1), empty=np.nan)


def calibration_sums(steps: ScoredSteps) -> np.ndarray:
  """Returns float64[I, ECE_BINS, 4]: sums of (1, score, is correct, squared error) per bin.

  Bin b holds the scores in [b / ECE_BINS, (b + 1) / ECE_BINS), the last one also 1.
  """
  edges = np.arange(1, ECE_BINS) / ECE_BINS
  bins = np.searchsorted(edges, steps.scores, side="right")
  correct = (steps.labels == 1).astype(np.float64)
  values = (np.ones(len(correct)), steps.scores, correct, (steps.scores - correct) ** 2)
  sums = np.zeros((steps.n_items, ECE_BINS, 4))
  np.add.at(sums, (steps.item, bins), np.stack(values, axis=-1))
  return sums


def calibration_measures(sums: np.ndarray) -> dict[str, np.ndarray]:
  """Returns Brier score and expected calibration error of sums[..., ECE_BINS, 4] over items.

  Brier: mean of (score - [correct])^2. ECE: step-weighted mean over bins of the gap between mean
  score and share of correct steps (arXiv:1706.04599, for the probability of "correct").
  """
  steps, scores, correct, squares = np.moveaxis(sums, -1, 0)
  total = steps.sum(-1)
  return {
    "brier": _ratio(squares.sum(-1), total, empty=np.nan),
    "ece": _ratio(np.abs(scores - correct).sum(-1), total, empty=np.nan),
  }


def candidate_thresholds(scores: np.ndarray) -> np.ndarray:
  """Returns the thresholds that the released evaluation tries, increasing, at most 1999."""
  # Correctly rounded, as Python's `round`; thinned by a constant stride from the lowest.
  rounded = sorted({round(float(score), 4) for score in scores})
  return np.array(rounded[:: max(1, len(rounded) // 1000)], np.float64)


def tune_threshold(steps: ScoredSteps) -> float:
  """Returns the lowest candidate with the best `overall_source_weighted`: the released rule."""
  candidates = candidate_thresholds(steps.scores)
  if not len(candidates):  # no labelled step
    return 0.5
  counts = np.empty((len(candidates), len(steps.group_names), 4), np.int64)
  for g in range(len(steps.group_names)):
    correct = np.sort(steps.scores[(steps.group == g) & (steps.labels == 1)])
    erroneous = np.sort(steps.scores[(steps.group == g) & (steps.labels == -1)])
    counts[:, g, FALSE_NEGATIVE] = np.searchsorted(correct, candidates, side="left")
    counts[:, g, TRUE_NEGATIVE] = np.searchsorted(erroneous, candidates, side="left")
    counts[:, g, TRUE_POSITIVE] = len(correct) - counts[:, g, FALSE_NEGATIVE]
    counts[:, g, FALSE_POSITIVE] = len(erroneous) - counts[:, g, TRUE_NEGATIVE]
  return float(candidates[np.argmax(overall_measures(counts)["overall_source_weighted"])])


def _ratio(numerator: np.ndarray, denominator: np.ndarray, empty: float = 0.0) -> np.ndarray:
  numerator, denominator = np.broadcast_arrays(numerator, denominator)
  out = np.full(numerator.shape, empty, np.float64)
  return np.divide(numerator, denominator, out=out, where=denominator != 0)
