"""One jitted training step: loss, gradients, update.

Batch arrays arrive as [A, B, ...]: A micro-batches, accumulated in a scan, of B rows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.scipy.special import betaln
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bis_jax.models import backbones, learning_rates
from bis_jax.models.chip_settings import compiler_options
from bis_jax.models.param_tree import Params, merge
from bis_jax.models.reward_model import belief
from bis_jax.parallel.sharding import OnMesh
from bis_jax.training import optim
from bis_jax.training.train_state import TrainState, abstract_state, split_trainable

Metrics = dict[str, jax.Array]
MICRO_ROLLOUTS = 2  # of a micro-batch of the paper's released code


def marker_loss(logits_BR2: jax.Array, target_BR: jax.Array, weight_BR: jax.Array) -> jax.Array:
  """Returns the weighted cross-entropy of every step marker, float32[B, R], 0 at unused markers.

  The logits are float32 ("correct", "wrong"), the target is the probability of "correct", float32
  in [0, 1], and the weight float32, 1 at labelled markers, else 0.
  """
  log_p_BR2 = jax.nn.log_softmax(logits_BR2)
  loss_BR = -(target_BR * log_p_BR2[..., 0] + (1 - target_BR) * log_p_BR2[..., 1])
  return jnp.where(weight_BR > 0, weight_BR * loss_BR, 0.0)


def belief_loss(logits_BR2: jax.Array, target_BR: jax.Array, count_BR: jax.Array) -> jax.Array:
  """Returns the negative log Beta-Binomial likelihood of every step marker, float32[B, R].

  The target is the share of `count` continuations that reach the right answer; the loss is 0 where
  the count is 0. Source: arXiv 2605.15529.
  """
  mean_BR, concentration_BR = belief(logits_BR2)
  a_BR, b_BR = mean_BR * concentration_BR, (1 - mean_BR) * concentration_BR
  n_BR = jnp.maximum(count_BR, 1.0)
  k_BR = target_BR * n_BR
  loss_BR = betaln(a_BR, b_BR) - betaln(a_BR + k_BR, b_BR + n_BR - k_BR)
  loss_BR += betaln(k_BR + 1, n_BR - k_BR + 1) + jnp.log(n_BR + 1)  # - log of n over k
  return jnp.where(count_BR > 0, loss_BR, 0.0)


def next_token_loss(
  logits_BTV: jax.Array, tokens_BT: jax.Array, segment_BT: jax.Array, is_image_BT: jax.Array
) -> jax.Array:
  """Returns the mean cross-entropy, float32[], of every token that follows another of its segment.

  Float32 logits at each token predict the next one; segment 0 is padding, and image tokens are not
  predicted.
  """
  next_BS = tokens_BT[:, 1:]
  log_p_BSV = jax.nn.log_softmax(logits_BTV[:, :-1])
  log_p_BS = jnp.take_along_axis(log_p_BSV, next_BS[..., None], axis=-1)[..., 0]
  counts_BS = (segment_BT[:, 1:] == segment_BT[:, :-1]) & (segment_BT[:, 1:] > 0)
  counts_BS &= ~is_image_BT[:, 1:]
  return -jnp.where(counts_BS, log_p_BS, 0.0).sum() / jnp.maximum(counts_BS.sum(), 1)


def _micro_loss(
  graph: nnx.GraphDef, params: Params, frozen: Params, batch: dict[str, jax.Array], total: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns a micro-batch's share of the loss, with (loss sum of each row [B], right markers)."""
  logits_BR2 = merge(graph, params | frozen)(batch)
  weight_BR = batch["marker_weight"]
  if "marker_count" in batch:
    loss_BR = belief_loss(logits_BR2, batch["marker_target"], batch["marker_count"])
  else:
    loss_BR = marker_loss(logits_BR2, batch["marker_target"], weight_BR)
  agrees_BR = (logits_BR2[..., 0] >= logits_BR2[..., 1]) == (batch["marker_target"] >= 0.5)
  loss = (loss_BR / total).sum() if total.ndim else loss_BR.sum() / total
  return loss, (loss_BR.sum(axis=1), (agrees_BR * weight_BR).sum())


