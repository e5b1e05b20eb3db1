"""The metrics of a step reward model on human-labelled steps, as pure float64 NumPy functions.

Labels are 1 (correct) and -1 (erroneous); 0 (neutral) is left out of every metric. A score is the
probability that a step is correct, and s >= t calls it correct. F1+ and F1- are the F1 of the
correct and of the erroneous class, macro-F1 is their mean. All metrics are in [0, 1].

  overall_source_weighted  mean of the sources' macro-F1, weighted by steps (the paper's "micro-F1")
  macro_f1_pooled          macro-F1 over all steps
  macro_f1_source_mean     unweighted mean of the sources' macro-F1
  accuracy                 share of steps called right (the true micro-F1)

The F1 of an absent class is 0. Metrics that do not exist for the data (ROC-AUC with one class) are
NaN. Counts may have leading axes, so that one function serves a single evaluation, a sweep of
thresholds and the draws of a bootstrap.

Legend: S labelled steps, G sources (or other groups), U distinct scores.
"""

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
  """The labelled (non-neutral) steps of a benchmark, flat and sorted by item.

  Example: two items of sources "A" and "B", labels (1, 0, -1) and (1,):
    labels [1, -1, 1]   scores [.9, .2, .7]   item [0, 0, 1]   group [0, 0, 1]

  `labels` int8[S]; `scores` float64[S] in [0, 1]; `item` int64[S], the item of the step;
  `group` int64[S], index into `group_names`, which are in order of first appearance among
  the labelled steps (the order in which the released evaluation adds sources up).
  """

  labels: np.ndarray
  scores: np.ndarray
  item: np.ndarray
  group: np.ndarray
  group_names: tuple[str, ...]


def scored_steps(
  labels: Sequence[Sequence[int]], scores: Sequence[np.ndarray], groups: Sequence[str]
) -> ScoredSteps:
  """Returns the labelled steps of items given as lists with one entry per item.

  Raises:
    ValueError: names the item whose labels and scores differ in number, or whose score is not a
      number in [0, 1].
  """
  if not len(labels) == len(scores) == len(groups):
    raise ValueError(
      f"{len(labels)} items but {len(scores)} score arrays and {len(groups)} groups: give one each"
    )
  for i, (item_labels, item_scores) in enumerate(zip(labels, scores, strict=True)):
    if np.shape(item_scores) != (len(item_labels),):
      raise ValueError(
        f"item {i} has {len(item_labels)} labelled steps but scores of shape "
        f"{np.shape(item_scores)}: score every step of the item once"
      )
  flat_labels = np.array([label for item_labels in labels for label in item_labels], np.int8)
  flat_scores = np.concatenate([np.zeros(0), *scores])
  item = np.repeat(np.arange(len(labels)), list(map(len, labels)))
  bad = np.flatnonzero(~((flat_scores >= 0) & (flat_scores <= 1)))
  if len(bad):
    raise ValueError(
      f"item {item[bad[0]]} has the score {flat_scores[bad[0]]}: scores are probabilities in [0, 1]"
    )
  labelled = flat_labels != 0
  item = item[labelled]
  group_of = {}
  group = np.array([group_of.setdefault(groups[i], len(group_of)) for i in item], np.int64)
  return ScoredSteps(flat_labels[labelled], flat_scores[labelled], item, group, tuple(group_of))


