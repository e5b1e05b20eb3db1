"""The vision tower of Qwen2.5-VL: patches in window order in, merged image features out.

The host orders the patches (`images`): merge units of four patches, the units of a window together,
windows inside blocks of 64 patch slots. Nothing is permuted here.

Source: Qwen2_5_VisionTransformerPretrainedModel in Transformers.
"""

# Array names end in their dims: B rows, P patch slots, C values per patch, D width, N heads, H head
# dim, h half of a head dim, M merged features (P / 4).

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from bis_jax.models.attention import attention, window_attention
from bis_jax.models.layers import (
  GatedMLP,
  Linear,
  RMSNorm,
  inverse_frequencies,
  projection,
  rematerialized,
  rotate,
  scan,
  stack,
)
from bis_jax.models.model_config import ModelConfig
from bis_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig


class VisionAttention(nnx.Module):
  """Attention inside windows, or inside whole images if `full`."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    width = config.vision.hidden_size
    self.qkv = Linear(width, 3 * width, config, rngs, use_bias=True)
    self.proj = Linear(width, width, config, rngs, use_bias=True)
    self.num_heads = config.vision.num_heads
    self.backend = config.attention

  def __call__(
    self,
    x_BPD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    patch_window_BP: jax.Array,
    patch_segment_BP: jax.Array,
    full: bool,
  ) -> jax.Array:
    b, p, d = x_BPD.shape
    q_BPNH, k_BPNH, v_BPNH = (
      x.reshape(b, p, self.num_heads, d // self.num_heads)
      for x in jnp.split(projection(self.qkv(x_BPD)), 3, axis=-1)
    )
    q_BPNH, k_BPNH = rotate(q_BPNH, *rope), rotate(k_BPNH, *rope)
    if full:
      out_BPNH = attention(
        q_BPNH, k_BPNH, v_BPNH, patch_segment_BP, causal=False, backend=self.backend
      )
    else:
      out_BPNH = window_attention(q_BPNH, k_BPNH, v_BPNH, patch_window_BP)
    return projection(self.proj(out_BPNH.reshape(b, p, d)))


class VisionBlock(nnx.Module):
  def __init__(self, config: Qwen2_5_VLConfig, rngs: nnx.Rngs):
    vision = config.vision
    self.norm1 = RMSNorm(vision.hidden_size, vision.rms_norm_eps, config)
    self.norm2 = RMSNorm(vision.hidden_size, vision.rms_norm_eps, config)
    self.attn = VisionAttention(config, rngs)
    sizes = vision.hidden_size, vision.intermediate_size
    self.mlp = GatedMLP(*sizes, config, rngs, use_bias=True)

  def __call__(
    self,
    x_BPD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    patch_window_BP: jax.Array,
    patch_segment_BP: jax.Array,
    full: bool,
  ) -> jax.Array:
    x_BPD += self.attn(self.norm1(x_BPD), rope, patch_window_BP, patch_segment_BP, full)
    return x_BPD + self.mlp(self.norm2(x_BPD))


class PatchMerger(nnx.Module):
  """Returns features [B, M, D of the text] of merge units: four consecutive patches each."""

  def __init__(self, config: Qwen2_5_VLConfig, rngs: nnx.Rngs):
    vision = config.vision
    width = vision.hidden_size * vision.spatial_merge_size**2
    self.ln_q = RMSNorm(vision.hidden_size, vision.rms_norm_eps, config)
    self.mlp = nnx.Dict(  # indices of the two in the source's nn.Sequential
      {
        "0": Linear(width, width, config, rngs, use_bias=True),
        "2": Linear(width, config.text.hidden_size, config, rngs, use_bias=True),
      }
    )
    self.merge = vision.spatial_merge_size**2

  def __call__(self, x_BPD: jax.Array) -> jax.Array:
    b, p, d = x_BPD.shape
    x_BME = self.ln_q(x_BPD).reshape(b, p // self.merge, self.merge * d)
    return self.mlp["2"](jax.nn.gelu(self.mlp["0"](x_BME), approximate=False))


class VisionTower(nnx.Module):
  """Returns merged image features [B, M, D of the text] in window order."""

  # Slots without an image give finite features that no token reads.

  def __init__(self, config: Qwen2_5_VLConfig, rngs: nnx.Rngs):
    sizes = config.vision.patch_values, config.vision.hidden_size
    # A linear layer is the 3-D convolution of the source, whose patches do not overlap.
    self.patch_embed = nnx.Dict({"proj": Linear(*sizes, config, rngs, use_bias=False)})
    self.blocks = stack(functools.partial(VisionBlock, config), config.vision.depth, rngs)
    self.merger = PatchMerger(config, rngs)
    self.config = config

  def __call__(
    self,
    patches_BPC: jax.Array,
    patch_position_BP2: jax.Array,
    patch_window_BP: jax.Array,
    patch_segment_BP: jax.Array,
  ) -> jax.Array:
    vision = self.config.vision
    period = vision.full_attention_period
    rope = axial_rope(patch_position_BP2, vision.head_dim, vision.rope_theta)

    def apply(full: bool, block: VisionBlock, x_BPD: jax.Array) -> jax.Array:
      return block(x_BPD, rope, patch_window_BP, patch_segment_BP, full)

    windowed, full = (
      rematerialized(functools.partial(apply, full), self.config.remat) for full in (False, True)
    )

    def group(blocks: VisionBlock, x_BPD: jax.Array) -> jax.Array:
      # period - 1 windowed blocks, then one with full attention.
      x_BPD = scan(windowed, jax.tree.map(lambda array: array[:-1], blocks), x_BPD)
      return full(jax.tree.map(lambda array: array[-1], blocks), x_BPD)

    groups = jax.tree.map(
      lambda array: array.reshape(vision.depth // period, period, *array.shape[1:]), self.blocks
    )
    x_BPD = scan(group, groups, self.patch_embed["proj"](patches_BPC))
    return self.merger(x_BPD)


def axial_rope(
  patch_position_BP2: jax.Array, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
  """Returns cosines and sines [B, P, h]: the first half of the angles from the row, the rest from
  the column."""
  frequencies_f = inverse_frequencies(head_dim // 2, theta)
  position_BP21 = patch_position_BP2.astype(jnp.float32)[..., None]
  angles_BPh = (position_BP21 * frequencies_f[None, None, None]).reshape(
    *patch_position_BP2.shape[:2], -1
  )
  return jnp.cos(angles_BPh), jnp.sin(angles_BPh)
