"""Attention on GPU: the Triton kernel of JAX (Pallas), whose mask is made from segment ids.

Why not cuDNN: `jax.nn.dot_product_attention` hands it T x T masks only, and its packed layout, which
JAX does not export, wants a Hopper GPU and samples without gaps; the patch slots of an image have some.

Only its interpreted form has been run, on CPU, and its lowering for CUDA; no GPU was at hand.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.attention import mha

from bis_jax.parallel.sharding import split_attention

_BLOCK = 128  # tokens of a block; a row is padded to a multiple


def triton_attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segment_BT: jax.Array,
  *,
  causal: bool,
  interpret: bool = False,
) -> jax.Array:
  """Returns softmax(q k / sqrt(H)) v [B, T, N, H] within segments; see `attention.attention`.

  Args:
    q_BTNH: queries; head n reads key head n // (N / K).
    k_BTKH: keys.
    v_BTKH: values.
    segment_BT: int32, the segment of each token.
    causal: tokens see only themselves and what stands before them in the row.
    interpret: run the kernel step by step on any platform, to test it.
  """
  local = functools.partial(_local, causal=causal, interpret=interpret)
  return split_attention(local, q_BTNH, k_BTKH, v_BTKH, segment_BT)


def _local(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segment_BT: jax.Array,
  causal: bool,
  interpret: bool,
) -> jax.Array:
  """The attention of one device's rows and heads; the kernel wants a key head a query head."""
  t, n, h = q_BTNH.shape[1:]
  pad = -t % _BLOCK
  group = n // k_BTKH.shape[2]
  q_BTNH, k_BTNH, v_BTNH = (
    jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
    for x in (q_BTNH, jnp.repeat(k_BTKH, group, axis=2), jnp.repeat(v_BTKH, group, axis=2))
  )
  segment_BT = jnp.pad(segment_BT, ((0, 0), (0, pad)), constant_values=-1)
  out_BTNH = mha(
    q_BTNH, k_BTNH, v_BTNH, segment_BT, sm_scale=h**-0.5, causal=causal, interpret=interpret
  )
  return out_BTNH[:, :t]
