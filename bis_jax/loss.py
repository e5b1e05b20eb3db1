"""Labels from MC scores and the step reward loss."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict


def step_labels(
  scores: np.ndarray, measured: np.ndarray, labels: ConfigDict, tau: float, unmeasured: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the target (probability of "correct") and the weight of every step.

  Args:
    scores: float64[n], MC scores in [0, 1].
    measured: bool[n], False where no continuation was sampled.
    labels: `config.labels`; kind "hard" is 1 where MC > tau, "soft" the MC score itself, "banded"
      1 above `band_high`, 0 at or below `band_low`, and no label between.
    tau: the threshold of positive steps.
    unmeasured: "negative" labels unmeasured steps 0, "ignore" gives them weight 0.

  Returns:
    float32[n] targets in [0, 1] and float32[n] weights, 0 or 1. Source: arXiv 2602.04145,
    section 3 (hard labels); the other two are common practice for MC-annotated steps.
  """
  labelled = np.ones_like(measured) if unmeasured == "negative" else measured.copy()
  if labels.kind == "soft":
    targets = scores
  elif labels.kind == "hard":
    targets = scores > tau
  else:
    targets = scores > labels.band_high
    labelled &= targets | (scores <= labels.band_low)
  return np.asarray(targets, np.float32), labelled.astype(np.float32)


def marker_loss(logits_BR2: jax.Array, target_BR: jax.Array, weight_BR: jax.Array) -> jax.Array:
  """Returns the weighted cross-entropy of every step marker, float32[B, R], 0 at unused markers.

  Args:
    logits_BR2: float32, ("correct", "wrong").
    target_BR: float32, the probability of "correct" in [0, 1].
    weight_BR: float32, 1 at labelled markers, else 0.
  """
  log_p_BR2 = jax.nn.log_softmax(logits_BR2)
  loss_BR = -(target_BR * log_p_BR2[..., 0] + (1 - target_BR) * log_p_BR2[..., 1])
  return jnp.where(weight_BR > 0, weight_BR * loss_BR, 0.0)
