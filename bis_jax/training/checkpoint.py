"""Orbax checkpoints.

`WORKDIR/checkpoints/STEP/` holds the training state, `WORKDIR/frozen/` the frozen parameters, once.
The position in the data needs no storage of its own: batch n is a function of the config and n, and
a run that has done n steps resumes at batch n, on any number of processes.
"""

from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from bis_jax.models.param_tree import Params

T = TypeVar("T")
Shapes = dict[str, jax.ShapeDtypeStruct]


def manager(workdir: epath.Path, *, every: int, keep: int) -> ocp.CheckpointManager:
  """Returns the manager of a run's checkpoints; the last `keep` are kept."""
  options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=keep)
  return ocp.CheckpointManager(workdir / "checkpoints", options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> None:
  """Saves the state after `step` steps; it is written while training continues."""
  if step != checkpoints.latest_step():
    args = ocp.args.Composite(state=ocp.args.StandardSave(state))
    checkpoints.save(step, args=args, force=True)


def restore(checkpoints: ocp.CheckpointManager, shapes: T) -> T | None:
  """Returns the latest saved state, or None if there is none.

  Args:
    checkpoints: the run's manager.
    shapes: pytree of shapes with shardings; the restored arrays have these shardings.
  """
  step = checkpoints.latest_step()
  if step is None:
    return None
  args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
  return checkpoints.restore(step, args=args).state


def restore_params(
  workdir: epath.Path, trained: Shapes, frozen: Shapes
) -> tuple[int, Params] | None:
  """Returns (step, all parameters) of the latest checkpoint, or None if there is none.

  The optimizer state is not read.

  Args:
    workdir: the run's.
    trained, frozen: shapes of the trainable and the frozen parameters, with shardings.
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
  return step, restored.state["params"] | restore_frozen(workdir, frozen)


def save_frozen(workdir: epath.Path, frozen: Params) -> None:
  """Saves the frozen parameters if there are any and they are not saved yet."""
  if frozen and not (workdir / "frozen").exists():
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(workdir / "frozen", frozen)


def restore_frozen(workdir: epath.Path, shapes: Shapes) -> Params:
  """Returns the frozen parameters in the shardings of `shapes`; {} if nothing is frozen."""
  if not shapes:
    return {}
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(workdir / "frozen", shapes)
