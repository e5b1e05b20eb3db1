"""Compiles the training step of a config for a TPU slice that need not exist.

The step, its arguments and their shardings are those of `bis_jax.training.loop`. No weights,
tokenizer or data are read: all arrays are abstract.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bis_jax.compilation import hlo, plan
from bis_jax.inputs import layout, pack
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
_GROUP = 3  # rollouts of a question in VisualPRM400K, about
_GROUPS = 200  # that are drawn
_STEPS = 100  # of the schedule, whose length does not change the program


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """Compile result of one training step; bytes and seconds are per device, FLOPs of all devices."""

  chip: Chip
  mesh: Mapping[str, int]  # axis -> size
  rows: int
  layout: pack.Layout  # of each
  micro_batches: int
  remat: str
  rollouts: float  # mean
  memory: Mapping[str, int]  # use -> bytes; "program" is machine code, if any was generated
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


def plan_step(
  config: ConfigDict,
  topology: str,
  rollout_tokens: float | None = None,
  rollouts_per_group: int | None = None,
) -> CompiledStep:
  """Returns what `compile_step` does but for the machine code, in a tenth of the time."""
  return plan.in_child(
    compile_step, config, topology, rollout_tokens, rollouts_per_group, plan.planned
  )


def compile_step(
  config: ConfigDict,
  topology: str,
  rollout_tokens: float | None = None,
  rollouts_per_group: int | None = None,
  finish: Callable[[jax.stages.Lowered], plan.Program] = plan.whole,
) -> CompiledStep:
  """Compiles the training step of a config for a slice such as "v5p:2x2x4".

  `rollout_tokens` is the mean number of token slots of a row per rollout; None: as measured for the
  backbone. `rollouts_per_group` have the same images and question; None: 3 if the config selects all
  rollouts, else 1. Raises TopologyError, MeshError, or jax.errors.JaxRuntimeError if the compiler
  fails, for lack of memory for example.
  """
  inputs, packed = config.inputs, packed_rows(config, rollout_tokens, rollouts_per_group)
  mesh = run_mesh(config, slice_devices(topology))
  rows = step_rows(config, packed)
  accumulate = micro_batches(config, mesh, rows)
  train_state.check_rows(rows, accumulate, mesh)
  rollouts = rows * inputs.row_tokens / packed.rollout_tokens

  model = _model_config(config)
  step = step_of(config, model, mesh, _STEPS)
  row = empty_batch(image_processor(config), 1, *packed.layout)
  batch = {
    key: jax.ShapeDtypeStruct(
      (accumulate, rows // accumulate, *array.shape[1:]), array.dtype, sharding=batch_sharding(mesh)
    )
    for key, array in device_arrays(row).items()
  }

  start = time.perf_counter()
  lowered = step.step.lower(step.state, step.frozen, batch)
  lower_seconds = time.perf_counter() - start
  compiled = finish(lowered)
  compile_seconds = time.perf_counter() - start - lower_seconds

  program = hlo.Program(compiled.text)
  stages = trained_stages(model, step.factors)
  return CompiledStep(
    chip=chip_of(topology),
    mesh=dict(mesh.shape),
    rows=rows,
    layout=packed.layout,
    micro_batches=accumulate,
    remat=model.remat,
    rollouts=rollouts,
    memory=_memory_uses(compiled, (step.state.params, step.frozen), step.state.opt_state, batch),
    model_flops=packed.model_flops(model, stages, round(rollouts)),
    executed_flops=mesh.size * program.matmul_flops()
    + _attention_flops(model, stages, rows, packed.layout),
    operations=program.operations(),
    collectives=program.collectives(),
    lower_seconds=lower_seconds,
    compile_seconds=compile_seconds,
  )


@dataclasses.dataclass(frozen=True)
class PackedRows:
  """Rows of groups of `group` rollouts, each of a prefix and `own` more tokens on average."""

  layout: pack.Layout
  rollout_tokens: float  # token slots per rollout
  prefix: float  # tokens
  own: float
  group: int
  patches: float  # slots of a group's images

  def model_flops(self, model: Any, stages: set[str], rollouts: int) -> dict[str, float]:
    if not self.layout.streams[0]:
      whole = [self.prefix + self.own] * rollouts
      return step_flops(model, stages, whole, [self.patches] * rollouts)
    groups = rollouts // self.group
    pieces = [self.prefix] * groups + [self.own] * rollouts
    before = [0.0] * groups + [self.prefix] * rollouts
    return step_flops(model, stages, pieces, [self.patches] * groups, before)


def packed_rows(
  config: ConfigDict, rollout_tokens: float | None = None, rollouts_per_group: int | None = None
) -> PackedRows:
  """Returns the rows of a run of a config; arguments as of `compile_step`.

  Without streams, a row holds its tokens divided by `rollout_tokens`. With them, as many as fit on
  average, of drawn rollouts: own lengths vary as in the released corpus.
  """
  inputs, backbone = config.inputs, backbones.get(config.model.backbone)
  tokens = rollout_tokens or backbone.rollout_tokens
  group = rollouts_per_group or (_GROUP if config.selection.fraction == 1 else 1)
  prefix = min(backbone.prefix_tokens, 0.9 * tokens)
  patches = inputs.row_patches * tokens / inputs.row_tokens
  rng = np.random.default_rng(0)
  numbers = np.repeat(np.arange(_GROUPS), group)
  prefixes = (prefix * rng.uniform(0.8, 1.2, _GROUPS)).astype(int)[numbers]
  lengths = (tokens - prefix) * np.exp(rng.normal(-0.125, 0.5, len(numbers))).clip(0.2, 4)
  slots = np.full(len(numbers), round(patches))
  costs = np.stack([prefixes + lengths.astype(int) + 1, slots, np.full(len(numbers), 8)], axis=1)
  drawn = layout.Costs(costs, prefixes, numbers)
  rows, _ = layout.choose(drawn, inputs, image_processor(config).slot_multiple)
  slots = tokens
  if rows.streams[0]:
    slots = drawn.rows(rows, inputs.lookahead) * inputs.row_tokens / len(numbers)
  return PackedRows(rows, slots, prefix, tokens - prefix, group, patches)


def step_rows(config: ConfigDict, packed: PackedRows) -> int:
  rollouts = config.inputs.row_tokens / packed.rollout_tokens
  return train_state.rows_per_step(rollouts, config.train, config.inputs.row_multiple)


def resident_bytes(config: ConfigDict, devices: list[Any]) -> int:
  """Returns the bytes of parameters and optimizer state on one of `devices`; compiles nothing."""
  mesh = run_mesh(config, devices)
  step = step_of(config, _model_config(config), mesh, _STEPS)
  return device_bytes((step.state, step.frozen))


def _model_config(config: ConfigDict) -> Any:
  # What "auto" means on TPUs, regardless of this process's devices.
  model = backbones.model_config(config, _VOCABULARY)
  return dataclasses.replace(
    model,
    attention="splash" if model.attention == "auto" else model.attention,
    remat="dots" if model.remat == "auto" else model.remat,
  )


def _memory_uses(program: plan.Program, params: Any, opt_state: Any, batch: Any) -> dict[str, int]:
  uses = {
    "parameters": device_bytes(params),
    "optimizer state": device_bytes(opt_state),
    "batch": device_bytes(batch),
  }
  if program.code:
    uses["program"] = program.code
  return uses | {"gradients, activations, buffers": program.total - sum(uses.values())}


def device_bytes(tree: Any) -> int:
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * _bits(leaf.dtype) // 8
    for leaf in jax.tree.leaves(tree)
    if leaf.sharding.memory_kind != train_state.HOST
  )


def _bits(dtype: Any) -> int:
  return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def _attention_flops(model: Any, stages: set[str], rows: int, layout: pack.Layout) -> float:
  # Of whole rows, because the kernels do not skip the blocks that only segments mask.
  (number, length), first = layout.streams, layout.prefix_tokens
  tokens, before = [first] + [length] * number, [0] + [first] * number
  flops = step_flops(model, stages, tokens * rows, [float(layout.budgets[1])] * rows, before * rows)
  text, vision = flops["text attention"], flops["vision attention"]
  repeated = text / 3 + (vision / 3 if tower_trained(model, stages) else 0)
  return text + vision + (repeated if model.remat == "full" else 0)
