"""Training labels of steps, from their MC scores or from the truth of the toy corpus."""

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

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
  `labels.kind` "hard" the target is 1 if MC > tau (arXiv 2602.04145, section 3), with "soft" the MC
  score itself, with "banded" 1 above `band_high`, 0 at or below `band_low`, and unlabelled between,
  with "truth" it is `truth` [n], also for steps that were not `measured`. `unmeasured` "negative"
  labels those 0, "ignore" does not label them.
  """
  if labels.kind == "truth":
    return np.asarray(truth, np.float32), np.ones(len(scores), np.float32)
  positive, labelled = positive_and_counted(scores, measured, tau, unmeasured)
  if labels.kind == "soft":
    targets = scores
  elif labels.kind == "hard":
    targets = positive
  else:
    targets = scores > labels.band_high
    labelled = labelled & (targets | (scores <= labels.band_low))
  return np.asarray(targets, np.float32), labelled.astype(np.float32)
