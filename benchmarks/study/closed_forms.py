"""Closed forms of the gradient signal of one rollout, for a logistic teacher and student.

Model. A step is correct (z = 1) with probability `prior`, or wrong (z = 0). Its features are

    x = v + (z - centre) distance u + e,    e ~ N(0, I),    v ~ N(0, offset^2 I),

u a unit vector in R^width, e of the step alone, v shared by the steps of a rollout (its picture, its
question, its style). Given v this is a logistic teacher, exactly: two Gaussians of one covariance
have log P(z=1|x) / P(z=0|x) = distance u.x + a constant, so u is the teacher's direction and
`distance` its slope. With centre = prior the features have mean 0: they are centred.

Labels. N continuations start from a step; each succeeds with the step's own rate, drawn from
`skill` for a correct step and from `recovery` for a wrong one. c of them succeed; the MC score is
c / N, the label y = 1 if c > 0. A wrong step with c > 0 is a pseudo-positive; a correct one with c = 0 is
missed. Labels and features are independent given z.

The student answers s = sigmoid(bias + scale u.x). The gradient of a rollout's mean cross-entropy over
its n steps is, in the student's weights, g = 1/n sum_i (s_i - y_i) x_i, and its component along the
teacher, the speed of a step against the gradient towards the teacher, is

    a = -u.g = 1/n sum_i (y_i - s_i) u.x_i.

The formulas need of a step only the table P(z, y) of its truth and its label given the condition on
the rollout: `tables_of_labels` for given labels, which is what a selection sees, and `tables_of_truth`
for given truth. Given the condition and v, the steps of a rollout are independent.

Source: arXiv 2602.04145, which argues BIS = (p (1 - p) + alpha) R from the expected
squared gradient and from label flips. Everything here is float64 NumPy.
Array names end in their dims: N steps of a rollout, C = n_mc + 1 counts, Q rates, X quadrature nodes,
Z truth (wrong, right), Y label (0, 1); `...` are any leading dims.
"""

from typing import NamedTuple

import numpy as np
from scipy import special, stats

_NODE_X = np.linspace(-9.0, 9.0, 361)  # of the quadrature, in standard deviations


class Moments(NamedTuple):
  """Moments of a rollout's gradient, float64[...] each.

  square: expected squared norm, E |g|^2.
  signal: expected component along the teacher, E a.
  variance: variance of that component.
  """

  square: np.ndarray
  signal: np.ndarray
  variance: np.ndarray

  @property
  def snr(self) -> np.ndarray:
    """Signal-to-noise along the teacher: signal / sqrt(variance)."""
    return self.signal / np.sqrt(self.variance)


def count_law(n_mc: int, rates_Q: np.ndarray) -> np.ndarray:
  """Returns P(c successes of n_mc continuations), float64[C], for equally likely success rates."""
  counts_C = np.arange(n_mc + 1)
  return stats.binom.pmf(counts_C[:, None], n_mc, np.asarray(rates_Q)[None]).mean(axis=1)


def flip_rate(n_mc: int, prior: float, skill_Q: np.ndarray, recovery_Q: np.ndarray) -> np.ndarray:
  """Returns the probability that a step's label is wrong given its MC score c / n_mc, float64[C].

  By Bayes, for c > 0 (the label is 1, so the flip is a pseudo-positive)

      P(z=0 | c) = (1 - prior) P(c | recovery) / (prior P(c | skill) + (1 - prior) P(c | recovery)),

  and 1 less that for c = 0. If every skill is above every recovery, the rate decreases as c > 0
  increases: log P(c | rates) grows per success by a weighted mean of log(rate / (1 - rate)) over the
  rates, which is then larger for skill than for recovery. So pseudo-positives are the positives with
  low MC scores.

  Args:
    n_mc: continuations per step, at least 1.
    prior: share of correct steps, in (0, 1).
    skill_Q, recovery_Q: equally likely success rates after a correct and after a wrong step, (0, 1).
  """
  right_C = prior * count_law(n_mc, skill_Q)
  wrong_C = (1 - prior) * count_law(n_mc, recovery_Q)
  flip_C = wrong_C / (right_C + wrong_C)
  flip_C[0] = 1 - flip_C[0]
  return flip_C


def step_table(n_mc: int, prior: float, skill_Q: np.ndarray, recovery_Q: np.ndarray) -> np.ndarray:
  """Returns the unconditional P(z, y) of a step, float64[Z, Y]; arguments as above."""
  zero = np.array([count_law(n_mc, rates)[0] for rates in (recovery_Q, skill_Q)])
  return np.array([1 - prior, prior])[:, None] * np.stack([zero, 1 - zero], axis=1)


def flips(table_ZY: np.ndarray) -> tuple[float, float]:
  """Returns (flip+, flip-): P(z=0 | y=1) of a positive and P(z=1 | y=0) of a negative label."""
  given_ZY = table_ZY / table_ZY.sum(axis=0, keepdims=True)
  return float(given_ZY[0, 1]), float(given_ZY[1, 0])


