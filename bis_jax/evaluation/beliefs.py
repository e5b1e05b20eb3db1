"""Best-of-N with step scores and their concentrations: lower bounds, and stopping early.

A step's score mu and concentration kappa are a Beta belief in its MC score, with variance
mu (1 - mu) / (kappa + 1). A candidate's lower bound is the least of its steps' mu minus one standard
deviation: a high score counts only as far as it is reliable. Adaptive stopping looks at the
candidates in the order in which they were sampled, and samples no other once one has a lower bound
above a threshold. Source of the idea: arXiv 2605.15529, whose allocation also samples on from
uncertain prefixes, which takes a policy.
"""

from collections.abc import Sequence

import numpy as np

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_Steps = Sequence[Sequence[np.ndarray | None]]  # of Q questions, N candidates each


def lower_bounds(scores: _Steps, concentrations: _Steps) -> np.ndarray:
  """Returns float64[Q, N], the lower bound of each candidate, NaN if it is missing."""
  return np.array(
    [
      [
        np.nan if mu is None or kappa is None else _lower(mu, kappa)
        for mu, kappa in zip(*row, strict=True)
      ]
      for row in zip(scores, concentrations, strict=True)
    ]
  )


def _lower(mu: np.ndarray, kappa: np.ndarray) -> float:
  return float(np.min(np.maximum(mu - np.sqrt(mu * (1 - mu) / (kappa + 1)), 0.0)))


def weighted_means(scores: _Steps, concentrations: _Steps) -> np.ndarray:
  """Returns float64[Q, N], the mean of each candidate's scores weighted by concentration."""
  return np.array(
    [
      [
        np.nan if mu is None or kappa is None else float(np.average(mu, weights=kappa))
        for mu, kappa in zip(*row, strict=True)
      ]
      for row in zip(scores, concentrations, strict=True)
    ]
  )


def stopping(values: np.ndarray, correct: np.ndarray) -> list[dict[str, float]]:
  """Returns for each threshold {"threshold", "candidates", "correct"} of `values` [Q, N].

  "candidates" is the mean number that is sampled, "correct" the share of questions whose best
  candidate among those is right, bool[Q, N].
  """
  known = np.where(np.isnan(values), -np.inf, values)
  n = known.shape[1]
  report = []
  for threshold in THRESHOLDS:
    enough = known >= threshold
    taken = np.where(enough.any(1), enough.argmax(1) + 1, n)
    seen = np.where(np.arange(n)[None] < taken[:, None], known, -np.inf)
    best = seen.argmax(1)
    rows = np.arange(len(best))
    right = correct[rows, best] & (seen[rows, best] > -np.inf)
    report.append(
      {"threshold": threshold, "candidates": float(taken.mean()), "correct": float(right.mean())}
    )
  return report
