"""The decoder of InternVL: InternLM2.5 or Qwen2.5, the shared decoder with plain rotary embedding.

Sources: LlamaModel (of which InternLM2.5 is a renaming) and Qwen2Model in Transformers.

Array names end in their dims: B rows, T tokens, D width, h half of a head dim.
"""

import jax
import jax.numpy as jnp

from bis_jax.models.decoder import Decoder
from bis_jax.models.layers import inverse_frequencies


class TextModel(Decoder):
  """Returns the states [B, T, D] after the last layer; the caller applies `norm` where it reads."""

  def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segment_BT: jax.Array) -> jax.Array:
    text = self.config.text
    return self.run(x_BTD, rope(positions_BT, text.head_dim, text.rope_theta), segment_BT)


def rope(positions_BT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """Returns cosines and sines [B, T, h] of every position."""
  frequencies_h = inverse_frequencies(head_dim, theta)
  angles_BTh = positions_BT.astype(jnp.float32)[:, :, None] * frequencies_h[None, None]
  return jnp.cos(angles_BTh), jnp.sin(angles_BTh)
