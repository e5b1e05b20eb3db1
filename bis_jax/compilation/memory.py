"""Memory of one device for training, estimated without a compiler, for any accelerator.

Parameters and optimizer state are counted; gradients, activations and buffers are by formulas that
`benchmarks/memory_plan.py` compares with the TPU compiler.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from bis_jax.compilation.compiled_step import device_bytes, packed_rows, step_rows
from bis_jax.errors import UserError
from bis_jax.inputs.rows import device_arrays, empty_batch
from bis_jax.models import backbones, learning_rates
from bis_jax.models.backbone import VISION_TOWER
from bis_jax.models.model_config import LORA, ModelConfig
from bis_jax.models.processor import image_processor
from bis_jax.models.quantization import DTYPES
from bis_jax.parallel.devices import chip_of
from bis_jax.training import optim
from bis_jax.training.train_state import abstract_state, split_trainable

FREE = 0.10  # of a device's memory, to be left free
_VOCABULARY = 512  # token ids in use; only the sizes "tiny" and "toy" depend on it
_UNITS = {"GB": 1e9, "GiB": 2**30}
_GPUS = {f"{size} GB": (size * 1e9, 1) for size in (24, 48, 80, 141)}
_GPUS["8 x 80 GB"] = (80e9, 8)
_SLICES = (
  "v5e:2x4",
  "v5e:4x4",
  "v5e:8x8",
  "v6e:2x2",
  "v6e:2x4",
  "v6e:4x4",
  "v5p:2x2x1",
  "v5p:2x2x4",
)
# Where a recipe may run: the memory of a device, and how many there are.
_PLACES = _GPUS | {
  name: (chip_of(name).hbm_bytes, math.prod(map(int, name.partition(":")[2].split("x"))))
  for name in _SLICES
}
# What makes a step smaller, in the order in which it is advised.
_CHANGES: tuple[dict[str, Any], ...] = (
  {"model.remat": "full", "train.accumulate": 0},
  {"optim.moment_dtype": "bfloat16", "optim.second_moment_dtype": "bfloat16"},
  {"model.trained_dtype": "bfloat16"},
)
_LORA_RULES = ((VISION_TOWER, 0.0), (r"language_model\.", LORA), (r".*", 1.0))


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Bytes on one device, by use, with `rows` rows per micro-batch."""

  uses: dict[str, float]
  rows: int
  micro_batches: int

  @property
  def total(self) -> float:
    return sum(self.uses.values())


def parse(text: str) -> float:
  """Returns the bytes of "80GB" or "80GiB"; raises UserError."""
  found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB)", text)
  if not found:
    raise UserError(f"--memory={text} is not an amount of memory: write --memory=80GB")
  return float(found[1]) * _UNITS[found[2]]


