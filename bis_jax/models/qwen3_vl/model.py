"""Qwen3-VL as a step reward model.

Source: Qwen3VLForConditionalGeneration in Transformers; attribute names are the source's.
"""

# Array names end in their dims: B rows, T tokens, h half of a head dim; see `vision` for the rest.

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bis_jax.models.layers import inverse_frequencies
from bis_jax.models.qwen3_vl.config import Qwen3VLConfig
from bis_jax.models.qwen3_vl.vision import VisionTower
from bis_jax.models.reward_model import Batch, RewardModel


class Qwen3VL(RewardModel):
  """See `RewardModel`."""

  # The tower also reads `patch_position` and `patch_grid` int32[B, P, 2]. `positions` are
  # int32[B, 3, T].

  def __init__(self, config: Qwen3VLConfig, rngs: nnx.Rngs):
    self.visual = VisionTower(config, rngs)
    super().__init__(config, rngs)

  def image_features(self, batch: Batch) -> jax.Array:
    return self.visual(
      batch["patches"], batch["patch_position"], batch["patch_grid"], batch["patch_segment"]
    )

  def rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    text = self.config.text
    return rope(positions, text.head_dim, text.rope_theta, text.mrope_section)


def rope(
  positions_B3T: jax.Array, head_dim: int, theta: float, section: tuple[int, int, int]
) -> tuple[jax.Array, jax.Array]:
  """Returns cosines and sines [B, T, h], each frequency by the position of its axis."""
  # Axes take turns while height and width last: with sections (4, 2, 2) the eight frequencies read
  # the axes [0 1 2 0 1 2 0 0]. Source: Qwen3VLTextRotaryEmbedding in Transformers.
  axis_h = np.zeros(head_dim // 2, np.int32)
  for axis in (1, 2):
    axis_h[axis : 3 * section[axis] : 3] = axis
  positions_BTh = jnp.moveaxis(positions_B3T.astype(jnp.float32), 1, 2)[:, :, axis_h]
  angles_BTh = positions_BTh * inverse_frequencies(head_dim, theta)[None, None]
  return jnp.cos(angles_BTh), jnp.sin(angles_BTh)
