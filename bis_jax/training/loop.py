"""The training loop."""

import contextlib
import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bis_jax.console import log, progress_bar
from bis_jax.errors import UserError
from bis_jax.inputs.pipeline import BatchIterator, Examples
from bis_jax.inputs.prompt import SpecialTokens
from bis_jax.inputs.rows import Batch, device_arrays
from bis_jax.models.chip_settings import micro_batches
from bis_jax.models.model_config import ModelConfig
from bis_jax.models.model_flops import trained_stages
from bis_jax.models.param_tree import Params
from bis_jax.parallel.devices import peak_flops
from bis_jax.parallel.preemption import Preempted, StopRequest
from bis_jax.parallel.sharding import batch_share, put_rows
from bis_jax.training.checkpoint import Checkpoints
from bis_jax.training.metrics import Goodput, MetricWriter, Rates, batch_counts
from bis_jax.training.profiler import Profile
from bis_jax.training.trackers import Tracker
from bis_jax.training.train_state import TrainState, first_params, first_state, split_trainable
from bis_jax.training.train_step import Metrics, step_of


class NonFiniteLossError(UserError):
  """The loss became infinite or NaN; the message names the records of the rows at fault."""


@dataclasses.dataclass(frozen=True)
class Trained:
  params: Params
  history: list[dict[str, float]]


