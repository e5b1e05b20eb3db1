"""The reward head's gradient of single rollouts, measured on a model.

The head turns a step marker's state h into P(correct) = sigmoid(h . w), w the difference of its two
columns. The gradient of a rollout's mean cross-entropy in w is 1/n sum_i (s_i - y_i) h_i; in the
head's kernel [D, 2] it is that and its negative. `closed_forms` gives its expected moments.

Array names end in their dims: S steps of all rollouts, concatenated, M rollouts, D width.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from bis_jax.inputs import pipeline
from bis_jax.inputs.pipeline import Examples, InputError
from bis_jax.inputs.rows import device_arrays
from bis_jax.models.param_tree import merge
from bis_jax.parallel.sharding import OnMesh
from bis_jax.scoring.restore import LoadedRun

HEAD = "reward_head.kernel"


@dataclasses.dataclass(frozen=True)
class Steps:
  """The steps of some rollouts.

  rollout_S: int64, index of the rollout, non-decreasing from 0; every rollout has a step.
  label_S: float64, target of the loss.
  truth_S: float64, 1 for a correct step, else 0.
  score_S: float64, MC score.
  """

  rollout_S: np.ndarray
  label_S: np.ndarray
  truth_S: np.ndarray
  score_S: np.ndarray

  def mean(self, value_S: np.ndarray) -> np.ndarray:
    """Returns the mean over the steps of every rollout: [M] of [S], or [M, D] of [S, D]."""
    starts = np.flatnonzero(np.diff(self.rollout_S, prepend=-1))
    count = np.diff(np.append(starts, len(self.rollout_S)))
    total = np.add.reduceat(value_S, starts)
    return total / count.reshape(-1, *[1] * (value_S.ndim - 1))


@dataclasses.dataclass(frozen=True)
class RolloutGradients:
  """Gradient g of every rollout's mean loss, float64[M] each.

  square: squared norm of g.
  aligned: -g . direction, the speed of a gradient step along the unit vector `direction`.
  contrast_square, contrast: the same for the part of g that compares the steps of the rollout,
    1/n sum_i (r_i - rbar) h_i with r = s - y; it is 0 if all r are equal.
  true_aligned: `aligned` under the true labels.
  """

  square: np.ndarray
  aligned: np.ndarray
  contrast_square: np.ndarray
  contrast: np.ndarray
  true_aligned: np.ndarray


def marker_states(run: LoadedRun, examples: Examples) -> np.ndarray:
  """Returns float32[S, D]: the input of the reward head at every step of the examples, in order.

  The model runs with the identity matrix as its head.

  Raises:
    InputError: a step exceeds the run's length limit.
  """
  processor, inputs = run.processor, run.config.inputs
  measured = pipeline.measure(
    examples, processor.prompt, processor.images, max_length=inputs.max_length
  )
  if measured.dropped_steps.any():
    raise InputError(
      f"{np.count_nonzero(measured.dropped_steps)} rollouts have steps beyond {inputs.max_length} "
      "tokens: take a run with a larger config.inputs.max_length"
    )
  plan = measured.plan_rows(inputs, shuffle=False)
  head = run.params[HEAD]
  width = head.shape[0]
  params = run.params | {HEAD: jnp.eye(width, dtype=head.dtype)}
  first_step = np.cumsum(measured.costs[:, 2]) - measured.costs[:, 2]
  state_SD = np.zeros((measured.costs[:, 2].sum(), width), np.float32)
  step = OnMesh(jax.jit(lambda params, batch: merge(run.graph, params)(batch)), run.mesh)
  # Fewer rows than a batch are filled up with empty ones.
  for batch in pipeline.BatchIterator(
    measured, plan, rows_per_batch=run.config.evaluation.batch_rows
  ):
    state_BRD = np.asarray(step(params, device_arrays(batch)))
    used_BR = batch["example_index"] >= 0
    place = first_step[batch["example_index"][used_BR]] + batch["step_index"][used_BR]
    state_SD[place] = state_BRD[used_BR]
  return state_SD


def probabilities(params: Mapping[str, jax.Array], state_SD: np.ndarray) -> np.ndarray:
  """Returns P(correct) of every step, float64[S], from the model's own head."""
  kernel_D2 = np.asarray(params[HEAD], np.float64)
  return 1 / (1 + np.exp(-state_SD @ (kernel_D2[:, 0] - kernel_D2[:, 1])))


def true_direction(steps: Steps, probability_S: np.ndarray, state_SD: np.ndarray) -> np.ndarray:
  """Returns the unit vector float64[D] along which the loss under the true labels falls fastest.

  The mean over all steps, as in training. With this direction, and not the weights of a classifier
  fitted to the truth, <-g, direction> is the first-order gain in the true loss of a step against g, at
  any student; fitted weights also depend on their regularization. With the features of `closed_forms`
  and a student that has absorbed the prior both are u.

  A head without a bias learns the prior along the mean of the states; see `without_prior`.
  """
  ascent_D = (probability_S - steps.truth_S) @ state_SD
  return -ascent_D / np.linalg.norm(ascent_D)


def without_prior(direction_D: np.ndarray, state_SD: np.ndarray) -> np.ndarray:
  """Returns the direction with the mean of the states projected out, a unit vector float64[D]."""
  mean_D = state_SD.mean(axis=0, dtype=np.float64)
  left_D = direction_D - mean_D * (direction_D @ mean_D) / (mean_D @ mean_D)
  return left_D / np.linalg.norm(left_D)


def fitted_direction(steps: Steps, state_SD: np.ndarray, ridge: float = 1e-3) -> np.ndarray:
  """Returns the unit vector float64[D] of a logistic regression on the true labels.

  The mean loss plus ridge / 2 |w|^2, with an intercept, by Newton's method from zero.
  """
  x_SE = np.concatenate([state_SD, np.ones((len(state_SD), 1))], axis=1).astype(np.float64)
  penalty_E = np.append(np.full(state_SD.shape[1], ridge), 0.0)
  weight_E = np.zeros(x_SE.shape[1])
  for _ in range(30):
    s_S = 1 / (1 + np.exp(-x_SE @ weight_E))
    slope_E = x_SE.T @ (s_S - steps.truth_S) / len(x_SE) + penalty_E * weight_E
    curvature = (x_SE.T * (s_S * (1 - s_S))) @ x_SE / len(x_SE) + np.diag(penalty_E + 1e-9)
    change_E = np.linalg.solve(curvature, slope_E)
    weight_E -= change_E * min(1.0, 5.0 / np.linalg.norm(change_E))
  return weight_E[:-1] / np.linalg.norm(weight_E[:-1])


def rollout_gradients(
  steps: Steps, probability_S: np.ndarray, state_SD: np.ndarray, direction_D: np.ndarray
) -> RolloutGradients:
  """Returns the gradients of the M rollouts of `steps`.

  Args:
    steps: their steps.
    probability_S: float64, the student's P(correct).
    state_SD: float32.
    direction_D: a unit vector.
  """
  residual_S = probability_S - steps.label_S
  gradient_MD = steps.mean(residual_S[:, None] * state_SD)
  spread_S = residual_S - steps.mean(residual_S)[steps.rollout_S]
  contrast_MD = steps.mean(spread_S[:, None] * state_SD)
  true_MD = steps.mean((probability_S - steps.truth_S)[:, None] * state_SD)
  return RolloutGradients(
    square=(gradient_MD**2).sum(axis=1),
    aligned=-gradient_MD @ direction_D,
    contrast_square=(contrast_MD**2).sum(axis=1),
    contrast=-contrast_MD @ direction_D,
    true_aligned=-true_MD @ direction_D,
  )
