"""Orbax checkpoints: `WORKDIR/checkpoints/STEP/`, and once `WORKDIR/frozen/` for frozen parameters.

Runs with adapters have no `frozen`: they read them again from where they started.

The position in the data is not stored: batch n is a function of the config and n, and a run that
has done n steps resumes at batch n, on any number of processes. A checkpoint's item `checksums`
has one for every array, frozen ones too; checkpoints of older versions lack it and are not checked.
"""

import functools
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bis_jax import files
from bis_jax.console import log
from bis_jax.errors import UserError
from bis_jax.models.param_tree import Params
from bis_jax.parallel import processes
from bis_jax.storage import failure

T = TypeVar("T")
Shapes = dict[str, jax.ShapeDtypeStruct]
_Sums = dict[str, int]

# Orbax logs what it also raises, with tracebacks, and comments on its own options.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class DamagedCheckpointError(UserError):
  """A folder of arrays that can't be read, or that are not those that were saved."""

  def __init__(self, folder: epath.Path, reason: object):
    line = (str(reason) or repr(reason)).splitlines()[0][:200]
    self.folder, self.damage = folder, f"{folder} is damaged ({line})"
    super().__init__(
      f"{self.damage}: put a copy of it back, or move it away; the run then resumes from an older "
      "checkpoint, or from step 0"
    )


class Checkpoints:
  """The checkpoints of a run that trains; a context manager."""

  def __init__(self, workdir: epath.Path, *, every: int, keep: int, saves_frozen: bool = True):
    options = ocp.CheckpointManagerOptions(
      save_interval_steps=every, max_to_keep=keep, cleanup_tmp_directories=True
    )
    self._workdir, self._saves_frozen = workdir, saves_frozen
    self._sums: _Sums = {}  # of the restored checkpoint
    with files.naming_full_disk(workdir):
      self._manager = ocp.CheckpointManager(_folder(workdir), options=options)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    with files.naming_full_disk(_folder(self._workdir)):
      self._manager.close()  # waits for the last save

  def check_room(self, state: Any, frozen: Shapes, steps: int) -> None:
    """Raises UserError if a checkpoint does not fit on the disk and step `steps` is not saved."""
    saves = self._saves_frozen and not (self._workdir / "frozen").exists()
    needed = _size(state) + (_size(frozen) if saves else 0)
    if (self._manager.latest_step() or 0) < steps:
      files.require_room(_folder(self._workdir), needed)

  def save(self, step: int, state: Any, frozen: Params) -> None:
    """Saves the state after `step` steps, asynchronously."""
    if step == self._manager.latest_step():
      return
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      checksums=ocp.args.JsonSave(checksums({"state": state, "frozen": frozen})),
    )
    with files.naming_full_disk(_folder(self._workdir), _size(state)):
      self._manager.save(step, args=args, force=True)

  def restore(self, shapes: T) -> T | None:
    """Returns the newest whole state in the shardings of `shapes`, None if none is saved.

    Damaged ones are moved to WORKDIR/damaged. Raises DamagedCheckpointError if all are.
    """
    damaged: list[DamagedCheckpointError] = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        args = ocp.args.StandardRestore(shapes)
        state, self._sums = _restore(self._manager, self._workdir, step, args)
      except DamagedCheckpointError as error:
        if jax.process_count() > 1 and error.__cause__:  # perhaps of this process alone
          raise
        damaged.append(error)
        continue
      for error in damaged:
        log.warning("%s: resuming from step %d", error.damage, step)
        self._move_away(error.folder)
      self._manager.reload()
      return state
    if damaged:
      raise damaged[0]
    return None

  def restore_frozen(self, shapes: Shapes, make: Callable[[], Params]) -> Params:
    """Returns the frozen parameters of the restored checkpoint; damaged ones are made again."""
    if not self._saves_frozen:
      return made_frozen(make, self._sums, _started(self._workdir))
    try:
      return _restore_frozen(self._workdir, shapes, self._sums)
    except DamagedCheckpointError as error:
      frozen = make()
      if not self._sums or _wrong({"frozen": frozen}, self._sums):
        raise
      log.warning("%s: made it again from the initial parameters", error.damage)
      self._move_away(error.folder)
      self.save_frozen(frozen)
      return frozen

  def save_frozen(self, frozen: Params) -> None:
    folder = self._workdir / "frozen"
    if self._saves_frozen and frozen and not folder.exists():
      with files.naming_full_disk(folder, _size(frozen)), ocp.StandardCheckpointer() as saver:
        saver.save(folder, frozen)

  def _move_away(self, folder: epath.Path) -> None:
    if processes.is_first() and folder.exists():
      aside = self._workdir / "damaged" / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
      files.move_folder(folder, aside)
    processes.wait_for_all(f"{folder} is moved away")


def made_frozen(make: Callable[[], Params], sums: Mapping[str, int], wanted: str) -> Params:
  """Returns `make()`; raises UserError, "... is not " + `wanted`, if `sums` are of other parameters."""
  frozen = make()
  if wrong := _wrong({"frozen": frozen}, sums):
    raise UserError(f"{wrong} is not {wanted}")
  return frozen


