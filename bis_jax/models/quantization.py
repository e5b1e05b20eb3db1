"""Frozen kernels in 8 or 4 bits, by qwix: values [..., C, E], and a scale for every block of C."""

import jax
import jax.numpy as jnp

DTYPES = ("int8", "nf4")
SCALE = ".kernel_scale"  # beside ".kernel"
_BLOCK = (
  64  # as in the QLoRA paper (arXiv 2305.14314); a width that 64 does not divide has smaller ones
)


def quantized(kernel: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
  """Returns the values of a kernel [C, E] or a stack of them, and their bfloat16 scales."""
  import qwix  # takes a second, for runs that quantize alone

  if kernel.ndim > 2:  # one after the other: qwix's search for NF4 values has 16 floats for each
    return jax.lax.map(lambda one: quantized(one, dtype), kernel)
  block = next(n for n in range(_BLOCK, 0, -1) if kernel.shape[0] % n == 0)
  array = qwix.quantize(
    kernel.astype(jnp.float32),
    dtype,
    channelwise_axes=(1,),
    tiled_axes={0: block},
    scale_dtype=jnp.bfloat16,
  )
  return array.qvalue, array.scale


def dequantized(values: jax.Array, scale: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  import qwix

  qtype = "nf4" if values.dtype == jnp.uint4 else values.dtype
  return qwix.dequantize(qwix.QArray(values, scale.astype(dtype), qtype=qtype))
