"""Simulates the model of `closed_forms` from its definition, without any closed form.

Steps are drawn one by one: truth, success rate, every continuation, label. Rollouts are dealt from
them so that each has the labels (or the truth) that it is conditioned on, which is rejection sampling
that wastes nothing. Then come features, the student's answers and the gradient.

Array names end in their dims: M steps drawn, C continuations, Q rates, B rollouts, N step slots of a
rollout (`MAX_STEPS`, of which `steps` are used), W = WIDTH - 1 directions across the teacher, S
settings.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.study import closed_forms

WIDTH = 8  # of the features
MAX_STEPS = 16
MAX_MC = 16
_ROLLOUTS = 4096  # per setting, if the drawn steps suffice
_STEPS_DRAWN = 1 << 16


class Setting(NamedTuple):
  """Parameters of one simulation, with the names of `closed_forms`.

  steps, positives: n, and the number of positive steps (correct steps if `by_truth`).
  by_truth: rollouts are conditioned on the truth of their steps, not on their labels.
  n_mc, prior, skill, recovery: the labels; skill and recovery hold 4 rates each.
  bias, scale: the student.
  centre, distance, offset: the features; closed forms have offset 0 where scale != 0.
  """

  steps: int
  positives: int
  by_truth: bool
  n_mc: int
  prior: float
  skill: tuple[float, ...]
  recovery: tuple[float, ...]
  bias: float
  scale: float
  centre: float
  distance: float
  offset: float

  def table(self) -> np.ndarray:
    """Returns P(z, y) of a step, float64[2, 2]."""
    return closed_forms.step_table(self.n_mc, self.prior, self.skill, self.recovery)

  def closed_form(self) -> closed_forms.Moments:
    """Returns the moments by the closed forms."""
    given_N = (np.arange(self.steps) < self.positives).astype(int)
    if self.by_truth:
      tables = closed_forms.tables_of_truth(given_N, self.table())
    else:
      tables = closed_forms.tables_of_labels(given_N, *closed_forms.flips(self.table()))
    features = {"centre": self.centre, "distance": self.distance, "width": WIDTH}
    if self.scale:
      return closed_forms.along_teacher(tables, bias=self.bias, scale=self.scale, **features)
    student = 1 / (1 + np.exp(-self.bias))
    return closed_forms.bias_only(tables, student=student, offset=self.offset, **features)


class Estimate(NamedTuple):
  """Estimates with their standard errors, float64 each; see `closed_forms.Moments`."""

  rollouts: int
  square: float
  square_error: float
  signal: float
  signal_error: float
  snr: float
  snr_error: float


def _draw_steps(key: jax.Array, setting: Setting) -> tuple[jax.Array, jax.Array]:
  """Returns (truth, label) of steps, bool[M] each."""
  truth_key, rate_key, run_key = jax.random.split(key, 3)
  truth_M = jax.random.uniform(truth_key, (_STEPS_DRAWN,)) < setting.prior
  rate_M = jax.random.randint(rate_key, (_STEPS_DRAWN,), 0, setting.skill.shape[0])
  rate_M = jnp.where(truth_M, setting.skill[rate_M], setting.recovery[rate_M])
  success_MC = jax.random.uniform(run_key, (_STEPS_DRAWN, MAX_MC)) < rate_M[:, None]
  success_MC &= jnp.arange(MAX_MC)[None] < setting.n_mc
  return truth_M, success_MC.any(axis=1)


def _deal(setting: Setting, given_M: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns int[B, N], the step in every slot, and bool[B], whether there were enough steps.

  Slots i < positives get steps with given_M true, the next ones, up to `steps`, the others. Every step
  is dealt once, in the order of drawing.
  """
  order_M = jnp.argsort(given_M, stable=True)  # false ones come first
  without = jnp.sum(~given_M)
  slot_N = jnp.arange(MAX_STEPS)
  is_positive_N = slot_N < setting.positives
  rollout_B = jnp.arange(_ROLLOUTS)
  negatives = setting.steps - setting.positives
  positive_BN = without + rollout_B[:, None] * setting.positives + slot_N[None]
  negative_BN = rollout_B[:, None] * negatives + (slot_N - setting.positives)[None]
  place_BN = jnp.where(is_positive_N[None], positive_BN, negative_BN)
  enough_B = ((rollout_B + 1) * setting.positives <= _STEPS_DRAWN - without) & (
    (rollout_B + 1) * negatives <= without
  )
  return order_M.at[place_BN].get(mode="clip"), enough_B


