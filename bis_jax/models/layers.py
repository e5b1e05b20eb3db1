"""Layers that every backbone shares: linear, embedding, norms, gated MLP, rotary embedding.

Parameters are stored in `param_dtype` and used in `dtype`. Where Transformers computes in float32
(norm statistics, rotary angles) these layers do too, whatever `dtype` is.

Array names end in their dims: B rows, T tokens, D width, F mlp, N heads, H head dim, V vocab,
C input features, E output features, X all tokens (B * T), h half of a head dim.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bis_jax.models.kernels import CHECKPOINT_NAME
from bis_jax.parallel.sharding import split_rows

_kernel_init = nnx.initializers.lecun_normal()
_embedding_init = nnx.initializers.normal(0.02)

_offload_dots = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
_keep_attention = jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)


def _offload(primitive: Any, *avals: Any, **params: Any) -> Any:
  """The policy that keeps attention on the device and products with kernels on the host."""
  kept = _keep_attention(primitive, *avals, **params)
  return kept or _offload_dots(primitive, *avals, **params)


_REMAT_POLICIES = {
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    _keep_attention,
  ),
  "offload": _offload,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Linear(nnx.Module):
  """Returns x @ kernel (+ bias) in `dtype`; kernel [C, E], the transpose of torch's weight."""

  def __init__(
    self, c: int, e: int, *, use_bias: bool, dtype: str, param_dtype: str, rngs: nnx.Rngs
  ):
    self.kernel = nnx.Param(_kernel_init(rngs.params(), (c, e), param_dtype))
    self.bias = nnx.Param(jnp.zeros((e,), param_dtype)) if use_bias else None
    self.dtype = dtype

  def __call__(self, x_BTC: jax.Array) -> jax.Array:
    # Flat, because XLA's CPU backend else takes the kernel's gradient, a sum over both B and T,
    # through strided copies: a toy training step took half as long again.
    x_XC = x_BTC.astype(self.dtype).reshape(-1, x_BTC.shape[-1])
    y_XE = jnp.dot(x_XC, self.kernel[...].astype(self.dtype))
    if self.bias is not None:
      y_XE += self.bias[...].astype(self.dtype)[None]
    return y_XE.reshape(*x_BTC.shape[:-1], -1)


class Embedding(nnx.Module):
  """Returns the rows of a table [V, D] in `dtype`; rows are gathered before they are cast."""

  def __init__(self, vocab_size: int, width: int, *, dtype: str, param_dtype: str, rngs: nnx.Rngs):
    self.embedding = nnx.Param(_embedding_init(rngs.params(), (vocab_size, width), param_dtype))
    self.dtype = dtype

  def __call__(self, tokens_BT: jax.Array) -> jax.Array:
    return self.embedding[...][tokens_BT].astype(self.dtype)


class RMSNorm(nnx.Module):
  """Returns x / rms(x) * scale: statistics in float32, the product with `scale` in `dtype`.

  Source: Qwen2_5_VLRMSNorm in Transformers, rounding included.
  """

  def __init__(self, width: int, *, epsilon: float, dtype: str, param_dtype: str):
    self.scale = nnx.Param(jnp.ones((width,), param_dtype))
    self.epsilon = epsilon
    self.dtype = dtype

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    x32_BTD = x_BTD.astype(jnp.float32)
    variance_BT1 = jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True)
    y_BTD = (x32_BTD * jax.lax.rsqrt(variance_BT1 + self.epsilon)).astype(self.dtype)
    scale_D = self.scale[...].astype(self.dtype)
    return y_BTD * jnp.expand_dims(scale_D, range(y_BTD.ndim - 1))


class LayerNorm(nnx.Module):
  """Returns (x - mean) / sqrt(variance + epsilon) * scale + bias, computed in float32."""

  def __init__(self, width: int, *, epsilon: float, dtype: str, param_dtype: str):
    self.scale = nnx.Param(jnp.ones((width,), param_dtype))
    self.bias = nnx.Param(jnp.zeros((width,), param_dtype))
    self.epsilon = epsilon
    self.dtype = dtype

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    x32_BTD = x_BTD.astype(jnp.float32)
    centred_BTD = x32_BTD - jnp.mean(x32_BTD, axis=-1, keepdims=True)
    variance_BT1 = jnp.mean(jnp.square(centred_BTD), axis=-1, keepdims=True)
    y_BTD = centred_BTD * jax.lax.rsqrt(variance_BT1 + self.epsilon)
    scale_D, bias_D = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
    lead = range(y_BTD.ndim - 1)
    y_BTD = y_BTD * jnp.expand_dims(scale_D, lead) + jnp.expand_dims(bias_D, lead)
    return y_BTD.astype(self.dtype)


class GatedMLP(nnx.Module):
  """Returns down(silu(gate(x)) * up(x)), width D to F and back."""

  def __init__(self, width: int, hidden: int, *, use_bias: bool, **kwargs: Any):
    self.gate_proj = Linear(width, hidden, use_bias=use_bias, **kwargs)
    self.up_proj = Linear(width, hidden, use_bias=use_bias, **kwargs)
    self.down_proj = Linear(hidden, width, use_bias=use_bias, **kwargs)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    return self.down_proj(jax.nn.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


def rotate(x_BTNH: jax.Array, cos_BTh: jax.Array, sin_BTh: jax.Array) -> jax.Array:
  """Returns x with feature i and i + H/2 of each head turned by angle i, computed in float32.

  Source: `rotate_half` in Transformers, whose cos and sin are these, written twice.
  """
  first_BTNh, second_BTNh = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  cos_BT1h, sin_BT1h = cos_BTh[:, :, None, :], sin_BTh[:, :, None, :]
  turned = (
    first_BTNh * cos_BT1h - second_BTNh * sin_BT1h,
    second_BTNh * cos_BT1h + first_BTNh * sin_BT1h,
  )
  return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)


def inverse_frequencies(dim: int, theta: float) -> jax.Array:
  """Returns float32 [dim / 2]: theta ** -(0, 2, ..., dim - 2) / dim."""
  return 1.0 / theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
  """Returns one module whose arrays hold `count` layers on a leading axis, ready for `scan`."""
  return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


def scan(
  apply: Callable[[nnx.Module, jax.Array], jax.Array], layers: nnx.Module, x: jax.Array
) -> jax.Array:
  """Returns x [B, ...] after `apply(layer, x)` for every layer of a stack, in order."""
  return jax.lax.scan(lambda x, layer: (split_rows(apply(layer, x)), None), split_rows(x), layers)[
    0
  ]


def rematerialized(apply: Callable[..., jax.Array], remat: str) -> Callable[..., jax.Array]:
  """Returns `apply` with a backward pass that computes again what `remat` says.

  Args:
    apply: one layer's computation, inside a `scan`.
    remat: "none"; "dots", all but products with kernels and, on TPU, attention; "offload", the same,
      with those products kept in the host's memory, on TPU; "full", all but the layer's input.
  """
  if remat == "none":
    return apply
  return jax.checkpoint(apply, policy=_REMAT_POLICIES[remat], prevent_cse=False)
