"""The decoder that Qwen and InternLM2.5 share with Llama: grouped-query attention and gated MLP.

The backbone computes the rotary angles, because it defines a token's position. Sources:
Qwen2_5_VLTextModel, Qwen3VLTextModel, Qwen2Model and LlamaModel in Transformers.
"""

# Array names end in their dims: B rows, T tokens, D width, N query heads, K key and value heads, H
# head dim, h half of a head dim, M image features, V vocab, F layers with added features, L layers, Z
# slots of a memory, S slots before a row.

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bis_jax.models.attention import attention, stream_attention
from bis_jax.models.layers import (
  Embedding,
  GatedMLP,
  Linear,
  RMSNorm,
  projection,
  rematerialized,
  rotate,
  scan,
  stack,
)
from bis_jax.models.model_config import ModelConfig
from bis_jax.parallel.sharding import P, whole_rows

# Kernels are [in, out], stacked layers lead with [layer]; widths split over fsdp, heads and
# hidden units over tensor. Vectors are small and stay whole.
SHARDING = (
  (r"\.embed_tokens\.embedding$", P("tensor", "fsdp")),
  (r"layers\..*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.kernel$", P(None, "fsdp", "tensor")),
  (r"layers\..*\.(o_proj|down_proj)\.kernel$", P(None, "tensor", "fsdp")),
  (r"reward_head\.kernel$", P("fsdp", None)),
  (r"(bias|scale)$", P()),
)


Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # of queries, keys and values


class Memory(NamedTuple):
  """Keys, rotated, and values of tokens by their slots, for tokens that come after them later."""

  keys_LZKH: jax.Array
  values_LZKH: jax.Array


