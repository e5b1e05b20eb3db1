"""Two rankings of rollouts that the study compares with BIS, written down before they were run.

`drop`: where the MC score falls from high to zero at once, the error is where the labels say it is. If it
fades (15/16, 3/16, 0), the wrong step is likely the pseudo-positive one before. BIS averages the positive
steps of a rollout, so that one pseudo-positive among several high scores hardly counts.

`surprise`: in rollouts of n steps with p near 1/2, which BIS ranks first, the first half is correct and
the second wrong, so that a step's position tells its label and the picture is not needed. Labels that
position does not predict have to be learned from the picture.
"""

import numpy as np

_MOST = 256  # steps of a rollout


def drop(correct: np.ndarray, total: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """Returns 1 + the MC score before the first step of score 0; without one, the lowest score.

  A first step of score 0 falls from 1.
  """
  score = correct / total
  starts = np.cumsum(lengths) - lengths
  place = np.arange(score.size) - np.repeat(starts, lengths)
  first_zero = np.minimum.reduceat(np.where(score == 0, place, _MOST), starts)
  before = np.where(first_zero > 0, score[starts + np.clip(first_zero - 1, 0, lengths - 1)], 1.0)
  return np.where(first_zero < _MOST, 1 + before, np.minimum.reduceat(score, starts))


def surprise(correct: np.ndarray, total: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """Returns mean -log P(label | number of steps, position) times the mean positive MC score.

  P is the share of such labels among all rollouts; a label is MC score > 0. The mean MC score of the
  positive steps is 1 if there is none, as in BIS.
  """
  score = correct / total
  starts = np.cumsum(lengths) - lengths
  place = np.arange(score.size) - np.repeat(starts, lengths)
  positive = score > 0
  _, cell = np.unique(np.repeat(lengths, lengths) * _MOST + place, return_inverse=True)
  share = (np.bincount(cell, positive) + 1) / (np.bincount(cell) + 2)
  nats = -np.log(np.where(positive, share[cell], 1 - share[cell]))
  positives = np.add.reduceat(positive.astype(int), starts)
  reliability = np.add.reduceat(score * positive, starts) / np.maximum(positives, 1)
  return np.add.reduceat(nats, starts) / lengths * np.where(positives > 0, reliability, 1.0)