def train(
  config: ConfigDict,
  workdir: epath.Path,
  mesh: Mesh,
  model_config: ModelConfig,
  initial_checkpoint: Callable[[], epath.Path | None],
  special: SpecialTokens,
  examples: Examples,
  iterator: BatchIterator,
  evaluate: Callable[[int, Params], dict[str, float]] | None = None,
) -> Trained:
  """Trains on every batch of `iterator`, or resumes the run in `workdir`.

  Raises NonFiniteLossError if the loss or the gradient norm is not finite, and Preempted, with the
  last step saved, if the run received a stop signal.

  Args:
    initial_checkpoint: returns the safetensors folder to initialize from (None: random). On resume it
      is called by runs with adapters alone.
    special: ids that initialization needs; see `first_params`.
    examples: the source of the batches, to name records in errors.
    iterator: this process's share of the global batches; its length is the length of the run.
    evaluate: (step, parameters) -> metrics, logged as `evaluation/NAME`; called every
      `config.evaluation.every` steps and after the last, on every process. None: never.
  """
  steps = min(len(iterator), config.train.steps or len(iterator))
  train_step = step_of(config, model_config, mesh, steps)
  accumulate = micro_batches(config, mesh, iterator.rows_per_batch)
  is_first_process = jax.process_index() == 0

  with contextlib.ExitStack() as at_exit:
    checkpoints = at_exit.enter_context(
      Checkpoints(
        workdir,
        every=config.train.checkpoint_every,
        keep=config.train.keep_checkpoints,
        saves_frozen=model_config.adaptation is None,
      )
    )
    at_exit.callback(iterator.close)
    checkpoints.check_room(train_step.state, train_step.frozen, steps)

    def initial() -> tuple[Params, Params]:
      shapes = train_step.state.params | train_step.frozen
      params = first_params(
        model_config, shapes, initial_checkpoint(), special, config.seed, config.model.marker_noise
      )
      return split_trainable(params, train_step.factors)

    if state := checkpoints.restore(train_step.state):
      frozen = checkpoints.restore_frozen(train_step.frozen, lambda: initial()[1])
      iterator.seek(int(state.step))
      log.info("resuming from step %d of %d", int(state.step), steps)
    else:
      params, frozen = initial()
      state = first_state(train_step.optimizer, params, train_step.state)
      checkpoints.save_frozen(frozen)
    start = int(state.step)

    tracker = Tracker(config, workdir) if is_first_process else None
    writer = MetricWriter(workdir, resume_step=start, write=is_first_process, tracker=tracker)
    at_exit.callback(writer.close)
    goodput = Goodput(writer.found, start)
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    rates = Rates(peak and peak * mesh.size)
    stages, (_, shares) = trained_stages(model_config, train_step.factors), batch_share(mesh)
    profile = at_exit.enter_context(
      Profile(workdir / "profile", *config.train.profile_steps, write=is_first_process)
    )
    bar = at_exit.enter_context(progress_bar("train", steps, initial=start, unit="step"))

    def evaluates_after(step: int) -> bool:
      every = config.evaluation.every
      return bool(evaluate and every and (step % every == 0 or step == steps))

    def write_evaluation(step: int, state: TrainState) -> None:
      if evaluate is None:
        return
      with rates.paused():
        values = evaluate(step, state.params | frozen)
      writer.write(step, {f"evaluation/{name}": value for name, value in values.items()})
      writer.flush()

    def write_metrics(step: int, metrics: Metrics, batch: Batch) -> None:
      # Waits for the step, so it is called once the next step is on the device.
      _check_finite(step, metrics, batch, examples)
      rates.count(**batch_counts(batch, model_config, stages, shares))
      bar.update()
      if step % config.train.log_every == 0 or step == steps or evaluates_after(step):
        unwritten = ("row_loss", "update_is_finite")
        values = {k: float(v) for k, v in metrics.items() if k not in unwritten} | rates.take()
        values |= goodput.add(values["productive_seconds"])
        bar.set_postfix(loss=f"{values['loss']:.4f}", accuracy=f"{values['marker_accuracy']:.3f}")
        if bar.disable:
          log.info("step %d of %d: loss %.4f", step, steps, values["loss"])
        writer.write(step, values)

    stop = at_exit.enter_context(StopRequest())
    unevaluated = {
      line["step"]
      for line in writer.history
      if not any(name.startswith("evaluation/") for name in line)
    }
    if evaluates_after(start) and start in unevaluated:
      write_evaluation(start, state)  # a stop signal came after the step was saved
    pending = None
    for step in range(start + 1, steps + 1):
      with rates.waiting():
        batch = next(iterator)
      stopping = stop.on_any_process()
      profile.before(step)
      with rates.paused() if step == start + 1 else contextlib.nullcontext():  # compilation
        arrays = put_rows(device_arrays(batch), mesh, accumulate)
        state, metrics = train_step.step(state, frozen, arrays)
      profile.after(step, metrics)
      if pending:
        write_metrics(*pending)
      pending = (step, metrics, batch)
      saving = step % config.train.checkpoint_every == 0 or step == steps or stopping
      if saving or evaluates_after(step):
        write_metrics(*pending)  # first: a state after a bad loss is neither saved nor evaluated
        pending = None
      if saving:
        writer.flush()
        with rates.paused():
          checkpoints.save(step, state, frozen)
      if stopping and step < steps:
        raise Preempted(
          f"stopped by a signal; step {step} of {steps} is saved: run the same command again to resume"
        )
      if evaluates_after(step):
        write_evaluation(step, state)  # last: if it fails, the step is saved
  return Trained(state.params | frozen, writer.history)


def _check_finite(step: int, metrics: Metrics, batch: Batch, examples: Examples) -> None:
  finite = np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
  if finite and metrics["update_is_finite"]:
    return
  shards = {shard.index[1].start or 0: shard for shard in metrics["row_loss"].addressable_shards}
  loss_AB = np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)], axis=1)
  bad_rows = ~np.isfinite(loss_AB.T.reshape(-1))
  index = batch["example_index"]
  used_rows = (index >= 0).any(axis=1)
  if bad_rows.any() and (not bad_rows[used_rows].all() or used_rows.sum() == 1):
    bad = index[bad_rows]
    ids = [examples[int(i)].id for i in np.unique(bad[bad >= 0])]
    cause = f"Records of the rows at fault: {', '.join(ids)}"
  else:
    cause = (
      "No record is at fault, as all rows are alike: lower config.optim.learning_rate or "
      "config.optim.clip, or raise config.optim.warmup_fraction or config.optim.eps"
    )
  raise NonFiniteLossError(
    f"step {step}: loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}. "
    f"Nothing of this step was saved. {cause}"
  )