def gradients(key: jax.Array, setting: Setting) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns |g|^2 and a of rollouts, float32[B] each, and bool[B], whether the rollout exists.

  `setting` holds scalar arrays, and float32[4] for the rates.
  """
  step_key, own_key, across_key, shared_key = jax.random.split(key, 4)
  truth_M, label_M = _draw_steps(step_key, setting)
  step_BN, enough_B = _deal(setting, jnp.where(setting.by_truth, truth_M, label_M))
  truth_BN, label_BN = truth_M[step_BN], label_M[step_BN]
  own_BN = jax.random.normal(own_key, truth_BN.shape)
  across_BNW = jax.random.normal(across_key, (*truth_BN.shape, WIDTH - 1))
  shared_B1 = setting.offset * jax.random.normal(shared_key, (_ROLLOUTS, 1))
  shared_B1W = setting.offset * jax.random.normal(
    jax.random.fold_in(shared_key, 1), (_ROLLOUTS, 1, WIDTH - 1)
  )
  along_BN = (truth_BN - setting.centre) * setting.distance + own_BN + shared_B1
  residual_BN = jax.nn.sigmoid(setting.bias + setting.scale * along_BN) - label_BN
  used_N = jnp.arange(MAX_STEPS) < setting.steps
  residual_BN = jnp.where(used_N[None], residual_BN, 0.0) / setting.steps
  aligned_B = -jnp.sum(residual_BN * along_BN, axis=1)
  across_BW = jnp.einsum("bn,bnw->bw", residual_BN, across_BNW + shared_B1W)
  return aligned_B**2 + jnp.sum(across_BW**2, axis=1), aligned_B, enough_B


_gradients = jax.jit(gradients)


def simulate(settings: list[Setting], seed: int = 0) -> list[Estimate]:
  """Returns the estimates of every setting; they depend on it, its position and the seed."""
  drawn = []
  for i, setting in enumerate(settings):
    arrays = Setting(*(jnp.asarray(np.array(value)) for value in setting))
    drawn.append(_gradients(jax.random.fold_in(jax.random.key(seed), i), arrays))
  return [_estimate(*(np.asarray(array) for array in of_one)) for of_one in drawn]


def _estimate(square_B: np.ndarray, aligned_B: np.ndarray, there_B: np.ndarray) -> Estimate:
  """Returns means with standard errors; the ratio's is by the delta method."""
  square, aligned = (x[there_B].astype(np.float64) for x in (square_B, aligned_B))
  count = len(square)
  signal, deviation = aligned.mean(), aligned.std(ddof=1)
  z = (aligned - signal) / deviation
  snr = signal / deviation
  # The ratio moves by z / sqrt(count) with the mean, and by -snr (z^2 - 1) / 2 with the deviation.
  snr_error = np.std(z - snr * (z**2 - 1) / 2, ddof=1) / np.sqrt(count)
  return Estimate(
    rollouts=count,
    square=square.mean(),
    square_error=square.std(ddof=1) / np.sqrt(count),
    signal=signal,
    signal_error=deviation / np.sqrt(count),
    snr=snr,
    snr_error=snr_error,
  )


def varied_settings(count: int = 50, seed: int = 0) -> list[Setting]:
  """Returns settings drawn from wide ranges, of five kinds in turn.

  Students with s = 1/2, at the prior, at the rollout's own mixture, and along the teacher (short of it
  or past it), and rollouts conditioned on their truth.
  """
  rng = np.random.default_rng(seed)
  settings = []
  for i in range(count):
    kind = ("undecided", "prior", "mixture", "scale", "truth")[i % 5]
    steps = int(rng.integers(2, MAX_STEPS + 1))
    positives = int(rng.integers(0 if kind != "mixture" else 1, steps + (kind != "mixture")))
    prior = rng.uniform(0.4, 0.8)
    share = {"undecided": 0.5, "mixture": positives / steps}.get(kind, prior)
    settings.append(
      Setting(
        steps=steps,
        positives=positives,
        by_truth=kind == "truth",
        n_mc=int(rng.integers(1, MAX_MC + 1)),
        prior=prior,
        skill=tuple(rng.uniform(0.3, 1.0, 4)),
        recovery=tuple(rng.uniform(0.0, 0.15, 4)),
        bias=float(np.log(share / (1 - share))),
        scale=rng.uniform(-1, 3) if kind == "scale" else 0.0,
        centre=rng.uniform(0, 1) if i % 2 else prior,
        distance=rng.uniform(0.3, 3),
        offset=0.0 if kind == "scale" else rng.uniform(0, 2),
      )
    )
  return settings


def deviations(settings: list[Setting], estimates: list[Estimate]) -> dict[str, np.ndarray]:
  """Returns (simulation - closed form) / standard error of square, signal and snr: float64[S]."""
  closed = [setting.closed_form() for setting in settings]
  return {
    name: np.array(
      [
        (getattr(estimate, name) - getattr(moments, name)) / getattr(estimate, f"{name}_error")
        for estimate, moments in zip(estimates, closed, strict=True)
      ]
    )
    for name in ("square", "signal", "snr")
  }
