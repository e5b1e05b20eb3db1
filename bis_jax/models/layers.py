"""Layers that every backbone shares: linear, embedding, norms, gated MLP, rotary embedding.

Parameters are stored in `param_dtype` and used in `dtype`. Where Transformers computes in float32
(norm statistics, rotary angles) these layers do too, regardless of `dtype`.
"""

# Array names end in their dims: B rows, T tokens, D width, F mlp, N heads, H head dim, V vocab, C
# input features, E output features, X all tokens (B * T), h half of a head dim.

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bis_jax.models.kernels import CHECKPOINT_NAME
from bis_jax.models.model_config import ModelConfig
from bis_jax.models.quantization import dequantized
from bis_jax.parallel.sharding import split_rows

_kernel_init = nnx.initializers.lecun_normal()
_embedding_init = nnx.initializers.normal(0.02)

_MLP, _PROJECTION = "mlp", "attention_projection"  # products, by what they are part of

_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_offload_dots = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
_keep = jax.checkpoint_policies.save_only_these_names


def _offload(primitive: Any, *avals: Any, **params: Any) -> Any:
  # Keeps attention on the device and products with kernels on the host.
  kept = _keep(CHECKPOINT_NAME)(primitive, *avals, **params)
  return kept or _offload_dots(primitive, *avals, **params)


# From least to most memory: of a layer of Qwen2.5-VL-7B's decoder they keep 1, 2, 4.3, 12.6 and 14.9
# times its input, and recompute 71 %, none, 58 %, 14 % and none of the forward pass's products.
_REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "offload": _offload,
  "attention": _keep(CHECKPOINT_NAME, _PROJECTION),
  "mlp": _keep(CHECKPOINT_NAME, _MLP),
  "dots": jax.checkpoint_policies.save_from_both_policies(_dots, _keep(CHECKPOINT_NAME)),
}
REMATS = (*_REMAT_POLICIES, "none")


class Linear(nnx.Module):
  """Returns x @ kernel (+ bias) in `dtype`; kernel [C, E], the transpose of torch's weight."""

  lora: Any = None  # set by `adaptation`, as are the next four
  lora_scale = 1.0
  dropout = 0.0
  dropout_key: Any = None
  kernel_scale: Any = None

  def __init__(self, c: int, e: int, config: ModelConfig, rngs: nnx.Rngs, *, use_bias: bool):
    self.kernel = nnx.Param(_kernel_init(rngs.params(), (c, e), config.param_dtype))
    self.bias = nnx.Param(jnp.zeros((e,), config.param_dtype)) if use_bias else None
    self.dtype = config.dtype

  def __call__(self, x_BTC: jax.Array) -> jax.Array:
    # Flat, because otherwise XLA's CPU backend takes the kernel's gradient, a sum over both B and T,
    # through strided copies: a toy training step took half as long again.
    x_XC = x_BTC.astype(self.dtype).reshape(-1, x_BTC.shape[-1])
    y_XE = jnp.dot(x_XC, self._kernel())
    if self.bias is not None:
      y_XE += self.bias[...].astype(self.dtype)[None]
    if self.lora is not None:
      if self.dropout_key is not None:
        x_XC = nnx.Dropout(self.dropout)(x_XC, rngs=nnx.Rngs(dropout=self.dropout_key))
      y_XE += self.lora_scale * self.lora(x_XC)
    return y_XE.reshape(*x_BTC.shape[:-1], -1)

  def _kernel(self) -> jax.Array:
    if self.kernel_scale is None:
      return self.kernel[...].astype(self.dtype)
    return dequantized(self.kernel[...], self.kernel_scale[...], self.dtype)


class Embedding(nnx.Module):
  """Returns the rows of a table [V, D] in `dtype`; rows are gathered before they are cast."""

  marker: Any = None  # [D], in place of the row `marker_token`; set by `adaptation`
  marker_token = -1

  def __init__(self, vocab_size: int, width: int, config: ModelConfig, rngs: nnx.Rngs):
    table = _embedding_init(rngs.params(), (vocab_size, width), config.param_dtype)
    self.embedding = nnx.Param(table)
    self.dtype = config.dtype

  def __call__(self, tokens_BT: jax.Array) -> jax.Array:
    x_BTD = self.embedding[...][tokens_BT].astype(self.dtype)
    if self.marker is None:
      return x_BTD
    is_marker_BT1 = (tokens_BT == self.marker_token)[..., None]
    return jnp.where(is_marker_BT1, self.marker[...].astype(self.dtype)[None, None], x_BTD)


class RMSNorm(nnx.Module):
  """Returns x / rms(x) * scale: statistics in float32, the product with `scale` in `dtype`."""

  # Source: Qwen2_5_VLRMSNorm in Transformers, rounding included.

  def __init__(self, width: int, epsilon: float, config: ModelConfig):
    self.scale = nnx.Param(jnp.ones((width,), config.param_dtype))
    self.epsilon = epsilon
    self.dtype = config.dtype

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    y_BTD = _over_rms(x_BTD.astype(jnp.float32), self.epsilon).astype(self.dtype)
    return y_BTD * _lead(self.scale[...].astype(self.dtype), y_BTD.ndim)


