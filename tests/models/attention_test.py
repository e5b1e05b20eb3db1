"""Attention: every implementation against a plain loop in float64."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType
from tokamax._src import gpu_utils

from bis_jax.models.attention import BackendError, attention, check_backend, window_attention
from bis_jax.models.kernels import splash_attention, tokamax_attention

B, T, N, K, H = 2, 200, 4, 2, 16


@pytest.fixture(scope="module")
def case():
  """(q, k, v, segments): rows of three and two samples, the second with padding at its end."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K))
  segments = np.ones((B, T), np.int32)
  segments[0, 50:], segments[0, 130:] = 2, 3
  segments[1, 90:], segments[1, 170:] = 2, 0
  return q, k, v, segments


def _reference(q, k, v, segments, causal) -> np.ndarray:
  out = np.zeros(q.shape)
  for b, t, n in np.ndindex(*q.shape[:3]):
    seen = segments[b] == segments[b, t]
    if causal:
      seen &= np.arange(len(seen)) <= t
    keys, values = (x[b, seen, n * k.shape[2] // q.shape[2]].astype(np.float64) for x in (k, v))
    scores = keys @ q[b, t, n] / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max())
    out[b, t, n] = weights @ values / weights.sum()
  return out


def _gradients(f, q, k, v, used=1):
  return jax.jit(jax.grad(lambda q, k, v: (f(q, k, v) * q * used).sum(), argnums=(0, 1, 2)))(
    q, k, v
  )


@pytest.mark.parametrize("causal", [False, True])
def test_equals_a_plain_loop(case, causal):
  """Segments, causality and which key head a query head reads."""
  ours = attention(*case, causal=causal, backend="xla")
  np.testing.assert_allclose(ours, _reference(*case, causal), atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_chunks_of_queries_change_nothing(case, causal):
  """Values and gradients of smaller chunks, the last one not full."""
  q, k, v, segments = case
  at_once, short = (
    functools.partial(attention, segment_BT=segments, causal=causal, backend=backend)
    for backend in ("xla", "xla_short")
  )
  np.testing.assert_allclose(short(q, k, v), at_once(q, k, v), atol=1e-6)
  both = (_gradients(f, q, k, v) for f in (short, at_once))
  for ours, expected in zip(*both, strict=True):
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", [splash_attention, tokamax_attention])
def test_the_kernels_equal_xla(case, causal, kernel):
  """TPU's interpreted, GPU's masks in XLA: values and gradients; T is no multiple of the blocks."""
  q, k, v, segments = case
  if not causal:  # empty slots between the patches of an image
    segments = np.where(np.isin(np.arange(T), [20, 21, 60, 61, 99, 165]), 0, segments)
  used = (segments > 0)[..., None, None]  # no sample reads the output of the others
  ours = functools.partial(kernel, segment_BT=segments, causal=causal, interpret=True)
  xla = functools.partial(attention, segment_BT=segments, causal=causal, backend="xla")
  out = jax.jit(ours)(q, k, v)
  assert np.isfinite(out).all()
  np.testing.assert_allclose(out * used, xla(q, k, v) * used, atol=1e-5)
  for a, b in zip(_gradients(ours, q, k, v, used), _gradients(xla, q, k, v, used), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("kernel", [splash_attention, tokamax_attention])
def test_the_kernels_take_bfloat16(case, kernel):
  q, k, v, segments = case
  rounded = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  out = jax.jit(functools.partial(kernel, causal=True, interpret=True))(*rounded, segments)
  expected = _reference(*(np.asarray(x, np.float64) for x in rounded), segments, True)
  used = segments > 0
  np.testing.assert_allclose(out[used].astype(np.float32), expected[used], atol=2e-2)


@pytest.mark.parametrize("kernel", [splash_attention, tokamax_attention])
def test_the_kernels_run_split_over_a_mesh(case, kernel):
  """Rows over the batch axes, heads over "tensor"."""
  mesh = jax.make_mesh((2, 1, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
  ours = jax.jit(functools.partial(kernel, causal=True, interpret=True))
  with jax.set_mesh(mesh):
    split = ours(*case)
  assert split.sharding.shard_shape(split.shape) == (B // 2, T, N // 2, H)
  used = case[-1] > 0
  np.testing.assert_allclose(split[used], _reference(*case, True)[used], atol=1e-5)


def test_long_rows_never_hold_all_scores():
  """At 8192 tokens no array of the forward or backward pass has T x T entries."""
  t = 8192
  shapes = [jax.ShapeDtypeStruct((1, t, heads, 8), jnp.float32) for heads in (2, 1, 1)]
  segments = jnp.ones((1, t), jnp.int32)
  f = functools.partial(attention, segment_BT=segments, causal=True, backend="xla")
  jaxpr = jax.make_jaxpr(jax.grad(lambda q, k, v: f(q, k, v).sum(), argnums=(0, 1, 2)))(*shapes)
  largest = max(aval.size for aval in _avals(jaxpr.jaxpr))
  assert 512 * t <= largest < t * t


def _avals(jaxpr):
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield variable.aval
    for inner in jaxprs_in_params(equation.params):
      yield from _avals(inner)


def test_windows_are_attention_within_their_block(case):
  """Two windows share a block, a third has one of its own, whose rest is padding."""
  q, k, v, _ = (x[:, :128] for x in case)
  windows = np.zeros((B, 128), np.int32)
  windows[:, :40], windows[:, 40:64], windows[:, 64:100] = 1, 2, 3
  k, v = k.repeat(N // K, axis=2), v.repeat(N // K, axis=2)
  ours = window_attention(q, k, v, windows)
  used = windows[0] > 0
  expected = _reference(q, k, v, windows, causal=False)
  np.testing.assert_allclose(ours[:, used], expected[:, used], atol=1e-5)
  assert np.isfinite(ours).all()


@pytest.mark.parametrize("heads, head_dim, causal", [((28, 4), 128, True), ((16, 16), 80, False)])
def test_the_gpu_kernel_lowers_for_cuda(heads, head_dim, causal, monkeypatch):
  """Forward and backward at the widths of the text and of the vision tower; not compiled."""
  for name in ("has_mosaic_gpu_support", "is_sm90"):  # as on a Hopper GPU
    monkeypatch.setattr(gpu_utils, name, lambda device=None: True)
  q, k = (jax.ShapeDtypeStruct((1, 2048, n, head_dim), jnp.bfloat16) for n in heads)
  segments = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

  def grads(q, k, v, segments):
    f = functools.partial(attention, segment_BT=segments, causal=causal, backend="tokamax")
    return jax.grad(lambda *qkv: f(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)

  text = jax.jit(grads).trace(q, k, k, segments).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @mosaic_gpu") == 3
  assert not re.search(r"2048x2048x(f32|bf16)", text)


def test_a_kernel_of_another_platform_is_named():
  check_backend("auto", "cpu")
  check_backend("splash", "tpu")
  with pytest.raises(BackendError, match="'tokamax', a kernel for gpu, but this is cpu"):
    check_backend("tokamax", "cpu")


def test_a_gpu_without_tokamax_is_told_what_to_install(monkeypatch):
  check_backend("auto", "gpu")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  check_backend("xla", "gpu")
  with pytest.raises(BackendError, match=r"needs tokamax.*\[cuda\]"):
    check_backend("auto", "gpu")


def test_an_unknown_backend_is_named(case):
  with pytest.raises(ValueError, match="no backend 'flash'"):
    attention(*case, causal=True, backend="flash")
