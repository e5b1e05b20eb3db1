"""Attention over packed rows: tokens see only tokens of their own segment.

A segment is one sample (text) or one image (vision) of a row; padding is segment 0, so its output
is finite and does not affect a sample. Masks are made from segment ids, never passed as T x T
arrays.

In rows with streams (see `inputs.rows`) a segment is a group of samples: its prefix, which they
share, in the first part of the row, and one continuation in a stream. The prefix attends to itself, a
continuation to its group's prefix and to itself.
"""

# Array names end in their dims: B rows, T queries, S keys, N query heads, K key and value heads, G
# query heads per key head (N = K * G), H head dim, P patches, W windows, c queries of a chunk, x =
# G * c; in `stream_attention` also F tokens of the prefixes, L streams, R tokens of a stream.

import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bis_jax.errors import UserError
from bis_jax.models.kernels import splash_attention, tokamax_attention

WINDOW = 64  # patch slots of a window block: (window_size / patch_size) ** 2 of Qwen2.5-VL

_MASKED = -1e30  # finite, so that a query without any key stays finite; exp() of it is exactly 0
_MIN_CHUNK = 256  # queries whose scores are held at once, in the XLA backend
_MAX_CHUNKS = 16  # of a row; beyond, chunks grow, so that programs do not


class BackendError(UserError):
  """A kernel that this platform cannot run."""


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segment_BT: jax.Array,
  key_segment_BS: jax.Array | None = None,
  *,
  causal: bool,
  backend: str = "auto",
) -> jax.Array:
  """Returns softmax(q k / sqrt(H)) v [B, T, N, H] within segments, softmax in float32.

  Query head n reads key head n // (N / K). If `causal`, the queries are the last T of the S tokens,
  whose segments are `key_segment_BS` (None: T = S). `backend` is a name of BACKENDS, or "auto", by
  the platform of this process. Kernels can be compiled on a machine without their platform, but not
  run.
  """
  if backend == "auto":
    backend = _backend_here(q_BTNH.dtype)
  if backend not in BACKENDS:
    raise ValueError(f"attention has no backend {backend!r}: use 'auto' or one of {[*BACKENDS]}")
  if key_segment_BS is None:
    key_segment_BS = segment_BT
  return BACKENDS[backend](q_BTNH, k_BSKH, v_BSKH, segment_BT, key_segment_BS, causal=causal)


def stream_attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segment_BT: jax.Array,
  streams: tuple[int, int],
  *,
  backend: str,
) -> jax.Array:
  """Returns causal attention [B, T, N, H] of rows with `streams`, (number, tokens of each)."""
  (b, t), (number, length) = segment_BT.shape, streams
  if not number:
    return attention(q_BTNH, k_BTKH, v_BTKH, segment_BT, causal=True, backend=backend)
  first = t - number * length
  arrays = q_BTNH, k_BTKH, v_BTKH, segment_BT
  prefix = tuple(x_BT[:, :first] for x_BT in arrays)
  q_BLRNH, *own = (x_BT[:, first:].reshape(b, number, length, *x_BT.shape[2:]) for x_BT in arrays)

  def keys(prefix_BF: jax.Array, own_BLR: jax.Array) -> jax.Array:
    prefix_BLF = jnp.broadcast_to(prefix_BF[:, None], (b, number, *prefix_BF.shape[1:]))
    every = jnp.concatenate([prefix_BLF, own_BLR], axis=2)
    return every.reshape(b * number, first + length, *own_BLR.shape[3:])

  k, v, key_segment = map(keys, prefix[1:], own)
  segment = own[2].reshape(b * number, length)
  q = q_BLRNH.reshape(b * number, length, *q_BTNH.shape[2:])
  out = attention(q, k, v, segment, key_segment, causal=True, backend=backend)
  out_BF = attention(*prefix, causal=True, backend=backend)
  return jnp.concatenate([out_BF, out.reshape(b, t - first, *q_BTNH.shape[2:])], axis=1)


def _backend_here(dtype: jnp.dtype) -> str:
  platform = jax.default_backend()
  if platform == "gpu":  # tokamax's kernels are for 16 bits, their gradients for Hopper and later
    capability = float(jax.devices()[0].compute_capability)
    return "tokamax" if capability >= 9 and dtype.itemsize == 2 else "xla"
  return "splash" if platform == "tpu" else "xla"


