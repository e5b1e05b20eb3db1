"""Attention over packed rows: tokens see only tokens of their own segment.

A segment is one sample (text) or one image (vision) of a row; padding carries segment 0 and is a
segment of its own, so its output is finite and nothing of it reaches a sample. Masks are made from
segment ids, never handed in as T x T arrays.

Array names end in their dims: B rows, T queries, S keys, N query heads, K key and value heads,
G query heads a key head (N = K * G), H head dim, P patches, W windows, c query chunks.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bis_jax.models.splash import splash_attention
from bis_jax.models.triton import triton_attention

WINDOW = 64  # patch slots of a window block: (window_size / patch_size) ** 2 of Qwen2.5-VL

_MASKED = -1e30  # finite, so that a query without any key stays finite; exp() of it is exactly 0
_DIRECT_LENGTH = 1024  # up to here all T x S scores of a row are held at once
_CHUNK = 512  # queries whose scores are held at once beyond that


class BackendError(ValueError):
  """A kernel that this platform does not run."""


def attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segment_BT: jax.Array,
  *,
  causal: bool,
  backend: str = "auto",
) -> jax.Array:
  """Returns softmax(q k / sqrt(H)) v [B, T, N, H] within segments, softmax in float32.

  Args:
    q_BTNH: queries; head n reads key head n // (N / K).
    k_BTKH: keys.
    v_BTKH: values.
    segment_BT: int32, the segment of each token; 0 is padding.
    causal: tokens see only themselves and what stands before them in the row.
    backend: a name of BACKENDS, or "auto", by the platform of this process. Kernels can be
      compiled on a machine without their platform, but run on it alone.

  Raises:
    ValueError: there is no such backend.
  """
  if backend == "auto":
    backend = {"tpu": "splash", "gpu": "triton"}.get(jax.default_backend(), "xla")
  if backend not in BACKENDS:
    raise ValueError(f"attention has no backend {backend!r}: use 'auto' or one of {[*BACKENDS]}")
  return BACKENDS[backend](q_BTNH, k_BTKH, v_BTKH, segment_BT, causal=causal)


def check_backend(backend: str, platform: str) -> None:
  """Raises BackendError where a platform ("cpu", "gpu", "tpu") does not run a backend."""
  wanted = _PLATFORMS.get(backend, platform)
  if wanted != platform:
    raise BackendError(
      f"config.model.attention is {backend!r}, a kernel for {wanted}, but this is {platform}: set it "
      "to 'auto'"
    )


def window_attention(
  q_BPNH: jax.Array, k_BPNH: jax.Array, v_BPNH: jax.Array, window_BP: jax.Array
) -> jax.Array:
  """Returns full attention [B, P, N, H] within windows, none of which straddles a block of 64.

  Args:
    q_BPNH: queries; P is a multiple of 64.
    k_BPNH: keys.
    v_BPNH: values.
    window_BP: int32, the window of each patch slot; 0 is padding.
  """
  b, p, n, h = q_BPNH.shape
  q_BWPNH, k_BWPNH, v_BWPNH = (
    x.reshape(b, p // WINDOW, WINDOW, n, h) for x in (q_BPNH, k_BPNH, v_BPNH)
  )
  window_BWP = window_BP.reshape(b, p // WINDOW, WINDOW)
  mask_BWPP = window_BWP[..., :, None] == window_BWP[..., None, :]
  return _attend(q_BWPNH, k_BWPNH, v_BWPNH, mask_BWPP).reshape(b, p, n, h)


def _attend(q_TNH: jax.Array, k_SKH: jax.Array, v_SKH: jax.Array, mask_TS: jax.Array) -> jax.Array:
  """Attention with all scores held at once; every array may carry the same leading axes."""
  *lead, t, n, h = q_TNH.shape
  s, k = k_SKH.shape[-3:-1]
  # Heads first, and the queries of a key head in one axis: the scores, by far the largest array,
  # then come out of the product as they lie and are never transposed.
  q_KtH = jnp.moveaxis(q_TNH, -3, -2).reshape(*lead, k, n // k * t, h)
  k_KSH, v_KSH = jnp.moveaxis(k_SKH, -3, -2), jnp.moveaxis(v_SKH, -3, -2)
  scores_KtS = jnp.einsum("...th,...sh->...ts", q_KtH, k_KSH, preferred_element_type=jnp.float32)
  scores_KGTS = scores_KtS.reshape(*lead, k, n // k, t, s) * h**-0.5
  scores_KGTS = jnp.where(mask_TS[..., None, None, :, :], scores_KGTS, _MASKED)
  probs_KGTS = jax.nn.softmax(scores_KGTS, axis=-1).astype(v_SKH.dtype)
  out_KtH = jnp.einsum("...ts,...sh->...th", probs_KGTS.reshape(scores_KtS.shape), v_KSH)
  return jnp.moveaxis(out_KtH.reshape(*lead, n, t, h), -3, -2)


def _xla(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_BS: jax.Array, *, causal: bool
) -> jax.Array:
  """Plain XLA: at once for short rows, a scan over chunks of queries for long ones."""
  b, t, n, h = q_BTNH.shape
  index_S = jnp.arange(t)

  def rows(q_BcNH: jax.Array, segment_Bc: jax.Array, index_c: jax.Array) -> jax.Array:
    mask_BcS = segment_Bc[:, :, None] == segment_BS[:, None, :]
    if causal:
      mask_BcS &= (index_c[:, None] >= index_S[None, :])[None]
    return _attend(q_BcNH, k_BSKH, v_BSKH, mask_BcS)

  if t <= _DIRECT_LENGTH:
    return rows(q_BTNH, segment_BS, index_S)

  pad = -t % _CHUNK  # queries past the end; cut off again below
  chunks = (t + pad) // _CHUNK
  q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, pad), (0, 0), (0, 0)))
  segment_BT = jnp.pad(segment_BS, ((0, 0), (0, pad)))
  out_cBTNH = jax.lax.map(
    # The backward pass makes each chunk's scores again instead of keeping all T x S of them.
    lambda chunk: jax.checkpoint(rows)(*chunk),
    (
      jnp.moveaxis(q_BTNH.reshape(b, chunks, _CHUNK, n, h), 1, 0),
      jnp.moveaxis(segment_BT.reshape(b, chunks, _CHUNK), 1, 0),
      jnp.arange(t + pad).reshape(chunks, _CHUNK),
    ),
  )
  return jnp.moveaxis(out_cBTNH, 0, 1).reshape(b, t + pad, n, h)[:, :t]


BACKENDS: dict[str, Callable[..., jax.Array]] = {
  "xla": _xla,
  "splash": splash_attention,
  "triton": triton_attention,
}
_PLATFORMS = {"splash": "tpu", "triton": "gpu"}  # of kernels; "xla" runs on any
