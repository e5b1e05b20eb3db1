"""One jitted training step: loss, gradients, update.

Batch arrays arrive as [A, B, ...]: A micro-batches, accumulated in a scan, of B rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from bis_jax.loss import marker_loss
from bis_jax.state import Params, TrainState, merge

# What stays on the host: where each marker's example stands in the source.
HOST_KEYS = ("example_index", "step_index")

Metrics = dict[str, jax.Array]


def _micro_loss(
  graph: nnx.GraphDef, params: Params, frozen: Params, batch: dict[str, jax.Array], total: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns a micro-batch's share of the loss, with (loss sum of each row [B], right markers)."""
  logits_BR2 = merge(graph, params | frozen)(batch)
  weight_BR = batch["marker_weight"]
  loss_BR = marker_loss(logits_BR2, batch["marker_target"], weight_BR)
  agrees_BR = (logits_BR2[..., 0] >= logits_BR2[..., 1]) == (batch["marker_target"] >= 0.5)
  return loss_BR.sum() / total, (loss_BR.sum(axis=1), (agrees_BR * weight_BR).sum())


def loss_and_grads(
  graph: nnx.GraphDef, params: Params, frozen: Params, batch: dict[str, jax.Array], normalise: str
) -> tuple[jax.Array, Params, Metrics]:
  """Returns the loss of a global batch, its gradients and what else the step measured.

  Args:
    graph: from `state.split`.
    params: trainable parameters; the gradients have their paths and dtypes.
    frozen: all others.
    batch: arrays [A, B, ...]; see `bis_jax.inputs.pipeline`.
    normalise: "global" divides by the labelled markers of the whole batch, so the loss does not
      depend on how rows are packed, split into micro-batches or spread over devices; "micro"
      averages the means of the micro-batches, as the paper's released code does.
  """
  count_A = batch["marker_weight"].sum(axis=(1, 2))
  if normalise == "global":
    total_A = jnp.full_like(count_A, jnp.maximum(count_A.sum(), 1.0))
  else:
    total_A = jnp.maximum(count_A, 1.0) * len(count_A)
  grad_fn = jax.value_and_grad(_micro_loss, argnums=1, has_aux=True)

  def accumulate(carry, micro):
    rows, total = micro
    (loss, (row_loss_B, right)), grads = grad_fn(graph, params, frozen, rows, total)
    return jax.tree.map(jnp.add, carry, (loss, right, grads)), row_loss_B

  zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
  (loss, right, grads), row_loss_AB = jax.lax.scan(accumulate, zero, (batch, total_A))
  metrics = {
    "loss": loss,
    "marker_accuracy": right / jnp.maximum(count_A.sum(), 1.0),
    "row_loss": row_loss_AB,
  }
  return loss, grads, metrics


def make_train_step(
  graph: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  normalise: str,
  drop_path_seed: int | None = None,
) -> Callable[[TrainState, Params, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
  """Returns the jitted step (state, frozen, batch) -> (state, metrics); `state` is donated.

  Metrics: loss, marker_accuracy, grad_norm (before clipping), learning_rate, and row_loss
  float32[A, B], the loss sum of every row. With a `drop_path_seed` every micro-batch of every step
  gets a `drop_path_key` of its own.
  """

  def train_step(state, frozen, batch):
    if drop_path_seed is not None:
      key = jax.random.fold_in(jax.random.key(drop_path_seed), state.step)
      batch = batch | {"drop_path_key": jax.random.split(key, len(batch["tokens"]))}
    _, grads, metrics = loss_and_grads(graph, state.params, frozen, batch, normalise)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": schedule(state.step)}
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), metrics

  return jax.jit(train_step, donate_argnums=0)


def make_score_step(
  graph: nnx.GraphDef,
) -> Callable[[Params, dict[str, jax.Array]], jax.Array]:
  """Returns the jitted (params, batch [1, B, ...]) -> P("correct") at markers, float32[B, R]."""

  def score_step(params, batch):
    rows = {key: array[0] for key, array in batch.items()}
    return jax.nn.softmax(merge(graph, params)(rows))[..., 0]

  return jax.jit(score_step)
