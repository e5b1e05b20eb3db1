"""Orbax checkpoints: `WORKDIR/checkpoints/STEP/`, and once `WORKDIR/frozen/` for frozen parameters.

The position in the data is not stored: batch n is a function of the config and n, and a run that
has done n steps resumes at batch n, on any number of processes.
"""

from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from bis_jax.models.param_tree import Params

T = TypeVar("T")
Shapes = dict[str, jax.ShapeDtypeStruct]


def manager(workdir: epath.Path, *, every: int, keep: int) -> ocp.CheckpointManager:
  options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=keep)
  return ocp.CheckpointManager(workdir / "checkpoints", options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> None:
  """Saves the state after `step` steps, asynchronously."""
  if step != checkpoints.latest_step():
    args = ocp.args.Composite(state=ocp.args.StandardSave(state))
    checkpoints.save(step, args=args, force=True)


def restore(checkpoints: ocp.CheckpointManager, shapes: T) -> T | None:
  """Returns the latest saved state in the shardings of `shapes`, None if there is none."""
  step = checkpoints.latest_step()
  if step is None:
    return None
  args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
  return checkpoints.restore(step, args=args)["state"]


def restore_params(
  workdir: epath.Path, trained: Shapes, frozen: Shapes
) -> tuple[int, Params] | None:
  """Returns (step, all parameters) of the latest checkpoint, None if there is none.

  The shapes carry the shardings. The optimizer state is not read.
  """
  with ocp.CheckpointManager(workdir / "checkpoints") as checkpoints:
    step = checkpoints.latest_step()
    if step is None:
      return None
    target = {"params": trained}
    state = ocp.args.PyTreeRestore(
      target,
      restore_args=ocp.checkpoint_utils.construct_restore_args(target),
      partial_restore=True,
    )
    restored = checkpoints.restore(step, args=ocp.args.Composite(state=state))
  return step, restored["state"]["params"] | restore_frozen(workdir, frozen)


def save_frozen(workdir: epath.Path, frozen: Params) -> None:
  if frozen and not (workdir / "frozen").exists():
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(workdir / "frozen", frozen)


def restore_frozen(workdir: epath.Path, shapes: Shapes) -> Params:
  """Returns the frozen parameters in the shardings of `shapes`; {} if nothing is frozen."""
  if not shapes:
    return {}
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(workdir / "frozen", shapes)
