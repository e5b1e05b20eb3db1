"""The step reward loss."""

import jax
import jax.numpy as jnp


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
