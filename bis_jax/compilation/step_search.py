"""Searches mesh, micro-batches, remat and compiler options of the training step on a TPU slice."""

import dataclasses
import re
from collections.abc import Callable, Iterator

import jax
from ml_collections import ConfigDict

from bis_jax.compilation.compiled_step import (
  CompiledStep,
  packed_rows,
  plan_step,
  resident_bytes,
  step_rows,
)
from bis_jax.models.layers import REMATS
from bis_jax.parallel.devices import chip_of, slice_devices
from bis_jax.parallel.sharding import MeshError

MIN_FREE_MEMORY = 0.10  # of a device's memory, to be left free

# Tried with the settings that are best without them; source: MaxText's recipes for TPU v6e.
OPTIONS = (
  "xla_tpu_scoped_vmem_limit_kib=98304",
  "xla_tpu_enable_async_collective_fusion=true xla_tpu_overlap_compute_collective_tc=true "
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true xla_enable_async_all_gather=true "
  "xla_tpu_enable_async_collective_fusion_multiple_steps=true",
)

_TOO_LARGE = re.compile(
  r"(?:Used|temporaries) \(?([\d.]+\w)\)? (?:of|exceeds available HBM) \(?([\d.]+\w)"
)


@dataclasses.dataclass(frozen=True)
class Trial:
  """A candidate config with its compile result or failure reason."""

  config: ConfigDict
  step: CompiledStep | None = None
  reason: str = ""
  too_large: bool = False

  @property
  def fits(self) -> bool:
    return self.step is not None and not self.too_large


def search(
  config: ConfigDict, topology: str, rollout_tokens: float, compile: Callable = plan_step
) -> Iterator[Trial]:
  """Yields every candidate once it is compiled, or known to be no better without compiling.

  The tensor axis goes up to 8, the data axis up to 4; micro-batches have at least one row per
  device. `compile` may be `compile_step`. Raises TopologyError, or MeshError if the rows
  of a step do not divide over any mesh.
  """
  devices = slice_devices(topology)
  rows = step_rows(config, packed_rows(config, rollout_tokens))
  meshes = [
    {"data": data, "fsdp": len(devices) // (data * tensor), "tensor": tensor}
    for tensor in (1, 2, 4, 8)
    for data in (1, 2, 4)
    if len(devices) % (data * tensor) == 0 and rows % (len(devices) // tensor) == 0
  ]
  if not meshes:
    raise MeshError(
      f"{rows} rows per step do not divide over any mesh of {len(devices)} devices: change "
      "config.inputs.row_multiple or config.inputs.row_tokens"
    )
  best: Trial | None = None
  for mesh in meshes:
    rows_per_shard = rows // (mesh["data"] * mesh["fsdp"])
    fitting = len(REMATS)  # on this mesh; larger micro-batches can only lower it
    for accumulate in range(rows_per_shard, 0, -1):
      if rows_per_shard % accumulate:
        continue
      enough = False  # is kept for the backward pass
      for index, remat in reversed([*enumerate(REMATS)]):
        changed = config.copy_and_resolve_references().unlock()
        changed.mesh.update(mesh)
        changed.model.remat, changed.train.accumulate = remat, accumulate
        if index >= fitting:
          yield Trial(changed, reason="not compiled: a smaller one does not fit", too_large=True)
          continue
        if enough:
          yield Trial(changed, reason="not compiled: one that keeps more fits")
          continue
        trial = _try(changed, topology, rollout_tokens, devices, compile)
        if trial.too_large:
          fitting = index
        elif trial.fits and remat != "none":
          enough = True
        if trial.fits:
          best = min(best or trial, trial, key=order)
        yield trial
  if best is None:
    return
  for options in OPTIONS:
    changed = best.config.copy_and_resolve_references()
    changed.train.compiler_options = f"{config.train.compiler_options} {options}".strip()
    trial = _try(changed, topology, rollout_tokens, devices, compile)
    yield dataclasses.replace(trial, reason=f"{trial.reason} with {options}".strip())


def _try(
  config: ConfigDict, topology: str, rollout_tokens: float, devices: list, compile: Callable
) -> Trial:
  resident = resident_bytes(config, devices)
  if resident > (1 - MIN_FREE_MEMORY) * chip_of(topology).hbm_bytes:
    reason = f"not compiled: parameters and optimizer state take {resident / 1e9:.1f} GB"
    return Trial(config, reason=reason, too_large=True)
  try:
    step = compile(config, topology, rollout_tokens)
  except (jax.errors.JaxRuntimeError, MeshError, ValueError, NotImplementedError) as error:
    if used := _TOO_LARGE.search(str(error)):
      return Trial(config, reason=f"needs {used[1]} of {used[2]}", too_large=True)
    return Trial(config, reason=str(error).splitlines()[0][:100])
  if step.free_memory < MIN_FREE_MEMORY:
    return Trial(config, step, f"less than {MIN_FREE_MEMORY:.0%} free", too_large=True)
  return Trial(config, step)


def table(trials: list[Trial]) -> Iterator[str]:
  """Yields the lines of a Markdown table: what fits by predicted rollouts/s, then the rest."""
  yield "| data | fsdp | tensor | micro-batches | remat | GB per device | free | rollouts/s | |"
  yield "|---|---|---|---|---|---|---|---|---|"
  yield from map(row, sorted(trials, key=order))


def row(trial: Trial) -> str:
  c, step = trial.config, trial.step
  cells = [c.mesh.data, c.mesh.fsdp, c.mesh.tensor, c.train.accumulate, c.model.remat]
  cells += (
    [f"{step.total / 1e9:.1f}", f"{step.free_memory:.0%}", f"{step.rollouts / step.seconds:.0f}"]
    if step
    else [""] * 3
  )
  return "| " + " | ".join(map(str, [*cells, trial.reason])) + " |"


def order(trial: Trial) -> tuple[float, ...]:
  """Returns the sort key of `table`; ties go to the smaller sum of compute, memory and links."""
  if not trial.step:
    return (2,)
  return (not trial.fits, trial.step.seconds, sum(trial.step.bounds.values()))