class LayerNorm(RMSNorm):
  """Returns (x - mean) / sqrt(variance + epsilon) * scale + bias, computed in float32."""

  def __init__(self, width: int, epsilon: float, config: ModelConfig):
    super().__init__(width, epsilon, config)
    self.bias = nnx.Param(jnp.zeros((width,), config.param_dtype))

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    x32_BTD = x_BTD.astype(jnp.float32)
    y_BTD = _over_rms(x32_BTD - jnp.mean(x32_BTD, axis=-1, keepdims=True), self.epsilon)
    scale, bias = (_lead(p[...].astype(jnp.float32), y_BTD.ndim) for p in (self.scale, self.bias))
    return (y_BTD * scale + bias).astype(self.dtype)


def _over_rms(x32_BTD: jax.Array, epsilon: float) -> jax.Array:
  return x32_BTD * jax.lax.rsqrt(jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True) + epsilon)


def _lead(x_D: jax.Array, ndim: int) -> jax.Array:
  return jnp.expand_dims(x_D, range(ndim - 1))


class GatedMLP(nnx.Module):
  """Returns down(silu(gate(x)) * up(x)), width D to F and back."""

  def __init__(
    self, width: int, hidden: int, config: ModelConfig, rngs: nnx.Rngs, *, use_bias: bool
  ):
    self.gate_proj = Linear(width, hidden, config, rngs, use_bias=use_bias)
    self.up_proj = Linear(width, hidden, config, rngs, use_bias=use_bias)
    self.down_proj = Linear(hidden, width, config, rngs, use_bias=use_bias)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    gate_BTF, up_BTF = (
      checkpoint_name(proj(x_BTD), _MLP) for proj in (self.gate_proj, self.up_proj)
    )
    return self.down_proj(jax.nn.silu(gate_BTF) * up_BTF)


class MLP(nnx.Module):
  """Returns fc2(gelu(fc1(x))), width D to F to E."""

  approximate = False  # gelu by tanh

  def __init__(self, width: int, hidden: int, out: int, config: ModelConfig, rngs: nnx.Rngs):
    self.fc1 = Linear(width, hidden, config, rngs, use_bias=True)
    self.fc2 = Linear(hidden, out, config, rngs, use_bias=True)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    x_BTF = checkpoint_name(self.fc1(x_BTD), _MLP)
    return self.fc2(jax.nn.gelu(x_BTF, approximate=self.approximate))


def projection(x_BTE: jax.Array) -> jax.Array:
  """Returns x, a product into or out of attention, which remat "attention" keeps."""
  return checkpoint_name(x_BTE, _PROJECTION)


def rotate(x_BTNH: jax.Array, cos_BTh: jax.Array, sin_BTh: jax.Array) -> jax.Array:
  """Returns x with feature i and i + H/2 of each head turned by angle i, computed in float32."""
  # Source: `rotate_half` in Transformers, whose cos and sin are these, written twice.
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


def scan(apply: Callable[..., Any], layers: Any, x: jax.Array, *carried: Any) -> Any:
  """Returns x [B, ...] after `apply(layer, x)` for every layer of a stack, in order.

  With `carried`, (x, *carried) after `apply(layer, x, *carried)`, which returns both.
  """

  def step(before: tuple[Any, ...], layer: Any) -> tuple[tuple[Any, ...], None]:
    after = apply(layer, *before)
    x, *rest = after if carried else (after,)
    return (split_rows(x), *rest), None

  def cast(path: tuple[Any, ...], array: jax.Array) -> jax.Array:
    # Before the loop, on the shards: otherwise every layer's kernels are gathered in float32.
    # Quantized ones are small, and cast layer by layer.
    is_kernel = "kernel" in jax.tree_util.keystr(path)
    is_kernel &= jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(x.dtype) if is_kernel else array

  cast_layers = jax.tree_util.tree_map_with_path(cast, layers)
  after, _ = jax.lax.scan(step, (split_rows(x), *carried), cast_layers)
  return after if carried else after[0]


def rematerialized(apply: Callable[..., jax.Array], remat: str) -> Callable[..., jax.Array]:
  """Returns one layer's computation, for a `scan`, with a backward pass that recomputes.

  What it recomputes: "none"; "dots", all but products with kernels and, on TPU, attention; "mlp"
  and "attention", all but the products of the one and, on TPU, attention; "offload", as "dots", with
  those products saved in the host's memory, on TPU; "full", all but the layer's input; "auto", as
  "dots" on TPU, else "full".
  """
  if remat == "auto":
    remat = "dots" if jax.default_backend() == "tpu" else "full"
  if remat == "none":
    return apply
  return jax.checkpoint(apply, policy=_REMAT_POLICIES[remat], prevent_cse=False)