def macro_f1(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns (macro-F1, F1+, F1-) of counts[..., 4]; F1 is 2 TP / (2 TP + FP + FN)."""
  tp, fp, fn, tn = np.moveaxis(counts, -1, 0)
  f1_correct = _ratio(2 * tp, 2 * tp + fp + fn)
  f1_error = _ratio(2 * tn, 2 * tn + fn + fp)
  return (f1_correct + f1_error) / 2, f1_correct, f1_error


def overall_measures(group_counts: np.ndarray) -> dict[str, np.ndarray]:
  """Returns the four overall metrics, F1+ and F1- of counts[..., G, 4], by name.

  The weighted sum runs over the sources in order, one after the other, so that it is the released
  evaluation's number to the last bit.
  """
  pooled, f1_correct, f1_error = macro_f1(group_counts.sum(-2))
  by_group = macro_f1(group_counts)[0]
  steps = group_counts.sum(-1)
  weighted_sum = np.zeros(steps.shape[:-1])
  for g in range(steps.shape[-1]):
    weighted_sum = weighted_sum + by_group[..., g] * steps[..., g]
  total = steps.sum(-1)
  right = group_counts[..., TRUE_POSITIVE] + group_counts[..., TRUE_NEGATIVE]
  return {
    "overall_source_weighted": _ratio(weighted_sum, total),
    "macro_f1_pooled": pooled,
    "macro_f1_source_mean": _ratio(by_group.sum(-1), (steps > 0).sum(-1)),
    "accuracy": _ratio(right.sum(-1), total),
    "f1_correct": f1_correct,
    "f1_error": f1_error,
  }


def step_counts(steps: ScoredSteps, threshold: float) -> np.ndarray:
  """Returns int64[S, 4]: for each step a one in the column of its outcome at `threshold`."""
  called_correct, correct = steps.scores >= threshold, steps.labels == 1
  outcomes = (
    correct & called_correct,
    ~correct & called_correct,
    correct & ~called_correct,
    ~correct & ~called_correct,
  )
  return np.stack(outcomes, axis=-1).astype(np.int64)


def first_error_counts(steps: ScoredSteps, threshold: float) -> np.ndarray:
  """Returns int64[items with a labelled step, 4], sorted by item: ProcessBench's outcomes.

  Columns: has an error; and its first erroneous step is the first one scored below `threshold`;
  has no error; and no step is scored below. Neutral steps are skipped on both sides.
  """
  starts = np.flatnonzero(np.diff(steps.item, prepend=-1))
  nowhere = len(steps.item)
  position = np.arange(nowhere)
  truth = np.minimum.reduceat(np.where(steps.labels == -1, position, nowhere), starts)
  called = np.minimum.reduceat(np.where(steps.scores < threshold, position, nowhere), starts)
  has_error, agree = truth < nowhere, truth == called
  columns = (has_error, has_error & agree, ~has_error, ~has_error & agree)
  return np.stack(columns, axis=-1).astype(np.int64)


def first_error_measures(counts: np.ndarray) -> dict[str, np.ndarray]:
  """Returns ProcessBench's metrics of counts[..., 4] summed over items (arXiv:2412.06559).

  The F1 is the harmonic mean of the accuracy on items with an error (exact first step) and the
  accuracy on items without; an accuracy over no item is 0.
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
  """Returns P(a correct step outscores an erroneous one), ties half, of `tied_counts`.

  NaN if either class is absent.
  """
  below = np.cumsum(erroneous, axis=-1) - erroneous
  wins = (correct * (below + erroneous / 2)).sum(-1)
  return _ratio(wins, correct.sum(-1) * erroneous.sum(-1), empty=np.nan)


def average_precision_error(correct: np.ndarray, erroneous: np.ndarray) -> np.ndarray:
  """Returns the average precision of finding erroneous steps by low score, of `tied_counts`.

  The sum over increasing distinct scores of precision times gained recall (scikit-learn's
  definition). NaN if no step is erroneous.
  """
  found, flagged = np.cumsum(erroneous, axis=-1), np.cumsum(correct + erroneous, axis=-1)
  precision_gain = (_ratio(found, flagged) * erroneous).sum(-1)
  return _ratio(precision_gain, erroneous.sum(-1), empty=np.nan)


def calibration_sums(steps: ScoredSteps) -> np.ndarray:
  """Returns float64[S, ECE_BINS, 4]: (1, score, is correct, squared error) in the step's bin.

  Bin b of ECE_BINS holds the scores in [b / ECE_BINS, (b + 1) / ECE_BINS), the last one 1 too.
  """
  edges = np.arange(1, ECE_BINS) / ECE_BINS
  bins = np.searchsorted(edges, steps.scores, side="right")
  correct = (steps.labels == 1).astype(np.float64)
  values = (np.ones(len(correct)), steps.scores, correct, (steps.scores - correct) ** 2)
  sums = np.zeros((len(correct), ECE_BINS, 4))
  sums[np.arange(len(correct)), bins] = np.stack(values, axis=-1)
  return sums


def calibration_measures(sums: np.ndarray) -> dict[str, np.ndarray]:
  """Returns Brier score and expected calibration error of sums[..., ECE_BINS, 4] over steps.

  Brier: mean of (score - [correct])^2. ECE: step-weighted mean over bins of the gap between mean
  score and share of correct steps (arXiv:1706.04599, for the probability of "correct"). NaN
  without steps.
  """
  steps, scores, correct, squares = np.moveaxis(sums, -1, 0)
  total = steps.sum(-1)
  return {
    "brier": _ratio(squares.sum(-1), total, empty=np.nan),
    "ece": _ratio(np.abs(scores - correct).sum(-1), total, empty=np.nan),
  }


def candidate_thresholds(scores: np.ndarray) -> np.ndarray:
  """Returns the thresholds that the released evaluation tries, increasing.

  The distinct scores rounded to 4 decimal places (correctly rounded, as Python's `round`); of
  more than 1000, every (number // 1000)-th from the lowest, so at most 1999 remain.
  """
  rounded = sorted({round(float(score), 4) for score in scores})
  return np.array(rounded[:: max(1, len(rounded) // 1000)], np.float64)


def tune_threshold(steps: ScoredSteps) -> float:
  """Returns the lowest candidate with the best `overall_source_weighted`, the released rule.

  0.5 if there is no labelled step.
  """
  candidates = candidate_thresholds(steps.scores)
  if not len(candidates):
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
  """Returns numerator / denominator, and `empty` if the denominator is 0."""
  numerator, denominator = np.broadcast_arrays(numerator, denominator)
  out = np.full(numerator.shape, empty, np.float64)
  return np.divide(numerator, denominator, out=out, where=denominator != 0)
