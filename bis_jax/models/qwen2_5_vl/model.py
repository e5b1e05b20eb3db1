"""Qwen2.5-VL as a step reward model.

Source: Qwen2_5_VLForConditionalGeneration in Transformers; attribute names are its own, so that
the key table of `hub_layout` is nearly the identity.
"""

# Array names end in their dims. One legend for the whole package: B rows, T tokens, D width, P
# patch slots, C values per patch, M merged image features (P / 4), N query heads, K key and value
# heads, H head dim, h half of it, F mlp, V vocab, R step markers per row.

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bis_jax.models.layers import inverse_frequencies
from bis_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from bis_jax.models.qwen2_5_vl.vision import VisionTower
from bis_jax.models.reward_model import Batch, RewardModel


class Qwen2_5_VL(RewardModel):
  """See `RewardModel`."""

  # The tower also reads `patch_position` int32[B, P, 2], row and column in patches, and
  # `patch_window` and `patch_segment` int32[B, P], 0 padding. `positions` are int32[B, 3, T].

  def __init__(self, config: Qwen2_5_VLConfig, rngs: nnx.Rngs):
    self.visual = VisionTower(config, rngs)
    super().__init__(config, rngs)

  def image_features(self, batch: Batch) -> jax.Array:
    return self.visual(
      batch["patches"], batch["patch_position"], batch["patch_window"], batch["patch_segment"]
    )

  def rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    text = self.config.text
    return rope(positions, text.head_dim, text.rope_theta, text.mrope_section)


def rope(
  positions_B3T: jax.Array, head_dim: int, theta: float, section: tuple[int, int, int]
) -> tuple[jax.Array, jax.Array]:
  """Returns cosines and sines [B, T, h], each frequency by the position of its section's axis."""
  # With sections (2, 3, 3) the eight frequencies read the axes [0 0 1 1 1 2 2 2]: time, height,
  # width. Source: Qwen2_5_VLTextModel in Transformers.
  axis_h = np.repeat(np.arange(3), section)
  positions_BTh = jnp.moveaxis(positions_B3T.astype(jnp.float32), 1, 2)[:, :, axis_h]
  angles_BTh = positions_BTh * inverse_frequencies(head_dim, theta)[None, None]
  return jnp.cos(angles_BTh), jnp.sin(angles_BTh)
