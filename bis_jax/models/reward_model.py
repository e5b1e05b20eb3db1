"""A backbone as a step reward model: a batch of packed rows in, two logits per step marker out.

The published method reads the LM head's `Yes` and `No` rows at the marker. Two columns with those
rows are the same function and the same gradient, without logits over the whole vocabulary.
"""

# Array names end in their dims: B rows, T tokens, D width, P patch slots, C values per patch, M
# image features of a row, V vocab, R step markers per row, h half of a head dim.

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bis_jax.models import adaptation
from bis_jax.models.decoder import Decoder, place_features
from bis_jax.models.layers import Linear
from bis_jax.models.model_config import ModelConfig

Batch = Mapping[str, jax.Array]


def belief(logits_BR2: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns mean in [0, 1] and concentration of a Beta belief in each step's MC score, [B, R].

  The mean is the softmax of two logits, as in a model without beliefs, so that who knows no
  concentration reads the mean; the concentration grows with both. Ours; arXiv 2605.15529 has a head
  for each.
  """
  mean_BR = jax.nn.softmax(logits_BR2)[..., 0]
  concentration_BR = jax.nn.softplus(jax.nn.logsumexp(logits_BR2, axis=-1))
  return jnp.clip(mean_BR, 1e-6, 1 - 1e-6), concentration_BR + 1e-3


class RewardModel(nnx.Module):
  """Returns float32 logits [B, R, 2] at the step markers of a batch, positive first.

  A subclass makes its vision tower first. Layers are stacked on a leading axis and scanned. The
  module knows no mesh: shard its state and its batch over Auto axes and jit.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.language_model = Decoder(config, rngs)
    in_float32 = dataclasses.replace(config, dtype="float32")
    self.reward_head = Linear(config.text.hidden_size, 2, in_float32, rngs, use_bias=False)
    self.config: Any = config  # of the backbone's own class

  @abc.abstractmethod
  def image_features(self, batch: Batch) -> jax.Array:
    """Returns the image features [B, M, D] of a batch, or [B, M, (1 + F) D].

    The further F parts are added to the image tokens after each of the first F layers.
    """

  @abc.abstractmethod
  def rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines [B, T, h] of a batch's `positions`."""

  def __call__(self, batch: Batch) -> jax.Array:
    marker_BR1 = batch["marker_index"][:, :, None]
    x_BRD = jnp.take_along_axis(self.states(batch), marker_BR1, axis=1)
    return self.reward_head(self.language_model.norm(x_BRD))

  def states(self, batch: Batch) -> jax.Array:
    """Returns the states [B, T, D] after the last layer, before the last norm."""
    own = self.config.adaptation
    if own and own.dropout and "random_key" in batch:
      adaptation.draw_dropout(self, jax.random.fold_in(batch["random_key"], 1))
    # Rows for text alone have no patch slots, and the program has no tower.
    features = self.image_features(batch) if batch["patches"].shape[1] else None
    x_BTD, added = self.language_model.embed_tokens(batch["tokens"]), None
    if features is not None:
      index_BT, parts = batch["image_index"], features.shape[-1] // x_BTD.shape[-1]
      features_BMD, *more = jnp.split(features, parts, axis=-1) if parts > 1 else [features]
      added = (jnp.stack(more), index_BT) if more else None
      x_BTD = place_features(x_BTD, features_BMD, index_BT)
    _, *streams = batch["stream_ids"].shape if "stream_ids" in batch else (0, 0, 0)
    rope = self.rope(batch["positions"])
    return self.language_model(x_BTD, rope, batch["segment_ids"], (streams[0], streams[1]), added)

  def next_token_logits(self, batch: Batch) -> jax.Array:
    """Returns float32 logits [B, T, V] of the token after every token, by the tied embedding."""
    # For the pre-training of small models: with a published vocabulary they would fill the memory.
    x_BTD = self.language_model.norm(self.states(batch)).astype(jnp.float32)
    return x_BTD @ self.language_model.embed_tokens.embedding[...].astype(jnp.float32).T