class SelfAttention(nnx.Module):
  """Projections around attention; bias and norm, if any, as `TextConfig` says."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    text, bias = config.text, config.text.attention_bias
    key_width = text.num_key_value_heads * text.head_dim
    self.q_proj = Linear(text.hidden_size, text.query_width, config, rngs, use_bias=bias)
    self.k_proj = Linear(text.hidden_size, key_width, config, rngs, use_bias=bias)
    self.v_proj = Linear(text.hidden_size, key_width, config, rngs, use_bias=bias)
    self.o_proj = Linear(text.query_width, text.hidden_size, config, rngs, use_bias=False)
    self.q_norm, self.k_norm = (
      RMSNorm(text.head_dim, text.rms_norm_eps, config) if text.qk_norm else None for _ in range(2)
    )
    self.head_dim = text.head_dim

  def __call__(
    self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend
  ) -> jax.Array:
    b, t, _ = x_BTD.shape
    q_BTNH, k_BTKH, v_BTKH = (
      projection(proj(x_BTD)).reshape(b, t, -1, self.head_dim)
      for proj in (self.q_proj, self.k_proj, self.v_proj)
    )
    if self.q_norm is not None and self.k_norm is not None:
      q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
    q_BTNH, k_BTKH = rotate(q_BTNH, *rope), rotate(k_BTKH, *rope)
    return projection(self.o_proj(attend(q_BTNH, k_BTKH, v_BTKH).reshape(b, t, -1)))


class DecoderLayer(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    text = config.text
    self.input_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps, config)
    self.post_attention_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps, config)
    self.self_attn = SelfAttention(config, rngs)
    sizes = text.hidden_size, text.intermediate_size
    self.mlp = GatedMLP(*sizes, config, rngs, use_bias=False)

  def __call__(
    self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend
  ) -> jax.Array:
    x_BTD += self.self_attn(self.input_layernorm(x_BTD), rope, attend)
    return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nnx.Module):
  """Returns the states [B, T, D] after the last layer; the caller applies `norm`.

  `streams` are those of the rows, see `attention.stream_attention`. `added`, image features
  [F, B, M, D] and `image_index` [B, T], are added to the image tokens after the first F layers.
  """

  # The norm acts on each token alone, so gathering the step markers first gives the same logits for
  # a fraction of the work.

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    text = config.text
    self.embed_tokens = Embedding(text.vocab_size, text.hidden_size, config, rngs)
    self.layers = stack(functools.partial(DecoderLayer, config), text.num_hidden_layers, rngs)
    self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps, config)
    self.config = config

  def __call__(
    self,
    x_BTD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segment_BT: jax.Array,
    streams: tuple[int, int] = (0, 0),
    added: tuple[jax.Array, jax.Array] | None = None,
  ) -> jax.Array:
    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
      backend = self.config.attention
      return stream_attention(q_BTNH, k_BTKH, v_BTKH, segment_BT, streams, backend=backend)

    def apply(layer: DecoderLayer, x_BTD: jax.Array) -> jax.Array:
      return layer(x_BTD, rope, attend)

    return self._through(apply, added, x_BTD)

  def with_memory(
    self,
    x_BTD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segment_BT: jax.Array,
    streams: tuple[int, int],
    memory: Memory,
    slot_BT: jax.Array,
    past_BS: jax.Array | None,
    added: tuple[jax.Array, jax.Array] | None = None,
  ) -> tuple[jax.Array, Memory]:
    """As `__call__`, and returns a memory that also holds the tokens, each in its slot.

    A row with slots in `past_BS` comes after their tokens, and is one segment without streams. A slot
    outside the memory is none.
    """
    backend = self.config.attention

    def apply(layer, x_BTD, number, memory):
      def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        nonlocal memory
        new = Memory(k_BTKH, v_BTKH)
        # Written before it is read, so that XLA changes the memory in place.
        memory = Memory(
          *(
            all_LZKH.at[number, slot_BT].set(whole_rows(x_BTKH), mode="drop")
            for all_LZKH, x_BTKH in zip(memory, new, strict=True)
          )
        )
        if past_BS is None:
          return stream_attention(q_BTNH, *new, segment_BT, streams, backend=backend)
        keys, values = (
          jnp.concatenate(
            [all_LZKH.at[number, past_BS].get(mode="fill", fill_value=0), x_BTKH], axis=1
          )
          for all_LZKH, x_BTKH in zip(memory, new, strict=True)
        )
        past = (past_BS < memory.keys_LZKH.shape[1]).astype(segment_BT.dtype)
        segment = jnp.concatenate([past, segment_BT], axis=1)
        return attention(q_BTNH, keys, values, segment_BT, segment, causal=True, backend=backend)

      x_BTD = layer(x_BTD, rope, attend)
      return x_BTD, number + 1, memory

    x_BTD, _, memory = self._through(apply, added, x_BTD, jnp.int32(0), memory)
    return x_BTD, memory

  def _through(
    self,
    apply: Callable[..., Any],
    added: tuple[jax.Array, jax.Array] | None,
    *state: Any,
  ) -> Any:
    """Returns what `scan` does of `apply` over all layers, with the added features."""
    layers = self.layers
    if added is not None:
      features_FBMD, index_BT = added

      def apply_and_add(both: tuple[DecoderLayer, jax.Array], *state: Any) -> Any:
        layer, features_BMD = both
        after = apply(layer, *state)
        x_BTD, *rest = after if len(state) > 1 else (after,)
        x_BTD = place_features(x_BTD, features_BMD, index_BT, add=True)
        return (x_BTD, *rest) if rest else x_BTD

      count = len(features_FBMD)
      first, layers = (
        jax.tree.map(lambda array, part=part: array[part], self.layers)
        for part in (slice(count), slice(count, None))
      )
      run = rematerialized(apply_and_add, self.config.remat)
      after = scan(run, (first, features_FBMD), *state)
      state = after if len(state) > 1 else (after,)
    return scan(rematerialized(apply, self.config.remat), layers, *state)


def place_features(
  x_BTD: jax.Array, features_BMD: jax.Array, image_index_BT: jax.Array, *, add: bool = False
) -> jax.Array:
  """Returns x with feature `image_index` in place of, or added to, each token whose index is not -1."""
  index_BT1 = jnp.maximum(image_index_BT, 0)[:, :, None]
  placed_BTD = jnp.take_along_axis(features_BMD, index_BT1, axis=1)
  if add:
    placed_BTD += x_BTD
  return jnp.where((image_index_BT >= 0)[:, :, None], placed_BTD, x_BTD)
