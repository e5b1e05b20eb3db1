"""The reward head: two logits at every step marker.

The published method reads the LM head's `Yes` and `No` rows at the marker. Two columns with those
rows are the same function and the same gradient, without logits over the whole vocabulary.

Array names end in their dims: B rows, T tokens, D width, R step markers a row.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from bis_jax.models.layers import Linear


class RewardHead(Linear):
  """Returns float32 logits [B, R, 2], positive first, from the normed states [B, R, D]."""

  def __init__(self, width: int, *, param_dtype: str, rngs: nnx.Rngs):
    super().__init__(width, 2, use_bias=False, dtype="float32", param_dtype=param_dtype, rngs=rngs)


def at_markers(x_BTD: jax.Array, marker_index_BR: jax.Array) -> jax.Array:
  """Returns the states [B, R, D] at token positions `marker_index_BR`."""
  return jnp.take_along_axis(x_BTD, marker_index_BR[:, :, None], axis=1)
