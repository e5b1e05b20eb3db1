"""Low-rank adapters (LoRA) beside frozen kernels, by flax's `nnx.LoRA`, and the frozen dtype.

A rule (regex, "lora") freezes what it matches. In its place train two small kernels beside each
kernel, and the step marker's row of the embedding table:

    language_model.layers.mlp.up_proj.kernel [28, 3584, 18944], frozen
    language_model.layers.mlp.up_proj.lora.lora_a [28, 3584, 16], .lora.lora_b [28, 16, 18944]
    language_model.embed_tokens.embedding [152064, 3584], frozen
    language_model.embed_tokens.marker [3584]
"""

# qwix's LoRA makes its parameters while it watches a model run, and finds kernels by their identity.
# In a scan over stacked layers, whose kernels are cast before it, it finds none.

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bis_jax.models import quantization
from bis_jax.models.hub_layout import EMBEDDING_PATH
from bis_jax.models.layers import Linear, stack
from bis_jax.models.model_config import LORA, Adaptation
from bis_jax.models.param_tree import Params
from bis_jax.models.quantization import SCALE
from bis_jax.parallel.sharding import P

MARKER_PATH = EMBEDDING_PATH.replace(".embedding", ".marker")
ADAPTERS = _A, _B = ".lora.lora_a", ".lora.lora_b"  # in place of ".kernel"


def is_adapter(path: str) -> bool:
  """Returns whether a parameter exists for adaptation only."""
  return path.endswith(ADAPTERS) or path == MARKER_PATH


def is_added(path: str) -> bool:
  """Returns whether a parameter is not in the model without adaptation."""
  return is_adapter(path) or path.endswith(SCALE)


def adapt(model: nnx.Module, own: Adaptation, rngs: nnx.Rngs) -> None:
  """Adds the adapters to a model and casts its parameters."""
  for place, found in [*nnx.iter_modules(model)]:
    module: Any = found
    for name, param in [*vars(module).items()]:
      if not isinstance(param, nnx.Param):
        continue
      path = ".".join(map(str, (*place, name)))
      factor = own.factor(path)
      if factor == LORA and name == "kernel" and isinstance(module, Linear):
        _add(module, own, rngs)
      elif factor == LORA and path == EMBEDDING_PATH:
        module.marker_token = own.marker_token
        module.marker = nnx.Param(module.embedding[own.marker_token])
      if factor in (LORA, 0):
        _freeze(module, name, own.dtype)
      else:
        setattr(module, name, nnx.Param(param[...].astype(own.trained_dtype)))


def _freeze(module: Any, name: str, dtype: str) -> None:
  value = getattr(module, name)[...]
  if dtype in quantization.DTYPES and name == "kernel":
    value, scale = quantization.quantized(value, dtype)
    module.kernel_scale = nnx.Param(scale)
  else:
    value = value.astype(_other(dtype))
  setattr(module, name, nnx.Param(value))


def _other(dtype: str) -> str:
  """Returns the dtype of frozen parameters that are no kernels, and of kernels before they are quantized."""
  return "bfloat16" if dtype in quantization.DTYPES else dtype


def _add(linear: Linear, own: Adaptation, rngs: nnx.Rngs) -> None:
  *layers, c, e = linear.kernel.shape
  sizes, dtypes = (c, own.rank, e), {"dtype": linear.dtype, "param_dtype": linear.kernel.dtype}

  def make(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.LoRA(*sizes, **dtypes, rngs=rngs)

  linear.lora = stack(make, layers[0], rngs) if layers else make(rngs)
  linear.lora_scale, linear.dropout = own.alpha / own.rank, own.dropout


def draw_dropout(model: nnx.Module, key: jax.Array) -> None:
  """Gives every adapter the keys of its dropout masks, one per layer."""
  adapted = [m for _, m in nnx.iter_modules(model) if isinstance(m, Linear) and m.lora is not None]
  for number, linear in enumerate(adapted):
    own = jax.random.fold_in(key, number)
    linear.dropout_key = nnx.data(jax.random.split(own, linear.kernel.shape[:-2]))


def sharding(rules: Iterable[tuple[str, P]]) -> tuple[tuple[str, P], ...]:
  """Returns the rules of adapters: the axes that they share with their kernels are split alike."""
  adapters: list[tuple[str, P]] = [(MARKER_PATH, P())]
  for pattern, spec in rules:
    if pattern.endswith(r"\.kernel$"):
      stem = pattern.removesuffix(r"\.kernel$")
      adapters.append((stem + re.escape(SCALE) + "$", spec))
      adapters.append((stem + re.escape(_A), P(*spec[:-1], None)))
      adapters.append((stem + re.escape(_B), P(*spec[:-2], None, spec[-1])))
  return tuple(adapters)


def merged(params: Mapping[str, jax.Array], own: Adaptation | None) -> Params:
  """Returns the parameters of the model without adapters, in float32 where there were any."""
  if own is None:
    return dict(params)
  base = {path: value for path, value in params.items() if not is_added(path)}
  for path, scale in params.items():
    if path.endswith(SCALE):
      kernel = path.replace(SCALE, ".kernel")
      base[kernel] = jax.jit(quantization.dequantized, static_argnums=2)(
        base[kernel], scale, "float32"
      )
  if MARKER_PATH in params:
    table_VD = base[EMBEDDING_PATH].astype(jnp.float32)
    base[EMBEDDING_PATH] = table_VD.at[own.marker_token].set(params[MARKER_PATH])
  for path, a in params.items():
    if path.endswith(_A):
      stem = path.removesuffix(_A)
      add = functools.partial(_merge, scale=own.alpha / own.rank)
      base[f"{stem}.kernel"] = jax.jit(add)(base[f"{stem}.kernel"], a, params[stem + _B])
  return base


def _merge(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
  product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
  return kernel.astype(jnp.float32) + scale * product


def stored_shapes(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of what a checkpoint holds of a model: kernels not yet quantized."""
  return {
    path: shape.update(dtype=jnp.bfloat16) if _scale_of(path) in shapes else shape
    for path, shape in shapes.items()
    if not is_added(path)
  }


def quantized(params: Params, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
  """Returns parameters of `stored_shapes` in those of the model; the given kernels are deleted."""
  done = {}
  for path, value in params.items():
    scale = shapes.get(_scale_of(path))
    if scale is None:
      done[path] = value
      continue
    dtype = "nf4" if shapes[path].dtype == jnp.uint4 else "int8"
    done[path], done[_scale_of(path)] = _jitted(dtype, shapes[path].sharding, scale.sharding)(value)
    value.delete()
  return done


@functools.cache  # kernels of one shape share a program
def _jitted(dtype: str, *places: jax.sharding.Sharding) -> jax.stages.Wrapped:
  return jax.jit(functools.partial(quantization.quantized, dtype=dtype), out_shardings=places)


def _scale_of(path: str) -> str:
  return path.removesuffix(".kernel") + SCALE
