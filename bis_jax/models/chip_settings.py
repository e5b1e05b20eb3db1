"""What the compiled steps of training and scoring take from the TPU chip that they run on.

Compiled for TPU slices by `benchmarks/aot_table.py`; every value can be set in a run's config.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from bis_jax.errors import UserError
from bis_jax.models import backbones
from bis_jax.models.backbones import learning_rates
from bis_jax.models.model_config import LORA, TextConfig
from bis_jax.parallel.devices import CHIPS, chip_of_kind
from bis_jax.parallel.sharding import batch_shards, make_mesh

Options = dict[str, str | bool]
_EVERY_CHIP: Options = {
  # A product with a gathered kernel would become one partial product per device, summed in HBM: on
  # v6e 4x4 the step of a 7B model then moves four times as many bytes.
  "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
CHIP_OPTIONS: dict[str, Options] = dict.fromkeys(CHIPS, _EVERY_CHIP)

# With remat "dots" the products of a micro-batch stay in memory for the backward pass. They may take
# this share of what the state leaves of 90 % of a chip's memory; the rest is for other activations
# and the kernels that are gathered.
_PRODUCTS = 0.6
# Float32 parameter, moments and gradient, and in bfloat16 the cast parameter and its gradient.
_STATE_BYTES = 4 * 4 + 2 * 2
_FROZEN_BYTES = {"float32": 4 + 2, "bfloat16": 2, "int8": 1.1, "nf4": 0.6}  # scales included


def compiler_options(mesh: Mesh, changes: str) -> Options:
  """Returns the options of the mesh's chip, with `changes` such as "xla_a=1 xla_b=true".

  Raises UserError if the compiler does not know one of the changes.
  """
  pairs = (option.partition("=") for option in changes.split())
  changed = {name: {"true": True, "false": False}.get(value, value) for name, _, value in pairs}
  if changed:
    shape = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    try:
      jax.jit(jnp.negative).lower(shape).compile(compiler_options=dict(changed))
    except jax.errors.JaxRuntimeError as error:
      raise UserError(
        f"config.train.compiler_options is {changes!r}, which this compiler refuses: "
        f"{str(error).splitlines()[0]}"
      ) from error
  chip = chip_of_kind(mesh.devices.flat[0].device_kind)
  return {**(CHIP_OPTIONS[chip] if chip else {}), **changed}


def run_mesh(config: ConfigDict, devices: list[Any] | None = None) -> Mesh:
  """Returns the mesh of a run's config; raises MeshError.

  If config.mesh.tensor is 0, as few devices share a row as its products and the number of rows need.
  """
  devices = jax.devices() if devices is None else devices
  sizes = config.mesh.to_dict()
  if not sizes["tensor"]:
    sizes["tensor"] = _tensor(config, devices, max(1, sizes["data"]) * max(1, sizes["fsdp"]))
  return make_mesh(**sizes, devices=devices)


def _tensor(config: ConfigDict, devices: list[Any], shards: int) -> int:
  """Devices per row; the others are at least `shards` of rows, and 1 if no number is right."""
  if room := _room(config, devices[0], len(devices) // max(1, config.mesh.data)):
    for tensor in (1, 2, 4, 8):
      rows, left = divmod(len(devices), tensor)
      if left or rows % shards or config.inputs.row_multiple % rows:
        continue
      heads = _text(config).num_key_value_heads
      if heads % tensor == 0 and _row_bytes(config) <= room * tensor:
        return tensor
  return 1


def micro_batches(config: ConfigDict, mesh: Mesh, rows: int) -> int:
  """Returns config.train.accumulate, or if it is 0 the fewest micro-batches that fit the chip."""
  room = _room(config, mesh.devices.flat[0], mesh.size // mesh.shape["data"])
  if config.train.accumulate or room is None or rows % batch_shards(mesh):
    return config.train.accumulate or 1
  per_shard = rows // batch_shards(mesh)
  most = max(1, int(room * mesh.shape["tensor"] / _row_bytes(config)))
  return next(n for n in range(1, per_shard + 1) if per_shard % n == 0 and per_shard // n <= most)


def _room(config: ConfigDict, device: Any, sharing: int) -> float | None:
  """Bytes for products on one of the devices that share a state; None if it is no known TPU."""
  if (chip := chip_of_kind(device.device_kind)) is None:
    return None
  text = _text(config)
  layer = text.hidden_size * (
    2 * (text.query_width + _key_width(text)) + 3 * text.intermediate_size
  )
  parameters = text.num_hidden_layers * layer + text.vocab_size * text.hidden_size
  return _PRODUCTS * (0.9 * CHIPS[chip].hbm_bytes - _state_bytes(config) * parameters / sharing)


def _state_bytes(config: ConfigDict) -> float:
  """Bytes of a decoder's parameter and of what its training needs."""
  kernel = "language_model.layers.mlp.up_proj.kernel"
  factor = next(value for regex, value in learning_rates(config) if re.search(regex, kernel))
  return _FROZEN_BYTES[config.model.frozen_dtype] if factor in (0, LORA) else _STATE_BYTES


def _row_bytes(config: ConfigDict) -> int:
  """Bytes of a row's products in bfloat16: queries, attention and its output, keys, values, MLP."""
  text = _text(config)
  width = 2 * text.query_width + text.hidden_size + 2 * (_key_width(text) + text.intermediate_size)
  return 2 * text.num_hidden_layers * width * config.inputs.row_tokens


def _key_width(text: TextConfig) -> int:
  return text.num_key_value_heads * text.head_dim


def _text(config: ConfigDict) -> TextConfig:
  return backbones.get(config.model.backbone).sizes[config.model.size].text