def tables_of_labels(
  label_N: np.ndarray, flip_positive: np.ndarray | float, flip_negative: np.ndarray | float
) -> np.ndarray:
  """Returns P(z, y) of steps with known labels, float64[..., N, Z, Y].

  Args:
    label_N: int[..., N], 0 or 1.
    flip_positive, flip_negative: probability that the label is wrong, from `flips`, or
      float[..., N] by the MC score of every step, from `flip_rate`.
  """
  label_N = np.asarray(label_N, np.float64)
  right_N = np.where(label_N > 0, 1 - np.asarray(flip_positive), flip_negative)
  z_NZ = np.stack([1 - right_N, right_N], axis=-1)
  y_NY = np.stack([1 - label_N, label_N], axis=-1)
  return z_NZ[..., :, None] * y_NY[..., None, :]


def tables_of_truth(truth_N: np.ndarray, table_ZY: np.ndarray) -> np.ndarray:
  """Returns P(z, y) of steps with known truth int[..., N], float64[..., N, Z, Y].

  `table_ZY` is that of `step_table`; only its P(y | z) matters.
  """
  given_ZY = table_ZY / table_ZY.sum(axis=1, keepdims=True)
  truth_N = np.asarray(truth_N, np.float64)
  z_NZ = np.stack([1 - truth_N, truth_N], axis=-1)
  return z_NZ[..., :, None] * given_ZY


def bias_only(
  table_NZY: np.ndarray,
  *,
  student: np.ndarray | float,
  centre: float,
  distance: float,
  width: int,
  offset: float = 0.0,
) -> Moments:
  """Returns the moments for a student that ignores the features (scale 0), in closed form.

  With r_i = s - y_i and m_i = (z_i - centre) distance,

      a = -1/n sum_i r_i (m_i + u.e_i) - rbar u.v,    rbar = 1/n sum_i r_i.

  u.e_i has mean 0 and variance 1 and is independent of (r_i, m_i); u.v is independent of all of them. So

      E a   = -1/n sum_i E[r_i m_i]
      Var a = 1/n^2 sum_i (E[r_i^2 m_i^2] - E[r_i m_i]^2 + E[r_i^2]) + offset^2 E[rbar^2]

  where E[rbar^2] = E[rbar]^2 + 1/n^2 sum_i Var[r_i]. Across the teacher each of the width - 1
  directions has only noise: -1/n sum_i r_i e_i - rbar v, of mean square 1/n^2 sum_i E[r_i^2] +
  offset^2 E[rbar^2]. E |g|^2 = E[a]^2 + Var a + (width - 1) times that.

  For given labels with mean p, zeta the mean of P(z_i = 1), and equal flips, this is

      E a = distance ((p - s) (zeta - centre) + p (1 - p) (1 - flip+ - flip-)).

  The second term is the contrast between the steps of the rollout: it does not depend on student and
  centre, and is 0 for a pure rollout (p = 0 or 1). The first compares the rollout as a whole with what
  the student expects, which is the prior.

  Args:
    table_NZY: from `tables_of_labels` or `tables_of_truth`.
    student: s, the student's probability for every step; float[...] or one number.
    centre, distance, width, offset: see the module.
  """
  n = table_NZY.shape[-3]
  s = np.asarray(student, np.float64)[..., None, None, None]
  r_ZY = s - np.array([0.0, 1.0])
  m_ZY = distance * (np.array([0.0, 1.0]) - centre)[:, None]

  def mean(value):
    return (table_NZY * value).sum(axis=(-2, -1))

  r_N, rr_N, rm_N = mean(r_ZY), mean(r_ZY**2), mean(r_ZY * m_ZY)
  rbar_square = r_N.mean(axis=-1) ** 2 + (rr_N - r_N**2).sum(axis=-1) / n**2
  signal = -rm_N.mean(axis=-1)
  across = rr_N.sum(axis=-1) / n**2 + offset**2 * rbar_square
  variance = (mean(r_ZY**2 * m_ZY**2) - rm_N**2).sum(axis=-1) / n**2 + across
  return Moments(signal**2 + variance + (width - 1) * across, signal, variance)


def absorbed(
  p: np.ndarray,
  n: np.ndarray,
  flip_positive: np.ndarray | float = 0.0,
  flip_negative: np.ndarray | float = 0.0,
  *,
  distance: float,
  width: int,
) -> Moments:
  """Returns the moments for given labels and a student at the rollout's own mixture, s = p.

  Put s = p into `bias_only`: sum_i r_i = 0, so the centre of the features and the offset of the
  rollout cancel; sum_i r_i^2 = n p (1 - p); and with

      kappa = 1 - flip+ - flip-,    V = (1 - p) flip+ (1 - flip+) + p flip- (1 - flip-)

      E a     = distance p (1 - p) kappa
      Var a   = p (1 - p) / n (1 + distance^2 V)
      E |g|^2 = p (1 - p) / n (width + distance^2 V) + (distance p (1 - p) kappa)^2

  The gradient of any other bias-only student is this one plus (s - p) xbar, which depends on the
  labels only through p. This one is the contrast, -1/n sum_i (y_i - p) (x_i - xbar).

  Args:
    p: share of positive labels, in [0, 1]; at 0 and 1 every moment is 0.
    n: steps.
    flip_positive, flip_negative: P(z=0 | y=1) and P(z=1 | y=0), each the same for all its steps.
    distance, width: see the module.
  """
  p, n = np.asarray(p, np.float64), np.asarray(n, np.float64)
  mix = p * (1 - p)
  signal = distance * mix * (1 - flip_positive - flip_negative)
  doubt = (1 - p) * flip_positive * (1 - flip_positive) + p * flip_negative * (1 - flip_negative)
  variance = mix / n * (1 + distance**2 * doubt)
  return Moments(signal**2 + variance + (width - 1) * mix / n, signal, variance)


