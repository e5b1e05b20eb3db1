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

_BLOCK = 128  # blocks of splash are multiples; rows are padded to one
_LARGEST_BLOCK = 1024  # tokens

_Kernel = Callable[..., jax.Array]


def _on_each_device(kernel: _Kernel) -> _Kernel:
  """Returns attention by a kernel that takes and returns one device's padded arrays."""

  @functools.wraps(kernel)
  def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_BT: jax.Array,
    segment_BS: jax.Array | None = None,
    *,
    causal: bool,
    interpret: bool = False,
  ) -> jax.Array:
    t, s = q_BTNH.shape[1], k_BSKH.shape[1]

    def local(*arrays: jax.Array) -> jax.Array:
      padded = (
        jnp.pad(
          x,
          ((0, 0), (0, -x.shape[1] % _BLOCK), *((0, 0),) * (x.ndim - 2)),
          constant_values=-1 if x.ndim == 2 else 0,
        )
        for x in arrays
      )
      return kernel(*padded, s - t if causal else None, interpret)[:, :t]

    segments = segment_BT, segment_BT if segment_BS is None else segment_BS
    return split_attention(local, q_BTNH, k_BSKH, v_BSKH, *segments)

  return attention


# The kernels' `offset` is the first query's place among the keys, or None if attention is not causal.


@_on_each_device
def splash_attention(q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BS, offset, interpret):
  """See `attention.attention`; `interpret` runs the kernel on any platform, for tests."""
  _, t, n, h = q_BTNH.shape
  scaled_BTNH = (q_BTNH.astype(jnp.float32) * h**-0.5).astype(q_BTNH.dtype)
  kernel = _splash_kernel(n, (t, k_BSKH.shape[1]), offset, interpret)

  def row(q_NTH, k_KSH, v_KSH, segment_T, segment_S) -> jax.Array:
    return kernel(q_NTH, k_KSH, v_KSH, segment_ids=splash.SegmentIds(segment_T, segment_S))

  q_BNTH, k_BKSH, v_BKSH = (jnp.swapaxes(x, 1, 2) for x in (scaled_BTNH, k_BSKH, v_BSKH))
  return jnp.swapaxes(jax.vmap(row)(q_BNTH, k_BKSH, v_BKSH, segment_BT, segment_BS), 1, 2)


def _splash_kernel(heads: int, shape: tuple[int, int], offset: int | None, interpret: bool) -> Any:
  """The kernel of one shape, for queries [N, T, H] and keys [K, S, H] of one row."""
  blocks = range(_BLOCK, _LARGEST_BLOCK + 1, _BLOCK)
  q_block, kv_block = (max(block for block in blocks if n % block == 0) for n in shape)
  mask = splash.FullMask(shape) if offset is None else splash.CausalMask(shape, offset)
  sizes = splash.BlockSizes(
    block_q=q_block,
    block_kv=kv_block,
    block_q_dkv=q_block,
    block_kv_dkv=kv_block,
    use_fused_bwd_kernel=True,
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
def tokamax_attention(q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BS, offset, interpret):
  """As `splash_attention`; segments are contiguous, but for slots of segment 0 and prefixes."""
  # tokamax exports its attention without ranges of keys, hence its private modules. `interpret`
  # takes its XLA implementation.
  from tokamax._src.ops.attention import api, base

  if offset:  # keys of a prefix are apart from those of its continuation: bring them together
    order_BS = jnp.argsort(segment_BS, axis=1, stable=True)
    k_BSKH, v_BSKH = (
      jnp.take_along_axis(x, order_BS[:, :, None, None], axis=1) for x in (k_BSKH, v_BSKH)
    )
    place_BS = jnp.argsort(order_BS, axis=1)[:, offset : offset + segment_BT.shape[1]]
    place_BT = jnp.pad(place_BS, ((0, 0), (0, segment_BT.shape[1] - place_BS.shape[1])))
    start_BT = (segment_BS[:, None, :] < segment_BT[:, :, None]).sum(axis=-1, dtype=jnp.int32)
    mask = base.Mask(k_start=start_BT[:, None], k_end=place_BT[:, None] + 1)
  else:
    start_BT, end_BT = _ranges(segment_BT)
    mask = base.Mask(k_start=start_BT[:, None], is_causal=True)
    if offset is None:  # an image has empty slots between its patches
      used_B11S = (segment_BT > 0)[:, None, None]
      mask = base.Mask(used_B11S, k_start=start_BT[:, None], k_end=end_BT[:, None])
  kernel = api.IMPLEMENTATIONS["xla" if interpret else "mosaic_gpu"]
  with jax.numpy_rank_promotion("allow"):
    return kernel(q_BTNH, k_BSKH, v_BSKH, mask=mask)


def _ranges(segment_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns, for every slot, the first slot of its segment and the first after it, int32[B, T]."""
  # Empty slots count as the segment before them. XLA fuses the comparisons into the sums.
  segment_BT = jax.lax.cummax(segment_BT, axis=1)
  before_BTS = segment_BT[:, None, :] < segment_BT[:, :, None]
  until_BTS = segment_BT[:, None, :] <= segment_BT[:, :, None]
  return before_BTS.sum(axis=-1, dtype=jnp.int32), until_BTS.sum(axis=-1, dtype=jnp.int32)
