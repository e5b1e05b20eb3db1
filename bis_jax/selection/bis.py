"""The Balanced-Information Score of a rollout, in float64 as in the paper.

Scores are discrete and often tie at the cut, so rounding decides which rollouts are kept. NumPy
rounds after every operation; XLA may fuse p (1 - p) + alpha, and TPUs have no float64. Therefore
scores are computed here, on the host.
"""

import numpy as np


def mixture(n: np.ndarray, n_pos: np.ndarray) -> np.ndarray:
  """Returns p (1 - p) with p = n_pos / n, positive of all scored steps: float64, in [0, 1/4]."""
  p = n_pos.astype(np.float64) / np.maximum(n, 1)  # 0 if no step counts
  return p * (1.0 - p)


def reliability(
  n_pos: np.ndarray, score_sum: np.ndarray, if_no_positive: float = 1.0
) -> np.ndarray:
  """Returns R, the mean MC score of the positive steps, `if_no_positive` without any."""
  return np.where(n_pos > 0, score_sum / np.maximum(n_pos, 1), if_no_positive)


def bis_scores(
  n: np.ndarray,
  n_pos: np.ndarray,
  score_sum: np.ndarray,
  alpha: float,
  if_no_positive: float = 1.0,
) -> np.ndarray:
  """Returns (p (1 - p) + alpha) R: float64."""
  return (mixture(n, n_pos) + alpha) * reliability(n_pos, score_sum, if_no_positive)