def _started(workdir: epath.Path) -> str:
  return (
    f"what the run in {workdir} started from: put the weights that its config.model.checkpoint names "
    "back as they were"
  )


def restore_params(
  workdir: epath.Path, trained: Shapes, frozen: Shapes, make: Callable[[], Params] | None = None
) -> tuple[int, Params] | None:
  """Returns (step, all parameters) of the latest checkpoint, None if there is none.

  The shapes carry the shardings. The optimizer state is not read. `make` gives frozen parameters that
  the run did not save. Raises DamagedCheckpointError.
  """
  if not _folder(workdir).exists():
    return None
  options = ocp.CheckpointManagerOptions(read_only=True)
  with ocp.CheckpointManager(_folder(workdir), options=options) as manager:
    step = manager.latest_step()
    if step is None:
      return None
    target = {"params": trained}
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
    state, sums = _restore(manager, workdir, step, args)
  if make:
    return step, made_frozen(make, sums, _started(workdir)) | state["params"]
  return step, state["params"] | _restore_frozen(workdir, frozen, sums)


def _restore(
  manager: ocp.CheckpointManager, workdir: epath.Path, step: int, args: Any
) -> tuple[Any, _Sums]:
  """Returns the state of a step and its checksums, {} if it has none."""
  _hide_late_errors()
  folder = _folder(workdir) / str(step)
  try:
    state = manager.restore(step, args=ocp.args.Composite(state=args))["state"]
    sums = {}
    if (folder / "checksums").exists():
      sums = manager.restore(step, args=ocp.args.Composite(checksums=ocp.args.JsonRestore()))
      sums = dict(sums["checksums"])
  except (MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:  # of Orbax, TensorStore or the JSON in it
    if unreachable := failure(error):
      raise unreachable from None
    raise DamagedCheckpointError(folder, error.__cause__ or error) from error
  if sums and (wrong := _wrong({"state": state}, sums)):
    raise DamagedCheckpointError(folder, f"{wrong} is not as it was saved")
  return state, sums


def _restore_frozen(workdir: epath.Path, shapes: Shapes, sums: _Sums) -> Params:
  if not shapes:
    return {}
  _hide_late_errors()
  folder = workdir / "frozen"
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      frozen = checkpointer.restore(folder, shapes)
  except (MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:
    if unreachable := failure(error):
      raise unreachable from None
    raise DamagedCheckpointError(folder, error.__cause__ or error) from error
  if sums and (wrong := _wrong({"frozen": frozen}, sums)):
    raise DamagedCheckpointError(folder, f"{wrong} is not as it was saved")
  return frozen


def checksums(tree: Any) -> _Sums:
  """Returns a checksum of the bits of every array by path, independent of the sharding.

  A change of one element always changes it.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  if not leaves:
    return {}
  sums = jax.device_get(_sums_on(leaves[0][1].sharding)([leaf for _, leaf in leaves]))
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
  return dict(zip(names, map(int, sums), strict=True))


def _wrong(tree: Any, sums: Mapping[str, int]) -> str | None:
  """Returns the path of an array whose checksum is not in `sums`."""
  return next((path for path, value in checksums(tree).items() if sums.get(path) != value), None)


@functools.cache
def _sums_on(sharding: jax.sharding.Sharding) -> Callable[[list[jax.Array]], list[jax.Array]]:
  everywhere = None
  if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
  return jax.jit(lambda arrays: [_sum(array) for array in arrays], out_shardings=everywhere)


def _sum(array: jax.Array) -> jax.Array:
  array = jax.device_put(array, jax.memory.Space.Device)  # moments may be in the host's memory
  # Every element has an odd factor of its own, modulo 2**32.
  if not jnp.issubdtype(array.dtype, jnp.integer):
    array = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
  bits = array.astype(jnp.uint32)
  position = jnp.zeros(array.shape, jnp.uint32)
  for axis, size in enumerate(array.shape):
    place = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    position = position * jnp.uint32(size) + place
  return jnp.sum(bits * (position * jnp.uint32(2654435761) | jnp.uint32(1)), dtype=jnp.uint32)


def _size(arrays: Any) -> int:
  shapes = jax.tree.leaves(arrays)
  return sum(math.prod(shape.shape) * shape.dtype.itemsize for shape in shapes)


def _folder(workdir: epath.Path) -> epath.Path:
  return workdir / "checkpoints"


@functools.cache
def _hide_late_errors() -> None:
  # Once one read has failed, TensorStore reports the others to an event loop that is closed by then.
  shown = sys.unraisablehook
  late = ("Event loop is closed", "error while reading array index")

  def show(error: Any) -> None:
    if not any(words in str(error.exc_value) for words in late):
      shown(error)

  sys.unraisablehook = show
  warnings.filterwarnings("ignore", "coroutine '_read_array_index.*' was never awaited")
  never = "exception was never retrieved"
  logging.getLogger("asyncio").addFilter(lambda record: never not in record.getMessage())