def information(
  p: np.ndarray,
  n: np.ndarray,
  flip_positive: np.ndarray | float,
  flip_negative: np.ndarray | float,
  *,
  distance: float,
) -> np.ndarray:
  """Returns the squared signal-to-noise of `absorbed`, a rollout's contribution to a mean over many:

      n p (1 - p) distance^2 (1 - flip+ - flip-)^2 / (1 + distance^2 V),

  0 for a pure rollout. Arguments and V are those of `absorbed`.

  Relation to BIS = (p (1 - p) + alpha) R: with alpha = 0, no missed steps (flip- = 0), and MC
  scores that are calibrated, P(z=1 | c) = c / N at every positive step, 1 - flip+ averages to R and
  BIS is E a / distance. It differs from the exact information in that:

  1. It is the signal, not the signal-to-noise, whose square grows with n and with the square of
     1 - flip+ - flip-. BIS does not depend on n.
  2. MC scores are not P(correct): `flip_rate` is near 0 after a few successes, so BIS ranks down steps
     that are hard but surely correct. R and 1 - flip+ have the same order but not the same scale.
  3. It ignores flip-; R = 1 without a positive step means that nothing can be pseudo-positive.
  4. alpha: a pure rollout has no contrast, only the first term of `bias_only`. Divided by the distance
     it is (1 - s) (1 - flip+ - centre) if all steps are positive, s (centre - flip-) if none is. So
     alpha R is exact for the former at centre = 0 and alpha = 1 - s, for the latter at
     alpha = s (centre - flip-).
  """
  p, n = np.asarray(p, np.float64), np.asarray(n, np.float64)
  kappa = 1 - flip_positive - flip_negative
  doubt = (1 - p) * flip_positive * (1 - flip_positive) + p * flip_negative * (1 - flip_negative)
  return n * p * (1 - p) * (distance * kappa) ** 2 / (1 + distance**2 * doubt)


def along_teacher(
  table_NZY: np.ndarray,
  *,
  bias: np.ndarray | float,
  scale: np.ndarray | float,
  centre: float,
  distance: float,
  width: int,
) -> Moments:
  """Returns the moments for a student sigmoid(bias + scale u.x), without a rollout's offset.

  Given z, t = u.x ~ N((z - centre) distance, 1). The student depends on t alone, so the other width - 1
  components of x are noise of variance 1, independent of r = sigmoid(bias + scale t) - y, and

      E a     = -1/n sum_i E[r_i t_i]
      Var a   = 1/n^2 sum_i (E[r_i^2 t_i^2] - E[r_i t_i]^2)
      E |g|^2 = E[a]^2 + Var a + (width - 1) / n^2 sum_i E[r_i^2].

  The expectations over t are one-dimensional integrals, without elementary form for scale != 0. The
  trapezoid rule, which converges exponentially here, gives them to 1e-12 for |scale| <= 8. `scale` =
  distance with the teacher's own bias is the teacher. The other arguments are those of
  `bias_only`; bias and scale float[...] or one number.
  """
  n = table_NZY.shape[-3]
  weight_X = stats.norm.pdf(_NODE_X) * (_NODE_X[1] - _NODE_X[0])
  t_ZX = distance * (np.array([0.0, 1.0]) - centre)[:, None] + _NODE_X
  bias, scale = (np.asarray(value, np.float64)[..., None, None] for value in (bias, scale))
  s_ZX = special.expit(bias + scale * t_ZX)
  r_ZYX = s_ZX[..., :, None, :] - np.array([0.0, 1.0])[:, None]
  t_ZYX = t_ZX[:, None, :]

  def mean(value_ZYX):
    return (table_NZY * (value_ZYX @ weight_X)[..., None, :, :]).sum(axis=(-2, -1))

  rt_N, rr_N = mean(r_ZYX * t_ZYX), mean(r_ZYX**2)
  signal = -rt_N.mean(axis=-1)
  variance = (mean(r_ZYX**2 * t_ZYX**2) - rt_N**2).sum(axis=-1) / n**2
  return Moments(signal**2 + variance + (width - 1) * rr_N.sum(axis=-1) / n**2, signal, variance)
