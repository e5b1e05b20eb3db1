"""Attention by kernels that skip the blocks of other segments, and take no T x T mask.

On TPU the splash kernel of JAX, on GPU the Mosaic kernels of tokamax, for Hopper and Blackwell.
Over several devices they need the mesh of the computation in context; see
`sharding.split_attention`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from bis_jax.parallel.sharding import split_attention

# Of splash attention's output and row sums, which `layers.rematerialized` saves if it saves products.
CHECKPOINT_NAME = "splash_attention"

_BLOCKS = (
  1024,
  512,
  256,
  128,
)  # tokens per block of splash; rows are padded to a multiple of the last

_Kernel = Callable[..., jax.Array]


def _on_each_device(kernel: _Kernel) -> _Kernel:
  """Returns attention by a kernel that takes and returns one device's padded arrays."""

  @functools.wraps(kernel)
  def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array,
    *,
    causal: bool,
    interpret: bool = False,
  ) -> jax.Array:
    t = q_BTNH.shape[1]
    pad = (0, -t % _BLOCKS[-1])

    def local(*arrays: jax.Array) -> jax.Array:
      qkv = (jnp.pad(x_BTNH, ((0, 0), pad, (0, 0), (0, 0))) for x_BTNH in arrays[:3])
      segment_BT = jnp.pad(arrays[3], ((0, 0), pad), constant_values=-1)
      return kernel(*qkv, segment_BT, causal, interpret)[:, :t]

    return split_attention(local, q_BTNH, k_BTKH, v_BTKH, segment_BT)

  return attention


@_on_each_device
def splash_attention(q_BTNH, k_BTKH, v_BTKH, segment_BT, causal, interpret):
  """See `attention.attention`; `interpret` runs the kernel on any platform, for tests."""
  _, t, n, h = q_BTNH.shape
  scaled_BTNH = (q_BTNH.astype(jnp.float32) * h**-0.5).astype(q_BTNH.dtype)
  kernel = _splash_kernel(n, t, causal, interpret)

  def row(q_NTH: jax.Array, k_KTH: jax.Array, v_KTH: jax.Array, segment_T: jax.Array) -> jax.Array:
    return kernel(q_NTH, k_KTH, v_KTH, segment_ids=splash.SegmentIds(segment_T, segment_T))

  q_BNTH, k_BKTH, v_BKTH = (jnp.swapaxes(x, 1, 2) for x in (scaled_BTNH, k_BTKH, v_BTKH))
  return jnp.swapaxes(jax.vmap(row)(q_BNTH, k_BKTH, v_BKTH, segment_BT), 1, 2)


def _splash_kernel(heads: int, length: int, causal: bool, interpret: bool) -> Any:
  """The kernel of one shape, for arrays [N, T, H] of one row."""
  block = next(block for block in _BLOCKS if length % block == 0)
  shape = (length, length)
  mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
  sizes = splash.BlockSizes(
    block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
  )
  return splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=CHECKPOINT_NAME,
    interpret=interpret,
  )


@_on_each_device
def tokamax_attention(q_BTNH, k_BTKH, v_BTKH, segment_BT, causal, interpret):
  """As `splash_attention`; segments are contiguous, but for slots of segment 0."""
  # tokamax exports its attention without ranges of keys, hence its private modules. `interpret`
  # takes its XLA implementation.
  from tokamax._src.ops.attention import api, base

  start_BT, end_BT = _ranges(segment_BT)
  mask = base.Mask(k_start=start_BT[:, None], is_causal=True)
  if not causal:  # an image has empty slots between its patches
    used_B11S = (segment_BT > 0)[:, None, None]
    mask = base.Mask(used_B11S, k_start=start_BT[:, None], k_end=end_BT[:, None])
  kernel = api.IMPLEMENTATIONS["xla" if interpret else "mosaic_gpu"]
  with jax.numpy_rank_promotion("allow"):
    return kernel(q_BTNH, k_BTKH, v_BTKH, mask=mask)


def _ranges(segment_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns, for every slot, the first slot of its segment and the first after it, int32[B, T]."""
  # Empty slots count as the segment before them. XLA fuses the comparisons into the sums.
  segment_BT = jax.lax.cummax(segment_BT, axis=1)
  before_BTS = segment_BT[:, None, :] < segment_BT[:, :, None]
  until_BTS = segment_BT[:, None, :] <= segment_BT[:, :, None]
  return before_BTS.sum(axis=-1, dtype=jnp.int32), until_BTS.sum(axis=-1, dtype=jnp.int32)
