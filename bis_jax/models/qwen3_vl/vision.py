"""The vision tower of Qwen3-VL: patches in merge units in, merged features of several depths out.

Source: Qwen3VLVisionModel in Transformers.
"""

# Array names end in their dims: B rows, P patch slots, C values per patch, D width, h half of a head
# dim, M merged features (P / 4), K = 4 learned positions around a patch.

import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from bis_jax.models.layers import MLP, Embedding, LayerNorm, Linear, rematerialized, scan, stack
from bis_jax.models.qwen2_5_vl.vision import VisionAttention, axial_rope
from bis_jax.models.qwen3_vl.config import Qwen3VLConfig


class VisionMLP(MLP):
  approximate = True


class VisionBlock(nnx.Module):
  """Attention within whole images, and an MLP."""

  def __init__(self, config: Qwen3VLConfig, rngs: nnx.Rngs):
    vision, width = config.vision, config.vision.hidden_size
    self.norm1 = LayerNorm(width, vision.layer_norm_eps, config)
    self.norm2 = LayerNorm(width, vision.layer_norm_eps, config)
    self.attn = VisionAttention(config, rngs)
    self.mlp = VisionMLP(width, vision.intermediate_size, width, config, rngs)

  def __call__(
    self, x_BPD: jax.Array, rope: tuple[jax.Array, jax.Array], patch_segment_BP: jax.Array
  ) -> jax.Array:
    x_BPD += self.attn(self.norm1(x_BPD), rope, patch_segment_BP, patch_segment_BP, full=True)
    return x_BPD + self.mlp(self.norm2(x_BPD))


class PatchMerger(MLP):
  """Returns features [B, M, D of the text] of merge units; normed by patch, or `whole`."""

  def __init__(self, config: Qwen3VLConfig, rngs: nnx.Rngs, *, whole: bool):
    vision = config.vision
    width = vision.hidden_size * vision.spatial_merge_size**2
    self.norm = LayerNorm(width if whole else vision.hidden_size, vision.layer_norm_eps, config)
    self.width = width
    super().__init__(width, width, config.text.hidden_size, config, rngs)

  def __call__(self, x_BPD: jax.Array) -> jax.Array:
    b = len(x_BPD)
    x = x_BPD.reshape(b, -1, self.norm.scale.shape[0])
    return super().__call__(self.norm(x).reshape(b, -1, self.width))


class VisionTower(nnx.Module):
  """Returns [B, M, (1 + F) D of the text]: features of the last block, then of F earlier ones."""

  # Slots without an image give finite features that no token reads.

  def __init__(self, config: Qwen3VLConfig, rngs: nnx.Rngs):
    vision = config.vision
    # A linear layer is the 3-D convolution of the source, whose patches do not overlap.
    proj = Linear(vision.patch_values, vision.hidden_size, config, rngs, use_bias=True)
    self.patch_embed = nnx.Dict({"proj": proj})
    self.pos_embed = Embedding(vision.num_position_embeddings, vision.hidden_size, config, rngs)
    self.blocks = stack(functools.partial(VisionBlock, config), vision.depth, rngs)
    self.merger = PatchMerger(config, rngs, whole=False)
    self.deepstack_merger_list = stack(
      functools.partial(PatchMerger, config, whole=True),
      len(vision.deepstack_visual_indexes),
      rngs,
    )
    self.config = config

  def __call__(
    self,
    patches_BPC: jax.Array,
    patch_position_BP2: jax.Array,
    patch_grid_BP2: jax.Array,
    patch_segment_BP: jax.Array,
  ) -> jax.Array:
    """`patch_position` are the row and column of a patch, `patch_grid` the numbers of its image."""
    vision = self.config.vision
    rope = axial_rope(patch_position_BP2, vision.head_dim, vision.rope_theta)
    x_BPD = self.embed(patches_BPC, patch_position_BP2, patch_grid_BP2)
    apply = rematerialized(
      lambda block, x_BPD: block(x_BPD, rope, patch_segment_BP), self.config.remat
    )
    features, taken = [], [index + 1 for index in vision.deepstack_visual_indexes]
    for number, (start, stop) in enumerate(itertools.pairwise((0, *taken, vision.depth))):
      part = slice(start, stop)
      x_BPD = scan(apply, jax.tree.map(lambda array, part=part: array[part], self.blocks), x_BPD)
      if number < len(taken):
        merger = jax.tree.map(lambda array, i=number: array[i], self.deepstack_merger_list)
        features.append(merger(x_BPD))
    return jnp.concatenate([self.merger(x_BPD), *features], axis=-1)

  def embed(
    self, patches_BPC: jax.Array, position_BP2: jax.Array, grid_BP2: jax.Array
  ) -> jax.Array:
    """Returns the states [B, P, D] before the first block: patches and their learned positions."""
    x_BPD = self.patch_embed["proj"](patches_BPC)
    # The table's corners are the image's; a patch takes the four around it by nearness.
    side = self.config.vision.grid_side
    place_BP2 = position_BP2 * (side - 1) / jnp.maximum(grid_BP2 - 1, 1).astype(jnp.float32)
    low_BP2 = jnp.floor(place_BP2)
    table, position_BPD = self.pos_embed.embedding[...], jnp.float32(0)
    for corner in itertools.product((0, 1), repeat=2):
      at_BP2 = low_BP2 + jnp.array(corner, jnp.float32)[None, None]
      weight_BP = jnp.prod(1 - jnp.abs(place_BP2 - at_BP2), axis=-1)
      row_BP, column_BP = jnp.moveaxis(jnp.clip(at_BP2, 0, side - 1).astype(jnp.int32), -1, 0)
      position_BPD += table[row_BP * side + column_BP] * weight_BP[..., None]
    return x_BPD + position_BPD.astype(x_BPD.dtype)
