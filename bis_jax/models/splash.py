"""Attention on TPU: the splash kernel of JAX (Pallas), which skips the blocks that a mask empties.

Over several devices it needs the mesh of the computation in context; see `sharding.split_attention`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernels

from bis_jax.parallel.sharding import split_attention

# Its output and row sums, kept by `layers.rematerialised` where products are kept.
CHECKPOINT_NAME = "splash_attention"

_BLOCKS = (1024, 512, 256, 128)  # tokens of a block, at most; a shorter row is padded to the last


def splash_attention(
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
  """The attention of one device's rows and heads."""
  t, n, h = q_BTNH.shape[1:]
  pad = -t % _BLOCKS[-1]
  scaled_BTNH = (q_BTNH.astype(jnp.float32) * h**-0.5).astype(q_BTNH.dtype)
  q_BNTH, k_BKTH, v_BKTH = (
    jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, pad), (0, 0)))
    for x in (scaled_BTNH, k_BTKH, v_BTKH)
  )
  segment_BT = jnp.pad(segment_BT, ((0, 0), (0, pad)), constant_values=-1)
  kernel = _kernel(n, t + pad, causal, interpret)

  def row(q_NTH: jax.Array, k_KTH: jax.Array, v_KTH: jax.Array, segment_T: jax.Array) -> jax.Array:
    return kernel(q_NTH, k_KTH, v_KTH, segment_ids=kernels.SegmentIds(segment_T, segment_T))

  return jnp.swapaxes(jax.vmap(row)(q_BNTH, k_BKTH, v_BKTH, segment_BT), 1, 2)[:, :t]


def _kernel(heads: int, length: int, causal: bool, interpret: bool) -> Callable[..., jax.Array]:
  """The kernel of one shape, from arrays [N, T, H] of one row."""
  block = next(block for block in _BLOCKS if length % block == 0)
  shape = (length, length)
  mask = kernels.CausalMask(shape) if causal else kernels.FullMask(shape)
  sizes = kernels.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    use_fused_bwd_kernel=True,
  )
  return kernels.make_splash_mha(
    kernels.MultiHeadMask([mask] * heads),
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=CHECKPOINT_NAME,
    interpret=interpret,
  )
