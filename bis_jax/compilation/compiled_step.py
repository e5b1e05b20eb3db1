"""Compiles the training step of a config for a TPU slice that need not exist.

The step, its arguments and their shardings are those of `bis_jax.training.loop`. No weights,
tokenizer or data are read: all arrays are abstract.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from bis_jax.compilation import hlo
from bis_jax.inputs import pack
from bis_jax.inputs.rows import device_arrays, empty_batch
from bis_jax.models import backbones
from bis_jax.models.chip_settings import micro_batches, run_mesh
from bis_jax.models.model_flops import step_flops, tower_trained, trained_stages
from bis_jax.models.processor import image_processor
from bis_jax.parallel.devices import Chip, chip_of, slice_devices
from bis_jax.parallel.sharding import batch_sharding
from bis_jax.training import train_state
from bis_jax.training.train_step import step_of

_VOCABULARY = 512  # token ids in use; only the sizes "tiny" and "toy" depend on it
_STEPS = 100  # of the schedule, whose length does not change the program


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """Compile result of one training step; bytes and seconds are per device, FLOPs of all devices."""

  chip: Chip
  mesh: Mapping[str, int]  # axis -> size
  rows: int
  micro_batches: int
  remat: str
  rollouts: float  # mean
  memory: Mapping[str, int]  # use -> bytes
  model_flops: Mapping[str, float]  # see `model_flops.step_flops`
  executed_flops: float  # model FLOPs and those of rematerialization and masked attention
  operations: list[hlo.Operation]  # what moves through HBM, the largest first
  collectives: Mapping[str, tuple[int, int]]  # kind -> (count, bytes)
  lower_seconds: float  # tracing, on this machine
  compile_seconds: float

  @property
  def total(self) -> int:
    return sum(self.memory.values())

  @property
  def hbm_bytes(self) -> int:
    return sum(operation.bytes for operation in self.operations)

  @property
  def free_memory(self) -> float:
    """Free share of the chip's memory."""
    return 1 - self.total / self.chip.hbm_bytes

  @property
  def model_seconds(self) -> float:
    """Seconds per step if the devices only execute model FLOPs, at peak."""
    return self._compute_seconds(sum(self.model_flops.values()))

  @property
  def bounds(self) -> dict[str, float]:
    """Seconds per step of compute, HBM traffic and collectives, each alone and at peak."""
    moved = sum(
      size * (2 if kind == "all-reduce" else 1) for kind, (_, size) in self.collectives.items()
    )
    return {
      "compute": self._compute_seconds(self.executed_flops),
      "memory": self.hbm_bytes / self.chip.hbm_bandwidth,
      "links": moved / self.chip.link_bandwidth,
    }

  @property
  def seconds(self) -> float:
    """Roofline: seconds per step if the largest bound hides the others."""
    return max(self.bounds.values())

  def _compute_seconds(self, flops: float) -> float:
    return flops / math.prod(self.mesh.values()) / self.chip.flops


def compile_step(
  config: ConfigDict, topology: str, rollout_tokens: float | None = None
) -> CompiledStep:
  """Compiles the training step of a config for a slice such as "v5p:2x2x4".

  `rollout_tokens` is the mean number of token slots of a row per rollout; None: as measured for the
  backbone. Raises TopologyError, MeshError, or jax.errors.JaxRuntimeError if the compiler fails,
  for lack of memory for example.
  """
  inputs = config.inputs
  rollout_tokens = rollout_tokens or backbones.get(config.model.backbone).rollout_tokens
  mesh = run_mesh(config, slice_devices(topology))
  rows = step_rows(config, rollout_tokens)
  accumulate = micro_batches(config, mesh, rows)
  train_state.check_rows(rows, accumulate, mesh)
  rollouts = rows * inputs.row_tokens / rollout_tokens

  model = _model_config(config)
  step = step_of(config, model, mesh, _STEPS)
  row = empty_batch(image_processor(config), 1, pack.row_budgets(inputs))
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

  memory, text = compiled.memory_analysis(), compiled.as_text()
  assert memory and text  # optional in JAX, but TPU programs have them
  program = hlo.Program(text)
  stages = trained_stages(model, step.factors)
  return CompiledStep(
    chip=chip_of(topology),
    mesh=dict(mesh.shape),
    rows=rows,
    micro_batches=accumulate,
    remat=model.remat,
    rollouts=rollouts,
    memory=_memory_uses(memory, (step.state.params, step.frozen), step.state.opt_state, batch),
    model_flops=step_flops(
      model,
      stages,
      [rollout_tokens] * round(rollouts),
      [rows * inputs.row_patches / rollouts] * round(rollouts),
    ),
    executed_flops=mesh.size * program.matmul_flops()
    + _attention_flops(model, stages, rows, inputs),
    operations=program.operations(),
    collectives=program.collectives(),
    lower_seconds=lower_seconds,
    compile_seconds=compile_seconds,
  )


def step_rows(config: ConfigDict, rollout_tokens: float) -> int:
  inputs = config.inputs
  return train_state.rows_per_step(
    inputs.row_tokens / rollout_tokens, config.train, inputs.row_multiple
  )


def resident_bytes(config: ConfigDict, devices: list[Any]) -> int:
  """Returns the bytes of parameters and optimizer state on one of `devices`; compiles nothing."""
  mesh = run_mesh(config, devices)
  step = step_of(config, _model_config(config), mesh, _STEPS)
  return _device_bytes((step.state, step.frozen))


def _model_config(config: ConfigDict) -> Any:
  # What "auto" means on TPUs, regardless of this process's devices.
  model = backbones.model_config(config, _VOCABULARY)
  return dataclasses.replace(
    model,
    attention="splash" if model.attention == "auto" else model.attention,
    remat="dots" if model.remat == "auto" else model.remat,
  )


def _memory_uses(analysis: Any, params: Any, opt_state: Any, batch: Any) -> dict[str, int]:
  uses = {
    "parameters": _device_bytes(params),
    "optimizer state": _device_bytes(opt_state),
    "batch": _device_bytes(batch),
    "gradients, activations, buffers": analysis.temp_size_in_bytes,
    "program": analysis.generated_code_size_in_bytes,
  }
  total = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
  total += analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes
  total -= analysis.alias_size_in_bytes
  return uses | {"layout padding": total - sum(uses.values())}


def _device_bytes(tree: Any) -> int:
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _attention_flops(model: Any, stages: set[str], rows: int, inputs: ConfigDict) -> float:
  # Of whole rows, because the kernels do not skip the blocks that only segments mask.
  flops = step_flops(model, stages, [inputs.row_tokens] * rows, [inputs.row_patches] * rows)
  text, vision = flops["text attention"], flops["vision attention"]
  repeated = text / 3 + (vision / 3 if tower_trained(model, stages) else 0)
  return text + vision + (repeated if model.remat == "full" else 0)