def _micro_totals(batch: dict[str, jax.Array]) -> jax.Array:
  """Returns, for every marker, labelled markers of its micro-batch x micro-batches, [A, B, R]."""
  # Rollouts are numbered in the order of the rows, of which micro-batch a has a, a + A, ...
  count_BA = batch["marker_rollout"].max(axis=-1).T
  last_BA = jnp.cumsum(count_BA.ravel()).reshape(count_BA.shape)
  rollout_ABR = (last_BA - count_BA).T[..., None] + batch["marker_rollout"] - 1
  micro_ABR = rollout_ABR // MICRO_ROLLOUTS
  labelled_G = jnp.zeros(micro_ABR.size).at[micro_ABR].add(batch["marker_weight"])
  micro_batches = -(-count_BA.sum() // MICRO_ROLLOUTS)
  return jnp.maximum(labelled_G[micro_ABR], 1.0) * jnp.maximum(micro_batches, 1)


def loss_and_grads(
  graph: nnx.GraphDef, params: Params, frozen: Params, batch: dict[str, jax.Array], normalise: str
) -> tuple[jax.Array, Params, Metrics]:
  """Returns the loss of a global batch (arrays [A, B, ...]), its gradients and metrics.

  Gradients are float32 and have the paths of `params`, the trainable parameters; `frozen` are the
  others. `normalise` "global" divides by the labelled markers of the whole batch, so the loss does
  not depend on how rows are packed, split into micro-batches or spread over devices; "micro"
  averages the means of MICRO_ROLLOUTS rollouts each, as the paper's released code does.
  """
  count_A = batch["marker_weight"].sum(axis=(1, 2))
  if normalise == "global":
    total_A = jnp.full_like(count_A, jnp.maximum(count_A.sum(), 1.0))
  else:
    total_A = _micro_totals(batch)
  grad_fn = jax.value_and_grad(_micro_loss, argnums=1, has_aux=True)

  def accumulate(carry, micro):
    rows, total = micro
    (loss, (row_loss_B, right)), grads = grad_fn(graph, params, frozen, rows, total)
    return jax.tree.map(jnp.add, carry, (loss, right, grads)), row_loss_B

  zero = (jnp.float32(0), jnp.float32(0), optax.tree.zeros_like(params, dtype=jnp.float32))
  (loss, right, grads), row_loss_AB = jax.lax.scan(accumulate, zero, (batch, total_A))
  metrics = {
    "loss": loss,
    "marker_accuracy": right / jnp.maximum(count_A.sum(), 1.0),
    "row_loss": row_loss_AB,
  }
  return loss, grads, metrics


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """The training step of a config and the shapes of its arguments, with shardings."""

  step: OnMesh  # (state, frozen, batch) -> (state, metrics); see `make_train_step`
  optimizer: optax.GradientTransformation
  factors: dict[str, float]  # learning-rate factor of every parameter
  state: TrainState
  frozen: dict[str, jax.ShapeDtypeStruct]


def step_of(config: ConfigDict, model_config: Any, mesh: Mesh, steps: int) -> TrainStep:
  """Returns the training step of a run of `steps` steps; allocates no array."""
  graph, shapes = backbones.structure(model_config, mesh)
  factors = learning_rates.factors(config, shapes)
  optimizer = optim.optimizer(config.optim, steps, factors)
  step = make_train_step(
    graph,
    optimizer,
    optim.schedule(config.optim, steps),
    config.loss.normalise,
    config.seed if model_config.needs_random_key else None,
    compiler_options(mesh, config.train.compiler_options),
    beliefs=config.labels.kind == "beta",
  )
  trainable, frozen = split_trainable(shapes, factors)
  state = abstract_state(optimizer, trainable, mesh, config.optim.on_host)
  return TrainStep(OnMesh(step, mesh), optimizer, factors, state, frozen)


def make_train_step(
  graph: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  normalise: str,
  random_seed: int | None = None,
  options: dict[str, Any] | None = None,
  beliefs: bool = False,
) -> jax.stages.Wrapped:
  """Returns the jitted step (state, frozen, batch) -> (state, metrics); `state` is donated.

  Metrics: loss, marker_accuracy, grad_norm (before clipping), learning_rate, update_is_finite, and
  row_loss float32[A, B], the loss sum of every row. With a `random_seed` every micro-batch of every step
  gets a different `random_key`. `options` are those of the compiler. With `beliefs` the loss is
  `belief_loss`.
  """

  def train_step(state, frozen, batch):
    if random_seed is not None:
      key = jax.random.fold_in(jax.random.key(random_seed), state.step)
      batch = batch | {"random_key": jax.random.split(key, len(batch["tokens"]))}
    if beliefs:  # weights are numbers of continuations
      weight = batch["marker_weight"]
      batch = batch | {"marker_count": weight, "marker_weight": (weight > 0).astype(weight.dtype)}
    _, grads, metrics = loss_and_grads(graph, state.params, frozen, batch, normalise)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": schedule(state.step)}
    metrics["update_is_finite"] = jnp.isfinite(optax.tree.norm(updates))
    params = optim.apply_updates(state.params, updates, state.step)
    return TrainState(state.step + 1, params, opt_state), metrics

  return jax.jit(train_step, donate_argnums=0, compiler_options=options)
