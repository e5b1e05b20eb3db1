"""Tries settings of the training step on a TPU slice: mesh, recomputation, micro-batches."""

import dataclasses
import re
from collections.abc import Callable, Iterator

import jax
from ml_collections import ConfigDict

from bis_jax.compilation.compiled_step import CompiledStep, compile_step, resident_bytes, step_rows
from bis_jax.parallel.devices import chip_of, slice_devices
from bis_jax.parallel.sharding import MeshError

SPARE = 0.10  # of a device's memory, to be left

# From least to most memory: where one does not fit, those behind it do not.
REMATS = ("full", "offload", "dots", "none")


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Settings of a step: devices along the axes, micro-batches, recomputation."""

  data: int
  fsdp: int
  tensor: int
  accumulate: int
  remat: str

  def apply(self, config: ConfigDict) -> ConfigDict:
    """Returns a copy of `config` with these settings."""
    changed = config.copy_and_resolve_references().unlock()
    changed.mesh.update(data=self.data, fsdp=self.fsdp, tensor=self.tensor)
    changed.model.remat, changed.train.accumulate = self.remat, self.accumulate
    return changed

  def needs_no_less_than(self, other: "Candidate") -> bool:
    """Returns whether this is `other` with larger micro-batches or more kept."""
    mesh = (self.data, self.fsdp, self.tensor) == (other.data, other.fsdp, other.tensor)
    kept = REMATS.index(self.remat) >= REMATS.index(other.remat)
    return mesh and kept and self.accumulate <= other.accumulate


@dataclasses.dataclass(frozen=True)
class Tried:
  """A candidate with what the compiler says of it, or why there is nothing to say."""

  candidate: Candidate
  step: CompiledStep | None
  why_not: str

  @property
  def fits(self) -> bool:
    """Whether it compiles and leaves SPARE of the memory."""
    return self.step is not None and self.step.spare >= SPARE


def candidates(config: ConfigDict, devices: int, rollout_tokens: float) -> list[Candidate]:
  """Returns settings whose sizes divide `devices` and the rows of a step, the smallest first.

  The tensor axis goes up to 8, the data axis up to 4, and micro-batches of one row a device or more.
  """
  rows = step_rows(config, rollout_tokens)
  found = []
  for tensor in (1, 2, 4, 8):
    for data in (1, 2, 4):
      if devices % (data * tensor):
        continue
      shards = devices // tensor
      for accumulate in range(rows // shards, 0, -1):
        if rows % (shards * accumulate) == 0:
          for remat in REMATS:
            found.append(Candidate(data, shards // data, tensor, accumulate, remat))
  return found


def search(
  config: ConfigDict, topology: str, rollout_tokens: float, compile: Callable = compile_step
) -> Iterator[Tried]:
  """Yields every candidate as it is tried, those that can be seen not to fit without compiling.

  Args:
    config: of a run; its mesh, recomputation and micro-batches are replaced.
    topology: the slice, such as "v5p:2x2x4".
    rollout_tokens: token slots of a row that a rollout takes on average.
    compile: `compile_step`, or a stand-in.

  Raises:
    TopologyError: no such slice, or no libtpu.
    MeshError: no mesh divides the rows of a step.
  """
  devices, hbm = slice_devices(topology), chip_of(topology).hbm_bytes
  todo = candidates(config, len(devices), rollout_tokens)
  if not todo:
    raise MeshError(
      f"{step_rows(config, rollout_tokens)} rows a step divide over no mesh of {len(devices)} "
      "devices: change config.inputs.row_multiple or config.inputs.row_tokens"
    )
  too_large: list[Candidate] = []
  for candidate in todo:
    changed = candidate.apply(config)
    if any(candidate.needs_no_less_than(other) for other in too_large):
      yield Tried(candidate, None, "not compiled: less than this does not fit")
      continue
    held = resident_bytes(changed, devices)
    if held > (1 - SPARE) * hbm:
      too_large.append(candidate)
      yield Tried(
        candidate, None, f"not compiled: parameters and optimiser take {held / 1e9:.1f} GB"
      )
      continue
    try:
      step = compile(changed, topology, rollout_tokens)
    except (jax.errors.JaxRuntimeError, MeshError, ValueError, NotImplementedError) as error:
      used = re.search(r"Used (\S+) of (\S+) hbm", str(error))
      if used:
        too_large.append(candidate)
      yield Tried(
        candidate,
        None,
        f"needs {used[1]} of {used[2]}" if used else str(error).splitlines()[0][:100],
      )
      continue
    if step.spare < SPARE:
      too_large.append(candidate)
    yield Tried(candidate, step, "" if step.spare >= SPARE else f"less than {SPARE:.0%} to spare")


def table(tried: list[Tried]) -> Iterator[str]:
  """Yields the lines of a Markdown table: what fits by predicted rollouts/s, then the rest."""
  yield "| data | fsdp | tensor | micro-batches | remat | GB a device | spare | rollouts/s | |"
  yield "|---|---|---|---|---|---|---|---|---|"
  yield from map(row, sorted(tried, key=_order))


def row(tried: Tried) -> str:
  """Returns one line of the table."""
  c, step = tried.candidate, tried.step
  figures = ["", "", ""]
  if step:
    rate = step.rollouts / step.seconds
    figures = [f"{step.total / 1e9:.1f}", f"{step.spare:.0%}", f"{rate:.0f}"]
  cells = [c.data, c.fsdp, c.tensor, c.accumulate, c.remat, *figures, tried.why_not]
  return "| " + " | ".join(map(str, cells)) + " |"


def _order(tried: Tried) -> tuple:
  if not tried.step:
    return (2,)
  # Equal rooflines: the one with less to hide behind its longest part comes first.
  return (0 if tried.fits else 1, tried.step.seconds, sum(tried.step.parts.values()))
