"""The step reward loss, and the next-token loss of caption pre-training."""

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


def next_token_loss(
  logits_BTV: jax.Array, tokens_BT: jax.Array, segment_BT: jax.Array, is_image_BT: jax.Array
) -> jax.Array:
  """Returns the mean cross-entropy, float32[], of every token that follows another of its segment.

  Args:
    logits_BTV: float32, at each token for the one behind it.
    tokens_BT: int32.
    segment_BT: int32, 0 for padding.
    is_image_BT: bool, tokens that stand for image features: nothing has to predict them.
  """
  next_BS = tokens_BT[:, 1:]
  log_p_BSV = jax.nn.log_softmax(logits_BTV[:, :-1])
  log_p_BS = jnp.take_along_axis(log_p_BSV, next_BS[..., None], axis=-1)[..., 0]
  counts_BS = (segment_BT[:, 1:] == segment_BT[:, :-1]) & (segment_BT[:, 1:] > 0)
  counts_BS &= ~is_image_BT[:, 1:]
  return -jnp.where(counts_BS, log_p_BS, 0.0).sum() / jnp.maximum(counts_BS.sum(), 1)
