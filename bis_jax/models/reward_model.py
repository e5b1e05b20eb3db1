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
from bis_jax.models.decoder import Decoder, Memory, place_features
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
    return self._logits(self.states(batch), marker_BR1)

  def with_memory(self, batch: Batch, memory: Memory) -> tuple[jax.Array, Memory]:
    """As `__call__` for a batch with `slots`; see `Decoder.with_memory`.

    Rows with `past` slots come after their tokens, and have no images of their own.
    """
    x_BTD, memory = self.language_model.with_memory(
      **self._inputs(batch), memory=memory, slot_BT=batch["slots"], past_BS=batch.get("past")
    )
    return self._logits(x_BTD, batch["marker_index"][:, :, None]), memory

  def states(self, batch: Batch) -> jax.Array:
    """Returns the states [B, T, D] after the last layer, before the last norm."""
    own = self.config.adaptation
    if own and own.dropout and "random_key" in batch:
      adaptation.draw_dropout(self, jax.random.fold_in(batch["random_key"], 1))
    return self.language_model(**self._inputs(batch))

  def _inputs(self, batch: Batch) -> dict[str, Any]:
    """Returns what the decoder takes."""
    # Rows for text alone have no patch slots, and the program has no tower.
    has_images = "past" not in batch and batch["patches"].shape[1]
    features = self.image_features(batch) if has_images else None
    x_BTD, added = self.language_model.embed_tokens(batch["tokens"]), None
    if features is not None:
      index_BT, parts = batch["image_index"], features.shape[-1] // x_BTD.shape[-1]
      features_BMD, *more = jnp.split(features, parts, axis=-1) if parts > 1 else [features]
      added = (jnp.stack(more), index_BT) if more else None
      x_BTD = place_features(x_BTD, features_BMD, index_BT)
    _, *streams = batch["stream_ids"].shape if "stream_ids" in batch else (0, 0, 0)
    return {
      "x_BTD": x_BTD,
      "rope": self.rope(batch["positions"]),
      "segment_BT": batch["segment_ids"],
      "streams": (streams[0], streams[1]),
      "added": added,
    }

  def _logits(self, x_BTD: jax.Array, marker_BR1: jax.Array) -> jax.Array:
    x_BRD = jnp.take_along_axis(x_BTD, marker_BR1, axis=1)
    return self.reward_head(self.language_model.norm(x_BRD))

  def next_token_logits(self, batch: Batch) -> jax.Array:
    """Returns float32 logits [B, T, V] of the token after every token, by the tied embedding."""
    # For the pre-training of small models: with a published vocabulary they would fill the memory.
    x_BTD = self.language_model.norm(self.states(batch)).astype(jnp.float32)
    return x_BTD @ self.language_model.embed_tokens.embedding[...].astype(jnp.float32).T
