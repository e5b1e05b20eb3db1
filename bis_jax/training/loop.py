"""The training loop, read top to bottom."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bis_jax.console import ProgressBar, log
from bis_jax.errors import UserError
from bis_jax.inputs.pipeline import BatchIterator, Examples
from bis_jax.inputs.prompt import SpecialTokens
from bis_jax.inputs.rows import device_arrays
from bis_jax.models.model_flops import trained_stages
from bis_jax.models.param_tree import Params
from bis_jax.parallel.devices import peak_flops
from bis_jax.parallel.preemption import Preempted, StopRequest
from bis_jax.parallel.sharding import batch_share, put_rows
from bis_jax.training import checkpoint
from bis_jax.training.metrics import Goodput, MetricWriter, Rates, batch_counts
from bis_jax.training.profiler import Profile
from bis_jax.training.train_state import TrainState, first_params, first_state, split_trainable
from bis_jax.training.train_step import step_of


class NonFiniteLossError(UserError):
  """The loss became infinite or NaN; the message names the records of the rows at fault."""


@dataclasses.dataclass(frozen=True)
class Trained:
  """All parameters of a trained model, and the run's log lines."""

  params: Params
  history: list[dict[str, float]]


def _stop_on_bad_loss(
  step: int, metrics: dict[str, jax.Array], batch: dict[str, np.ndarray], examples: Examples
) -> None:
  """Raises NonFiniteLossError, naming the records of the non-finite rows of this process."""
  if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
    return
  shards = {shard.index[1].start: shard for shard in metrics["row_loss"].addressable_shards}
  parts = [np.asarray(shards[start].data) for start in sorted(shards, key=lambda start: start or 0)]
  rows = np.concatenate(parts, axis=1).T.reshape(-1)
  bad_rows = ~np.isfinite(rows) if not np.isfinite(rows).all() else np.ones(len(rows), bool)
  index = batch["example_index"][bad_rows]
  ids = [examples[int(i)].id for i in np.unique(index[index >= 0])]
  raise NonFiniteLossError(
    f"step {step}: loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}. "
    f"Nothing of this step was saved. Records of the rows at fault: {', '.join(ids)}"
  )


def train(
  config: ConfigDict,
  workdir: epath.Path,
  mesh: Mesh,
  model_config: Any,
  base: Callable[[], pathlib.Path | None],
  special: SpecialTokens,
  examples: Examples,
  iterator: BatchIterator,
  evaluate: Callable[[int, Params], dict[str, float]] | None = None,
) -> Trained:
  """Trains on every batch of `iterator`, or goes on where this workdir's run stopped.

  Args:
    config: the run's config.
    workdir: where metrics and checkpoints go.
    mesh: the devices.
    model_config: the backbone's config.
    base: returns the safetensors folder of the first parameters, or None for random ones. Called
      only where the run starts: one that goes on needs no base.
    special: ids that the first parameters need; see `first_params`.
    examples: what the batches are made of, to name records in errors.
    iterator: this process's share of the global batches; its length is the length of the run.
    evaluate: (step, parameters) -> measures, which are logged as `evaluation/NAME`; called every
      `config.evaluation.every` steps and after the last, on every process. None: never.

  Raises:
    NonFiniteLossError: the loss or the gradient norm is not finite.
    Preempted: the run was told to stop; it is saved after the last step it did.
  """
  steps = min(len(iterator), config.train.steps or len(iterator))
  every = config.evaluation.every if evaluate else 0

  train_step = step_of(config, model_config, mesh, steps)

  with contextlib.ExitStack() as at_the_end:
    checkpoints = at_the_end.enter_context(
      checkpoint.manager(
        workdir, every=config.train.checkpoint_every, keep=config.train.keep_checkpoints
      )
    )
    at_the_end.callback(iterator.close)
    if restored := checkpoint.restore(checkpoints, train_step.state):
      state, position = restored
      frozen = checkpoint.restore_frozen(workdir, train_step.frozen)
      iterator.set_state(position)
      log.info("going on from step %d of %d", int(state.step), steps)
    else:
      shapes = train_step.state.params | train_step.frozen
      params = first_params(
        model_config, shapes, base(), special, config.seed, config.model.marker_noise
      )
      params, frozen = split_trainable(params, train_step.factors)
      state = first_state(train_step.optimizer, params, mesh)
      checkpoint.save_frozen(workdir, frozen)
    start = int(state.step)

    writer = MetricWriter(workdir, resume_step=start, write=jax.process_index() == 0)
    at_the_end.callback(writer.close)
    goodput = Goodput(writer.found, start)
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    rates, pending = Rates(peak and peak * mesh.size), None
    stages, (_, shares) = trained_stages(model_config, train_step.factors), batch_share(mesh)
    profile = at_the_end.enter_context(
      Profile(workdir / "profile", *config.train.profile_steps, write=jax.process_index() == 0)
    )
    bar = at_the_end.enter_context(ProgressBar("train", steps, initial=start, unit="step"))

    def is_due(step: int) -> bool:
      """Returns whether the parameters after a step are evaluated."""
      return every > 0 and (step % every == 0 or step == steps)

    def write_evaluation(step: int, state: TrainState) -> None:
      with rates.paused():
        values = evaluate(step, state.params | frozen)
      writer.write(step, {f"evaluation/{name}": value for name, value in values.items()})

    def read(pending) -> None:
      """Reads a finished step's metrics; called when the next step is already on the device."""
      step, metrics, batch = pending
      _stop_on_bad_loss(step, metrics, batch, examples)
      rates.count(**batch_counts(batch, model_config, stages, shares))
      bar.update()
      if step % config.train.log_every == 0 or step == steps or is_due(step):
        values = {k: float(v) for k, v in metrics.items() if k != "row_loss"} | rates.take()
        values |= goodput.add(values["productive_seconds"])
        bar.set_postfix(loss=f"{values['loss']:.4f}", accuracy=f"{values['marker_accuracy']:.3f}")
        if bar.disable:
          log.info("step %d of %d: loss %.4f", step, steps, values["loss"])
        writer.write(step, values)

    stop = at_the_end.enter_context(StopRequest())
    without = [line["step"] for line in writer.history() if "evaluation/" not in " ".join(line)]
    if is_due(start) and start in without:
      write_evaluation(start, state)  # it was told to stop, and saved before this
    for step in range(start + 1, steps + 1):
      with rates.waiting():
        batch = next(iterator)
      stopping = stop.anywhere()
      profile.before(step)
      compiling = rates.paused() if step == start + 1 else contextlib.nullcontext()
      with compiling:
        arrays = put_rows(device_arrays(batch), mesh, config.train.accumulate)
        state, metrics = train_step.step(state, frozen, arrays)
      profile.after(step, metrics)
      if pending:
        read(pending)
      pending = (step, metrics, batch)
      saving = step % config.train.checkpoint_every == 0 or step == steps or stopping
      if saving or is_due(step):
        read(pending)  # first: a state after a bad loss is neither saved nor evaluated
        pending = None
      if is_due(step) and (step == steps or not stopping):
        write_evaluation(step, state)
      if saving:
        writer.flush()
        with rates.paused():
          checkpoint.save(checkpoints, step, state)
        if stopping and step < steps:
          raise Preempted(
            f"told to stop; step {step} of {steps} is saved: run the same command again"
          )
  return Trained(state.params | frozen, writer.history())