def forms(config: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
  """Yields the config in full, with LoRA and with QLoRA, as the recipes have them."""
  own = any(value == LORA for _, value in config.model.learning_rates)
  plain = ((VISION_TOWER, 0.0), (r".*", 1.0))
  rules = config.model.learning_rates if own else _LORA_RULES
  for name, dtype, chosen in (
    ("full", "float32", plain if own else config.model.learning_rates),
    ("LoRA", "bfloat16", rules),
    ("QLoRA", "nf4", rules),
  ):
    changed = config.copy_and_resolve_references().unlock()
    changed.model.learning_rates, changed.model.frozen_dtype = chosen, dtype
    yield name, changed


def estimate(config: ConfigDict, devices: int) -> Estimate:
  """Returns the memory of a config's step on each of `devices`, over which the mesh's fsdp goes.

  With rematerialization "auto" all is recomputed, as on GPUs, and with 0 micro-batches each has one
  row per device.
  """
  mesh: Any = AbstractMesh(
    (1, devices, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
  )
  model = backbones.model_config(config, _VOCABULARY)
  _, shapes = backbones.structure(model, mesh)
  factors = learning_rates.factors(config, shapes)
  trained, frozen = split_trainable(shapes, factors)
  wide = {path: shape.update(dtype=jax.numpy.float32) for path, shape in trained.items()}
  state = abstract_state(
    optim.optimizer(config.optim, 100, factors), trained, mesh, config.optim.on_host
  )
  rows = step_rows(config, packed_rows(config))
  per_device = max(1, rows // devices)
  accumulate = min(config.train.accumulate or per_device, per_device)
  row = device_arrays(empty_batch(image_processor(config), 1, *packed_rows(config).layout))
  batch = per_device * sum(array.nbytes for array in row.values())
  micro = -(-per_device // accumulate)
  uses = {
    "parameters": device_bytes((trained, frozen)),
    "optimizer state": device_bytes(state.opt_state),
    "batch": batch,
    "gradients": device_bytes(wide) + device_bytes(trained),  # of the step so far, of a micro-batch
    "activations": micro * _row_bytes(model, config),
    "kernels in use": _kernel_bytes(model, shapes),
  }
  if config.optim.on_host:  # a parameter's at a time
    there = abstract_state(optim.optimizer(config.optim, 100, factors), trained, mesh).opt_state
    largest = max(wide, key=lambda path: device_bytes({path: wide[path]}))
    moments = [one[largest] for one in jax.tree.leaves(there, is_leaf=_is_dict) if _is_dict(one)]
    uses["moments in use"] = device_bytes(moments)
  return Estimate(uses, micro, accumulate)


def _is_dict(value: Any) -> bool:
  return isinstance(value, dict)


def _row_bytes(model: ModelConfig, config: ConfigDict) -> float:
  """Bytes of activations of a row: what layers keep, and the working set of one of them."""
  text, size, tokens = model.text, _size(model.dtype), config.inputs.row_tokens
  d, f = text.hidden_size, text.intermediate_size
  keys = text.num_key_value_heads * text.head_dim
  projections, products = 2 * d + 2 * keys, 2 * f
  own = model.adaptation
  adapters = own is not None and LORA in {value for _, value in own.rules}  # have products too
  kept = {  # by `layers.rematerialized`, the layer's input included
    "full": d,
    "offload": 2 * d,
    "attention": 2 * d + projections,
    "mlp": 2 * d + products,
    "dots": 2 * d + (1 + adapters) * (projections + products),
    "none": 8 * d + projections + 3 * f,
  }
  layers = text.num_hidden_layers * kept["full" if model.remat == "auto" else model.remat] * size
  layer = (3 * f + 4 * d) * size  # of one layer at work: the MLP's three products, and states
  return tokens * (layers + layer) + config.inputs.row_patches * _patch_bytes(model, size)


def _patch_bytes(model: ModelConfig, size: int) -> float:
  vision = model.vision
  layer = (3 * vision.intermediate_size + 8 * vision.hidden_size) * size
  return layer + vision.patch_values * (4 + size)


def _kernel_bytes(model: ModelConfig, shapes: dict[str, Any]) -> float:
  """Bytes of copies of layers' kernels while they are used."""
  layer = sum(
    math.prod(shape.shape[1:])
    for path, shape in shapes.items()
    if path.startswith("language_model.layers") and path.endswith(".kernel")
  )
  largest = model.text.hidden_size * model.text.intermediate_size
  quantized = model.adaptation is not None and model.adaptation.dtype in DTYPES
  copies = 4.5 if quantized else 2.5  # as the compiler has; the next layer's meanwhile
  return copies * layer * _size(model.dtype) + (4 * largest if quantized else 0)


def _size(dtype: str) -> int:
  return jax.numpy.dtype(dtype).itemsize


def table(config: ConfigDict, memory: float, devices: int) -> Iterator[str]:
  """Yields the lines of a report: memory of the forms of a recipe, and what to change."""
  yield (
    f"GB on each of {devices} devices of {memory / 1e9:.0f} GB, rows of {config.inputs.row_tokens} "
    f"tokens and {config.inputs.row_patches} patches, remat {config.model.remat}:"
  )
  for name, form in forms(config):
    found = estimate(form, devices)
    uses = ", ".join(f"{use} {size / 1e9:.1f}" for use, size in found.uses.items())
    verdict = "fits" if found.total <= (1 - FREE) * memory else _remedy(form, memory, devices)
    yield f"  {name:6} {found.total / 1e9:6.1f} ({uses}; {found.rows} rows per micro-batch): {verdict}"


def places(config: ConfigDict) -> Iterator[str]:
  """Yields the lines of a report: on which devices the forms of a recipe fit."""
  yield f"rows of {config.inputs.row_tokens} tokens and {config.inputs.row_patches} patches:"
  for name, form in forms(config):
    for place, (memory, devices) in _PLACES.items():
      total = estimate(form, devices).total
      fits = total <= (1 - FREE) * memory
      verdict = "fits" if fits else _remedy(form, memory, devices)
      yield f"  {name:6} on {place:14} {total / 1e9:6.1f} of {memory / 1e9:5.1f} GB: {verdict}"


def _remedy(config: ConfigDict, memory: float, devices: int) -> str:
  """Returns the change of settings, or the number of devices, with which a config fits."""
  changed, words = config.copy_and_resolve_references(), []
  for changes in _CHANGES:
    changed.update_from_flattened_dict(changes)
    words += [f"config.{key} to {value}" for key, value in changes.items()]
    if estimate(changed, devices).total <= (1 - FREE) * memory:
      *rest, last = words
      return f"does not fit: set {', '.join(rest)} and {last}"
  changed = config.copy_and_resolve_references()
  changed.update_from_flattened_dict(_CHANGES[0])
  for more in (2, 4, 8, 16, 32, 64, 128, 256):
    if more > devices and estimate(changed, more).total <= (1 - FREE) * memory:
      return f"does not fit: needs {more} such devices"
  return "does not fit: lower config.inputs.row_tokens"
