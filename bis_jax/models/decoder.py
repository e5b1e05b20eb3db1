"""The decoder that Qwen and InternLM2.5 share with Llama: grouped-query attention and gated MLP.

The backbone computes the rotary angles, because it defines a token's position. Sources:
Qwen2_5_VLTextModel, Qwen3VLTextModel, Qwen2Model and LlamaModel in Transformers.
"""

# Array names end in their dims: B rows, T tokens, D width, N query heads, K key and value heads, H
# head dim, h half of a head dim, M image features, V vocab, F layers with added features.

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from bis_jax.models.attention import stream_attention
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
from bis_jax.parallel.sharding import P

# Kernels are [in, out], stacked layers lead with [layer]; widths split over fsdp, heads and
# hidden units over tensor. Vectors are small and stay whole.
SHARDING = (
  (r"\.embed_tokens\.embedding$", P("tensor", "fsdp")),
  (r"layers\..*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.kernel$", P(None, "fsdp", "tensor")),
  (r"layers\..*\.(o_proj|down_proj)\.kernel$", P(None, "tensor", "fsdp")),
  (r"reward_head\.kernel$", P("fsdp", None)),
  (r"(bias|scale)$", P()),
)


class SelfAttention(nnx.Module):
  """Causal attention within segments; bias and norm, if any, as `TextConfig` says."""

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
    self.backend = config.attention

  def __call__(
    self,
    x_BTD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segment_BT: jax.Array,
    streams: tuple[int, int],
  ) -> jax.Array:
    b, t, _ = x_BTD.shape
    q_BTNH, k_BTKH, v_BTKH = (
      projection(proj(x_BTD)).reshape(b, t, -1, self.head_dim)
      for proj in (self.q_proj, self.k_proj, self.v_proj)
    )
    if self.q_norm is not None and self.k_norm is not None:
      q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
    q_BTNH, k_BTKH = rotate(q_BTNH, *rope), rotate(k_BTKH, *rope)
    out_BTNH = stream_attention(q_BTNH, k_BTKH, v_BTKH, segment_BT, streams, backend=self.backend)
    return projection(self.o_proj(out_BTNH.reshape(b, t, -1)))


class DecoderLayer(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    text = config.text
    self.input_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps, config)
    self.post_attention_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps, config)
    self.self_attn = SelfAttention(config, rngs)
    sizes = text.hidden_size, text.intermediate_size
    self.mlp = GatedMLP(*sizes, config, rngs, use_bias=False)

  def __call__(
    self,
    x_BTD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segment_BT: jax.Array,
    streams: tuple[int, int] = (0, 0),
  ) -> jax.Array:
    x_BTD += self.self_attn(self.input_layernorm(x_BTD), rope, segment_BT, streams)
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
    def apply(layer: DecoderLayer, x_BTD: jax.Array) -> jax.Array:
      return layer(x_BTD, rope, segment_BT, streams)

    layers = self.layers
    if added is not None:
      features_FBMD, index_BT = added

      def apply_and_add(both: tuple[DecoderLayer, jax.Array], x_BTD: jax.Array) -> jax.Array:
        layer, features_BMD = both
        x_BTD = apply(layer, x_BTD)
        return place_features(x_BTD, features_BMD, index_BT, add=True)

      count = len(features_FBMD)
      first, layers = (
        jax.tree.map(lambda array, part=part: array[part], self.layers)
        for part in (slice(count), slice(count, None))
      )
      run = rematerialized(apply_and_add, self.config.remat)
      x_BTD = scan(run, (first, features_FBMD), x_BTD)
    return scan(rematerialized(apply, self.config.remat), layers, x_BTD)


def place_features(
  x_BTD: jax.Array, features_BMD: jax.Array, image_index_BT: jax.Array, *, add: bool = False
) -> jax.Array:
  """Returns x with feature `image_index` in place of, or added to, each token whose index is not -1."""
  index_BT1 = jnp.maximum(image_index_BT, 0)[:, :, None]
  placed_BTD = jnp.take_along_axis(features_BMD, index_BT1, axis=1)
  if add:
    placed_BTD += x_BTD
  return jnp.where((image_index_BT >= 0)[:, :, None], placed_BTD, x_BTD)