def check_backend(backend: str, platform: str) -> None:
  """Raises BackendError if a platform ("cpu", "gpu", "tpu") does not run a backend."""
  if platform == "gpu" and "xla" not in backend and importlib.util.find_spec("tokamax") is None:
    raise BackendError(
      "attention on GPUs needs tokamax, which is not installed: pip install -e '.[cuda]'"
    )
  wanted = _PLATFORMS.get(backend, platform)
  if wanted != platform:
    raise BackendError(
      f"config.model.attention is {backend!r}, a kernel for {wanted}, but this is {platform}: set it "
      "to 'auto'"
    )


def window_attention(
  q_BPNH: jax.Array, k_BPNH: jax.Array, v_BPNH: jax.Array, window_BP: jax.Array
) -> jax.Array:
  """Returns full attention [B, P, N, H] within windows, none of which straddles a block of 64."""
  b, p, n, h = q_BPNH.shape
  q_BWPNH, k_BWPNH, v_BWPNH = (
    x.reshape(b, p // WINDOW, WINDOW, n, h) for x in (q_BPNH, k_BPNH, v_BPNH)
  )
  window_BWP = window_BP.reshape(b, p // WINDOW, WINDOW)
  mask_BWPP = window_BWP[..., :, None] == window_BWP[..., None, :]
  return _attend(q_BWPNH, k_BWPNH, v_BWPNH, mask_BWPP).reshape(b, p, n, h)


def _attend(q_TNH: jax.Array, k_SKH: jax.Array, v_SKH: jax.Array, mask_TS: jax.Array) -> jax.Array:
  # Holds all scores at once; every array may have the same leading axes.
  *lead, t, n, h = q_TNH.shape
  s, k = k_SKH.shape[-3:-1]
  # Heads first, and the queries of a key head in one axis: the scores, by far the largest array,
  # then come out of the product in their final layout, without a transpose.
  q_KtH = jnp.moveaxis(q_TNH, -3, -2).reshape(*lead, k, n // k * t, h)
  k_KSH, v_KSH = jnp.moveaxis(k_SKH, -3, -2), jnp.moveaxis(v_SKH, -3, -2)
  scores_KtS = jnp.einsum("...th,...sh->...ts", q_KtH, k_KSH, preferred_element_type=jnp.float32)
  scores_KGTS = scores_KtS.reshape(*lead, k, n // k, t, s) * h**-0.5
  scores_KGTS = jnp.where(mask_TS[..., None, None, :, :], scores_KGTS, _MASKED)
  probs_KGTS = jax.nn.softmax(scores_KGTS, axis=-1).astype(v_SKH.dtype)
  out_KtH = jnp.einsum("...ts,...sh->...th", probs_KGTS.reshape(scores_KtS.shape), v_KSH)
  return jnp.moveaxis(out_KtH.reshape(*lead, n, t, h), -3, -2)


def _xla(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segment_BT: jax.Array,
  segment_BS: jax.Array,
  *,
  causal: bool,
  chunk: int = _MIN_CHUNK,
) -> jax.Array:
  # One chunk of queries at a time; a causal chunk reads no later key.
  b, t, n, h = q_BTNH.shape
  s, k = k_BSKH.shape[1:3]
  q_BKGTH = jnp.moveaxis(q_BTNH, 1, 2).reshape(b, k, n // k, t, h)
  k_BKSH, v_BKSH = jnp.moveaxis(k_BSKH, 1, 2), jnp.moveaxis(v_BSKH, 1, 2)
  size = max(chunk, -(-t // _MAX_CHUNKS))
  chunks = []
  for start in range(0, t, size):
    stop = min(start + size, t)
    seen = s - t + stop if causal else s
    chunks.append(
      _chunk(
        q_BKGTH[:, :, :, start:stop],
        k_BKSH[:, :, :seen],
        v_BKSH[:, :, :seen],
        segment_BT[:, start:stop],
        segment_BS[:, :seen],
        causal,
      )
    )
  out_BKGTH = jnp.concatenate(chunks, axis=3)
  return jnp.moveaxis(out_BKGTH.reshape(b, n, t, h), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _chunk(
  q_BKGcH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  segment_Bc: jax.Array,
  segment_BS: jax.Array,
  causal: bool,
) -> jax.Array:
  """Attention of the last c of S tokens if `causal`, else of any; backward recomputes scores."""
  # Source: FlashAttention (arXiv 2205.14135), algorithm 4.
  return _chunk_forward(q_BKGcH, k_BKSH, v_BKSH, segment_Bc, segment_BS, causal)[0]


def _scores(
  q_BKGcH: jax.Array, k_BKSH: jax.Array, segment_Bc: jax.Array, segment_BS: jax.Array, causal: bool
) -> jax.Array:
  b, k, g, c, h = q_BKGcH.shape
  scores_BKxS = jnp.einsum(  # x: the queries of a key head in one axis
    "bkxh,bksh->bkxs", q_BKGcH.reshape(b, k, g * c, h), k_BKSH, preferred_element_type=jnp.float32
  )
  seen_BcS = segment_Bc[:, :, None] == segment_BS[:, None, :]
  if causal:
    s = segment_BS.shape[1]
    seen_BcS &= (jnp.arange(s - c, s)[:, None] >= jnp.arange(s)[None])[None]
  scores_BKGcS = scores_BKxS.reshape(b, k, g, c, -1) * h**-0.5
  return jnp.where(seen_BcS[:, None, None], scores_BKGcS, _MASKED)


def _chunk_forward(q_BKGcH, k_BKSH, v_BKSH, segment_Bc, segment_BS, causal):
  b, k, g, c, h = q_BKGcH.shape
  scores_BKGcS = _scores(q_BKGcH, k_BKSH, segment_Bc, segment_BS, causal)
  top_BKGc1 = scores_BKGcS.max(axis=-1, keepdims=True)
  exp_BKGcS = jnp.exp(scores_BKGcS - top_BKGc1)
  sum_BKGc1 = exp_BKGcS.sum(axis=-1, keepdims=True)
  exp_BKxS = exp_BKGcS.astype(v_BKSH.dtype).reshape(b, k, g * c, -1)
  out_BKxH = jnp.einsum("bkxs,bksh->bkxh", exp_BKxS, v_BKSH, preferred_element_type=jnp.float32)
  out_BKGcH = (out_BKxH.reshape(b, k, g, c, h) / sum_BKGc1).astype(v_BKSH.dtype)
  log_sum_BKGc1 = top_BKGc1 + jnp.log(sum_BKGc1)
  return out_BKGcH, (q_BKGcH, k_BKSH, v_BKSH, segment_Bc, segment_BS, out_BKGcH, log_sum_BKGc1)


def _chunk_backward(causal, kept, d_out_BKGcH):
  q_BKGcH, k_BKSH, v_BKSH, segment_Bc, segment_BS, out_BKGcH, log_sum_BKGc1 = kept
  b, k, g, c, h = q_BKGcH.shape
  scores_BKGcS = _scores(q_BKGcH, k_BKSH, segment_Bc, segment_BS, causal)
  probs_BKGcS = jnp.exp(scores_BKGcS - log_sum_BKGc1)
  d_out_BKxH = d_out_BKGcH.reshape(b, k, g * c, h)
  d_probs_BKxS = jnp.einsum(
    "bkxh,bksh->bkxs", d_out_BKxH, v_BKSH, preferred_element_type=jnp.float32
  )
  inner_BKGc1 = (d_out_BKGcH.astype(jnp.float32) * out_BKGcH).sum(axis=-1, keepdims=True)
  d_scores_BKGcS = probs_BKGcS * (d_probs_BKxS.reshape(scores_BKGcS.shape) - inner_BKGc1)
  d_scores_BKxS = (d_scores_BKGcS * h**-0.5).astype(q_BKGcH.dtype).reshape(b, k, g * c, -1)
  probs_BKxS = probs_BKGcS.astype(v_BKSH.dtype).reshape(b, k, g * c, -1)
  d_q_BKxH = jnp.einsum("bkxs,bksh->bkxh", d_scores_BKxS, k_BKSH)
  d_k_BKSH = jnp.einsum("bkxs,bkxh->bksh", d_scores_BKxS, q_BKGcH.reshape(b, k, g * c, h))
  d_v_BKSH = jnp.einsum("bkxs,bkxh->bksh", probs_BKxS, d_out_BKxH)
  return d_q_BKxH.reshape(q_BKGcH.shape), d_k_BKSH, d_v_BKSH, None, None


_chunk.defvjp(_chunk_forward, _chunk_backward)


BACKENDS: dict[str, Callable[..., jax.Array]] = {
  "xla": _xla,
  # Scores of a small model then fit a CPU's cache, and fewer are masked.
  "xla_short": functools.partial(_xla, chunk=64),
  "splash": splash_attention,
  "tokamax": tokamax_attention,
}
_PLATFORMS = {"splash": "tpu", "tokamax": "gpu"}  # of kernels; XLA's run on any
