"""The training step of a config, compiled for a TPU slice that need not be there.

What is compiled is what `train.train` runs: the same step, parameters, optimiser state and batch,
and the same places for them. No weights, tokenizer or data are read; arrays are only described.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bis_jax.compilation import hlo
from bis_jax.inputs.rows import device_arrays, empty_batch
from bis_jax.models import backbones
from bis_jax.models.model_flops import step_flops, tower_trained, trained_stages
from bis_jax.models.processor import image_processor
from bis_jax.parallel.devices import Chip, chip_of, slice_devices
from bis_jax.parallel.sharding import batch_sharding, make_mesh
from bis_jax.training import train_state
from bis_jax.training.train_step import step_of

_VOCABULARY = 512  # token ids in use; only the sizes "tiny" and "toy" depend on it
_STEPS = 100  # of the schedule, which compiles the same at any length


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """What the compiler says of one training step; bytes and seconds are of one device.

  Attributes:
    chip: the devices.
    mesh: axis -> size.
    rows, micro_batches, rollouts: of one step; rollouts is a mean.
    parameters, optimizer, batch: bytes of the step's arguments.
    temporaries: bytes of everything that lives inside the step: gradients, activations, buffers.
    code: bytes of the program.
    total: bytes in all, with what the layout of arguments pads.
    model_flops: operations that the model asks for, of all devices; see `model_flops.step_flops`.
    executed_flops: the same with what is recomputed and, in attention, masked; of all devices.
    xla_flops, xla_bytes: XLA's cost analysis, which counts the body of a loop once.
    hbm_bytes: see `hlo.hbm_bytes`.
    collectives: kind -> (count, bytes).
    lower_seconds, compile_seconds: time of tracing and of the compiler on this machine.
  """

  chip: Chip
  mesh: Mapping[str, int]
  rows: int
  micro_batches: int
  rollouts: float
  parameters: int
  optimizer: int
  batch: int
  temporaries: int
  code: int
  total: int
  model_flops: Mapping[str, float]
  executed_flops: float
  xla_flops: float
  xla_bytes: float
  hbm_bytes: int
  collectives: Mapping[str, tuple[int, int]]
  lower_seconds: float
  compile_seconds: float

  @property
  def spare(self) -> float:
    """Share of the chip's memory that is left."""
    return 1 - self.total / self.chip.hbm_bytes

  @property
  def model_seconds(self) -> float:
    """Seconds of a step in which every device does nothing but the model's operations, at peak."""
    return sum(self.model_flops.values()) / self._devices / self.chip.flops

  @property
  def parts(self) -> dict[str, float]:
    """Seconds of a step's operations, memory traffic and collectives, each alone and at peak."""
    moved = sum(
      size * (2 if kind == "all-reduce" else 1) for kind, (_, size) in self.collectives.items()
    )
    return {
      "compute": self.executed_flops / self._devices / self.chip.flops,
      "memory": self.hbm_bytes / self.chip.hbm_bandwidth,
      "links": moved / self.chip.link_bandwidth,
    }

  @property
  def seconds(self) -> float:
    """Roofline of a step: its longest part, as if the others were hidden behind it."""
    return max(self.parts.values())

  @property
  def _devices(self) -> int:
    return int(np.prod(list(self.mesh.values())))


def compile_step(
  config: ConfigDict, topology: str, rollout_tokens: float | None = None
) -> CompiledStep:
  """Returns what the compiler says of the training step of a config on a slice.

  Args:
    config: of a run.
    topology: the slice, such as "v5p:2x2x4".
    rollout_tokens: token slots of a row that a rollout takes on average; None: as measured.

  Raises:
    TopologyError: no such slice, or no libtpu.
    MeshError: the config's mesh or rows do not divide over its devices.
    jax.errors.JaxRuntimeError: the compiler refuses, for want of memory for example.
  """
  inputs, accumulate = config.inputs, config.train.accumulate
  rollout_tokens = rollout_tokens or backbones.get(config.model.backbone).rollout_tokens
  mesh = make_mesh(**config.mesh, devices=slice_devices(topology))
  rows = step_rows(config, rollout_tokens)
  train_state.check_rows(rows, accumulate, mesh)
  rollouts = rows * inputs.row_tokens / rollout_tokens

  model = _model_config(config)
  step = step_of(config, model, mesh, _STEPS)
  row = empty_batch(
    image_processor(config), 1, inputs.row_tokens, inputs.row_patches, inputs.row_markers
  )
  batch = {
    key: jax.ShapeDtypeStruct(
      (accumulate, rows // accumulate, *array.shape[1:]), array.dtype, sharding=batch_sharding(mesh)
    )
    for key, array in device_arrays(row).items()
  }

  start = time.perf_counter()
  lowered = step.step.lower(step.state, step.frozen, batch)
  lower_seconds = time.perf_counter() - start
  compiled = lowered.compile()
  compile_seconds = time.perf_counter() - start - lower_seconds

  memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
  stages = trained_stages(model, step.factors)
  return CompiledStep(
    chip=chip_of(topology),
    mesh=dict(mesh.shape),
    rows=rows,
    micro_batches=accumulate,
    rollouts=rollouts,
    parameters=_device_bytes((step.state.params, step.frozen)),
    optimizer=_device_bytes(step.state.opt_state),
    batch=_device_bytes(batch),
    temporaries=memory.temp_size_in_bytes,
    code=memory.generated_code_size_in_bytes,
    total=memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes,
    model_flops=step_flops(
      model,
      stages,
      [rollout_tokens] * round(rollouts),
      [rows * inputs.row_patches / rollouts] * round(rollouts),
    ),
    executed_flops=_executed_flops(model, stages, rows, inputs),
    xla_flops=cost["flops"],
    xla_bytes=cost["bytes accessed"],
    hbm_bytes=hlo.hbm_bytes(text),
    collectives=hlo.collectives(text),
    lower_seconds=lower_seconds,
    compile_seconds=compile_seconds,
  )


def step_rows(config: ConfigDict, rollout_tokens: float) -> int:
  """Returns the rows of a step, by the rule of training."""
  inputs = config.inputs
  return train_state.rows_per_step(
    inputs.row_tokens / rollout_tokens, config.train, inputs.row_multiple
  )


def resident_bytes(config: ConfigDict, devices: list[Any]) -> int:
  """Returns the bytes of parameters and optimiser state on one of `devices`; compiles nothing."""
  mesh = make_mesh(**config.mesh, devices=devices)
  step = step_of(config, _model_config(config), mesh, _STEPS)
  return _device_bytes((step.state, step.frozen))


def _model_config(config: ConfigDict) -> Any:
  """The model as it runs on TPU, whatever this process runs on."""
  model = backbones.model_config(config, _VOCABULARY)
  return dataclasses.replace(model, attention="splash") if model.attention == "auto" else model


def _device_bytes(tree: Any) -> int:
  """Bytes of a pytree of ShapeDtypeStructs with shardings on one device."""
  return sum(
    int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _executed_flops(model: Any, stages: set[str], rows: int, inputs: ConfigDict) -> float:
  """Operations of a step with those that attention masks and the backward pass repeats."""
  flops = step_flops(model, stages, [inputs.row_tokens] * rows, [inputs.row_patches] * rows)
  repeated = (flops["text"] + flops["text attention"]) / 3 if model.remat == "full" else 0
  if model.remat == "full" and tower_trained(model, stages):
    repeated += (flops["vision"] + flops["vision attention"]) / 3
  return sum(flops.values()) + repeated
