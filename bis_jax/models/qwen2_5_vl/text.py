"""The decoder of Qwen2.5-VL: grouped-query attention with multimodal rotary embedding.

Source: Qwen2_5_VLTextModel in Transformers.

Array names end in their dims: B rows, T tokens, D width, N query heads, K key and value heads,
H head dim, h half of a head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bis_jax.models.attention import attention
from bis_jax.models.layers import (
  Embedding,
  GatedMLP,
  Linear,
  RMSNorm,
  inverse_frequencies,
  rematerialised,
  rotate,
  scan,
  stack,
)
from bis_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig


class SelfAttention(nnx.Module):
  """Causal attention within segments; bias on queries, keys and values only."""

  def __init__(self, config: Qwen2_5_VLConfig, rngs: nnx.Rngs):
    text = config.text
    kwargs = dict(dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)
    key_width = text.num_key_value_heads * text.head_dim
    self.q_proj = Linear(text.hidden_size, text.hidden_size, use_bias=True, **kwargs)
    self.k_proj = Linear(text.hidden_size, key_width, use_bias=True, **kwargs)
    self.v_proj = Linear(text.hidden_size, key_width, use_bias=True, **kwargs)
    self.o_proj = Linear(text.hidden_size, text.hidden_size, use_bias=False, **kwargs)
    self.head_dim = text.head_dim
    self.backend = config.attention

  def __call__(
    self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], segment_BT: jax.Array
  ) -> jax.Array:
    b, t, d = x_BTD.shape
    q_BTNH, k_BTKH, v_BTKH = (
      proj(x_BTD).reshape(b, t, -1, self.head_dim)
      for proj in (self.q_proj, self.k_proj, self.v_proj)
    )
    out_BTNH = attention(
      rotate(q_BTNH, *rope),
      rotate(k_BTKH, *rope),
      v_BTKH,
      segment_BT,
      causal=True,
      backend=self.backend,
    )
    return self.o_proj(out_BTNH.reshape(b, t, d))


class DecoderLayer(nnx.Module):
  """One pre-norm layer: attention and gated MLP."""

  def __init__(self, config: Qwen2_5_VLConfig, rngs: nnx.Rngs):
    text = config.text
    kwargs = dict(dtype=config.dtype, param_dtype=config.param_dtype)
    self.input_layernorm = RMSNorm(text.hidden_size, epsilon=text.rms_norm_eps, **kwargs)
    self.post_attention_layernorm = RMSNorm(text.hidden_size, epsilon=text.rms_norm_eps, **kwargs)
    self.self_attn = SelfAttention(config, rngs)
    self.mlp = GatedMLP(
      text.hidden_size, text.intermediate_size, use_bias=False, rngs=rngs, **kwargs
    )

  def __call__(
    self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], segment_BT: jax.Array
  ) -> jax.Array:
    x_BTD += self.self_attn(self.input_layernorm(x_BTD), rope, segment_BT)
    return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class TextModel(nnx.Module):
  """Returns the states [B, T, D] after the last layer; the caller applies `norm` where it reads.

  The norm acts on each token alone, so gathering the step markers first gives the same logits for
  a fraction of the work.
  """

  def __init__(self, config: Qwen2_5_VLConfig, rngs: nnx.Rngs):
    text = config.text
    kwargs = dict(dtype=config.dtype, param_dtype=config.param_dtype)
    self.embed_tokens = Embedding(text.vocab_size, text.hidden_size, rngs=rngs, **kwargs)
    self.layers = stack(functools.partial(DecoderLayer, config), text.num_hidden_layers, rngs)
    self.norm = RMSNorm(text.hidden_size, epsilon=text.rms_norm_eps, **kwargs)
    self.config = config

  def __call__(
    self, x_BTD: jax.Array, positions_B3T: jax.Array, segment_BT: jax.Array
  ) -> jax.Array:
    text = self.config.text
    rope = _rope(positions_B3T, text.head_dim, text.rope_theta, text.mrope_section)

    def apply(layer: DecoderLayer, x_BTD: jax.Array) -> jax.Array:
      return layer(x_BTD, rope, segment_BT)

    return scan(rematerialised(apply, self.config.remat), self.layers, x_BTD)


def _rope(
  positions_B3T: jax.Array, head_dim: int, theta: float, section: tuple[int, int, int]
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines [B, T, h]; each frequency turns by the position of its section's axis.

  With sections (2, 3, 3) the eight frequencies read the axes [0 0 1 1 1 2 2 2]: time, height,
  width.
  """
  axis_h = np.repeat(np.arange(3), section)
  positions_BTh = jnp.moveaxis(positions_B3T.astype(jnp.float32), 1, 2)[:, :, axis_h]
  angles_BTh = positions_BTh * inverse_frequencies(head_dim, theta)[None, None]
  return jnp.cos(angles_BTh), jnp.sin(angles_BTh)
