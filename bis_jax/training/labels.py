"""Training labels of steps, from their MC scores or from the truth of the toy corpus."""

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from bis_jax.corpus.formats import NEUTRAL
from bis_jax.corpus.score_table import positive_and_counted


def step_labels(
  scores: np.ndarray,
  measured: np.ndarray,
  labels: ConfigDict,
  tau: float,
  unmeasured: str,
  truth: Sequence[int] | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (targets, weights) of the n steps of a rollout, float32[n] each.

  A target is the probability of "correct", a weight is 1 for labelled steps, else 0. With
  `labels.kind` "hard" the target is 1 if MC > tau (arXiv 2602.04145, section 3), with "soft" and "beta"
  the MC score itself, with "banded" 1 above `band_high`, 0 at or below `band_low`, and unlabelled between,
  with "truth" it is `truth` [n], also for steps that were not `measured`. `unmeasured` "negative"
  labels those 0, "ignore" does not label them.
  """
  if labels.kind == "truth":
    return np.asarray(truth, np.float32), np.ones(len(scores), np.float32)
  positive, labelled = positive_and_counted(scores, measured, tau, unmeasured)
  if labels.kind in ("soft", "beta"):
    targets = scores
  elif labels.kind == "hard":
    targets = positive
  else:
    targets = scores > labels.band_high
    labelled = labelled & (targets | (scores <= labels.band_low))
  return np.asarray(targets, np.float32), labelled.astype(np.float32)


def with_policy(
  targets: np.ndarray,
  weights: np.ndarray,
  scores: np.ndarray,
  continuations: np.ndarray,
  labels: ConfigDict,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the (targets, weights) of `step_labels` as the policies of `labels` leave them.

  `continuations` int[n] is the number of each step's, -1 if it is not known. A neutral step has
  the score `NEUTRAL` and no known number. `labels.min_continuations` takes the labels of steps with
  fewer, `labels.until_first_wrong` those after the first step with a target below 0.5.
  """
  neutral = (scores == NEUTRAL) & (continuations < 0)
  if labels.neutral != "by_score":
    targets = np.where(neutral, np.float32(labels.neutral == "positive"), targets)
  if labels.neutral == "ignore":
    weights = np.where(neutral, np.float32(0), weights)
  too_few = (continuations >= 0) & (continuations < labels.min_continuations)
  weights = np.where(too_few, np.float32(0), weights)
  if labels.until_first_wrong:
    wrong = (targets < 0.5) & (weights > 0)
    after = np.cumsum(wrong) - wrong > 0
    weights = np.where(after, np.float32(0), weights)
  return targets, weights
