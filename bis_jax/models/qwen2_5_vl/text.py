"""The decoder of Qwen2.5-VL: multimodal rotary embedding on the shared decoder.

Source: Qwen2_5_VLTextModel in Transformers.

Array names end in their dims: B rows, T tokens, D width, h half of a head dim.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bis_jax.models.decoder import Decoder
from bis_jax.models.layers import inverse_frequencies


class TextModel(Decoder):
  """Returns the states [B, T, D] after the last layer; the caller applies `norm` where it reads."""

  def __call__(
    self, x_BTD: jax.Array, positions_B3T: jax.Array, segment_BT: jax.Array
  ) -> jax.Array:
    text = self.config.text
    rope = _rope(positions_B3T, text.head_dim, text.rope_theta, text.mrope_section)
    return self.run(x_BTD, rope, segment_BT)


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
