"""Orbax checkpoints: parameters, optimiser state and the position in the data.

`WORKDIR/checkpoints/STEP/` holds what training changes, `WORKDIR/frozen/` the frozen parameters,
once. The data position is the input pipeline's own state, the number of the next global batch: the
row plan is a function of the config alone, so that number is all an exact resume needs, on any
number of processes.
"""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath


def manager(workdir: epath.Path, *, every: int, keep: int) -> ocp.CheckpointManager:
  """Returns the manager of a run's checkpoints; the last `keep` are kept."""
  options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=keep)
  return ocp.CheckpointManager(workdir / "checkpoints", options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> None:
  """Saves the state after `step` steps; it is written while training goes on."""
  if step != checkpoints.latest_step():
    position = ocp.args.JsonSave({"next_batch": step})
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), position=position)
    checkpoints.save(step, args=args, force=True)


def restore(checkpoints: ocp.CheckpointManager, like: Any) -> tuple[Any, dict[str, int]] | None:
  """Returns the newest saved state and data position, or None where nothing is saved.

  Args:
    checkpoints: the run's manager.
    like: a pytree of arrays or shapes with shardings; what is restored arrives in those.
  """
  step = checkpoints.latest_step()
  if step is None:
    return None
  abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
  args = ocp.args.Composite(
    state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore()
  )
  restored = checkpoints.restore(step, args=args)
  return restored.state, restored.position


def restore_params(
  workdir: epath.Path, trained: dict[str, Any], frozen: dict[str, Any]
) -> tuple[int, dict[str, jax.Array]] | None:
  """Returns the newest checkpoint's step and all parameters, without optimiser state; None if none.

  Args:
    workdir: the run's.
    trained, frozen: shapes with shardings, of the parameters that training changes and of the
      others; what is restored arrives in those.
  """
  with ocp.CheckpointManager(workdir / "checkpoints") as checkpoints:
    step = checkpoints.latest_step()
    if step is None:
      return None
    like = {"params": trained}
    state = ocp.args.PyTreeRestore(
      like,
      restore_args=ocp.checkpoint_utils.construct_restore_args(like),
      partial_restore=True,
    )
    restored = checkpoints.restore(step, args=ocp.args.Composite(state=state))
  return step, restored.state["params"] | restore_frozen(workdir, frozen)


def save_frozen(workdir: epath.Path, frozen: dict[str, jax.Array]) -> None:
  """Saves the frozen parameters if there are any and they are not saved yet."""
  if frozen and not (workdir / "frozen").exists():
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(workdir / "frozen", frozen)


def restore_frozen(workdir: epath.Path, like: dict[str, Any]) -> dict[str, jax.Array]:
  """Returns the frozen parameters in the shardings of `like`; {} where nothing is frozen."""
  if not like:
    return {}
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(
      workdir / "frozen", jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    )
