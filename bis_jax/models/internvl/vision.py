"""The vision tower of InternVL (InternViT): tiles in, image features before the projector out.

A tile is a sequence of its own: a class token and its patches attend to one another only. Tile
slots without an image give finite features that no token reads.

Sources: `modeling_intern_vit.py` of the InternVL release, InternVLVisionModel in Transformers.
"""

# Array names end in their dims: B rows, L tile slots of a row, P patches of a tile, S = P + 1 with
# the class token, C values per patch, D width, N heads, H head dim, M image tokens of a tile (P /
# 4).

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from bis_jax.models.attention import attention
from bis_jax.models.internvl.config import InternVLConfig
from bis_jax.models.layers import (
  MLP,
  LayerNorm,
  Linear,
  RMSNorm,
  projection,
  rematerialized,
  scan,
  stack,
)

_position_init = nnx.initializers.normal(0.02)


class VisionAttention(nnx.Module):
  """Full attention among the patches of a tile; queries and keys normed over all heads, if at all."""

  def __init__(self, config: InternVLConfig, rngs: nnx.Rngs):
    vision, width = config.vision, config.vision.hidden_size
    self.q_proj, self.k_proj, self.v_proj = (
      Linear(width, width, config, rngs, use_bias=vision.qkv_bias) for _ in range(3)
    )
    self.proj = Linear(width, width, config, rngs, use_bias=True)
    self.q_norm, self.k_norm = (
      RMSNorm(width, 1e-6, config) if vision.qk_normalization else None for _ in range(2)
    )
    self.num_heads = vision.num_attention_heads
    self.backend = config.attention

  def __call__(self, x_BLSD: jax.Array) -> jax.Array:
    b, tiles, s, d = x_BLSD.shape
    q_BLSD, k_BLSD, v_BLSD = (
      projection(proj(x_BLSD)) for proj in (self.q_proj, self.k_proj, self.v_proj)
    )
    if self.q_norm is not None and self.k_norm is not None:
      q_BLSD, k_BLSD = self.q_norm(q_BLSD), self.k_norm(k_BLSD)
    heads = (b * tiles, s, self.num_heads, d // self.num_heads)
    q, k, v = (x_BLSD.reshape(heads) for x_BLSD in (q_BLSD, k_BLSD, v_BLSD))
    segment = jnp.ones(heads[:2], jnp.int32)
    out = attention(q, k, v, segment, causal=False, backend=self.backend)
    return projection(self.proj(out.reshape(b, tiles, s, d)))


class VisionLayer(nnx.Module):
  """One pre-norm layer whose two branches are scaled by a learned vector each."""

  def __init__(self, config: InternVLConfig, rngs: nnx.Rngs):
    vision, width = config.vision, config.vision.hidden_size
    norm = LayerNorm if vision.norm_type == "layer_norm" else RMSNorm
    self.norm1, self.norm2 = (norm(width, vision.layer_norm_eps, config) for _ in range(2))
    self.attn = VisionAttention(config, rngs)
    self.mlp = MLP(width, vision.intermediate_size, width, config, rngs)
    self.ls1 = nnx.Param(jnp.full((width,), 0.1, config.param_dtype))
    self.ls2 = nnx.Param(jnp.full((width,), 0.1, config.param_dtype))

  def __call__(self, x_BLSD: jax.Array, keep_BL2: jax.Array | None = None) -> jax.Array:
    # keep_BL2 is the factor of each tile's two branches, 0 for a dropped one; None is 1.
    for i, (branch, norm, scale) in enumerate(
      ((self.attn, self.norm1, self.ls1), (self.mlp, self.norm2, self.ls2))
    ):
      y_BLSD = branch(norm(x_BLSD)) * scale[...].astype(x_BLSD.dtype)[None, None, None]
      if keep_BL2 is not None:
        y_BLSD *= keep_BL2[:, :, None, i : i + 1].astype(x_BLSD.dtype)
      x_BLSD += y_BLSD
    return x_BLSD


class VisionTower(nnx.Module):
  """Returns features [B, L, M, 4 D]: the concatenated states of every 2 x 2 patches of a tile."""

  def __init__(self, config: InternVLConfig, rngs: nnx.Rngs):
    vision, width = config.vision, config.vision.hidden_size
    positions = (vision.side**2 + 1, width)
    self.class_embedding = nnx.Param(_position_init(rngs.params(), (width,), config.param_dtype))
    self.position_embedding = nnx.Param(
      _position_init(rngs.params(), positions, config.param_dtype)
    )
    self.patch_embedding = Linear(vision.patch_values, width, config, rngs, use_bias=True)
    self.layers = stack(functools.partial(VisionLayer, config), vision.num_hidden_layers, rngs)
    self.config = config

  def __call__(self, tiles_BLPC: jax.Array, key: jax.Array | None = None) -> jax.Array:
    # Values of the patches are in reading order; with a key, branches are dropped.
    vision = self.config.vision
    x_BLSD, keep_FBL2 = self.embed(tiles_BLPC), None
    if self.config.drop_path and key is not None:
      keep_FBL2 = _kept(key, vision.num_hidden_layers, x_BLSD.shape[:2], self.config.drop_path)
    apply = rematerialized(lambda layer, x: layer[0](x, layer[1]), self.config.remat)
    x_BLSD = scan(apply, (self.layers, keep_FBL2), x_BLSD)
    return pixel_shuffle(x_BLSD[:, :, 1:], vision.side)

  def embed(self, tiles_BLPC: jax.Array) -> jax.Array:
    """Returns the states [B, L, S, D] before the first layer, the class token first."""
    patches_BLPD = self.patch_embedding(tiles_BLPC)
    b, tiles, _, d = patches_BLPD.shape
    class_D = self.class_embedding[...].astype(patches_BLPD.dtype)
    class_BL1D = jnp.broadcast_to(class_D[None, None, None], (b, tiles, 1, d))
    position_SD = self.position_embedding[...].astype(patches_BLPD.dtype)
    return jnp.concatenate([class_BL1D, patches_BLPD], axis=2) + position_SD[None, None]


def pixel_shuffle(x_BLPD: jax.Array, side: int) -> jax.Array:
  """Returns [B, L, P / 4, 4 D]: 2 x 2 neighbours concatenated, in reading order ("v2")."""
  # With four patches per side, token 1 is made of the patches 2, 3, 6 and 7.
  b, tiles, p, d = x_BLPD.shape
  half = side // 2
  x = x_BLPD.reshape(b, tiles, half, 2, half, 2, d)
  return jnp.swapaxes(x, 3, 4).reshape(b, tiles, p // 4, 4 * d)


def _kept(key: jax.Array, layers: int, shape: tuple[int, ...], rate: float) -> jax.Array:
  """Returns float32 [layers, B, L, 2]: 0 for a dropped branch, else 1 / its probability of being kept."""
  stays_F111 = 1 - jnp.linspace(0, rate, layers)[:, None, None, None]
  kept_FBL2 = jax.random.uniform(key, (layers, *shape, 2)) < stays_F111
  return kept_FBL2 / stays_F111
