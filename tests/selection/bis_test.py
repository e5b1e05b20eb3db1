"""The Balanced-Information Score: the golden table, and rounding as a plain float64 loop rounds."""

from fractions import Fraction

import numpy as np
import pytest

from bis_jax.selection.bis import bis_scores


def score(steps, alpha):
  positive = [s for s in steps if s > 0]
  total = 0.0
  for s in positive:
    total += s
  args = np.array([len(steps)]), np.array([len(positive)]), np.array([total])
  return float(bis_scores(*args, alpha)[0])


# The steps of a rollout, its score at alpha 0.05 and at alpha 0.2, exact where `exact`.
GOLDEN = [
  ([0.0] * 5, 0.05, 0.2, True),
  ([1.0] * 6, 0.05, 0.2, True),
  ([0.5] * 6, 0.025, 0.1, True),
  ([0.5] * 4 + [0.0] * 4, 0.15, 0.225, True),
  ([0.4] * 4 + [0.0] * 4, 0.12, 0.18, False),
  ([1 / 16] * 4 + [0.0] * 4, 0.01875, 0.028125, True),
  ([0.9] * 7 + [0.0], 0.1434375, 0.2784375, False),
]


@pytest.mark.parametrize(("steps", "low", "high", "exact"), GOLDEN)
def test_golden_table(steps, low, high, exact):
  for alpha, expected in ((0.05, low), (0.2, high)):
    assert score(steps, alpha) == (expected if exact else pytest.approx(expected, rel=1e-15))


def test_pure_rollouts_tie_exactly():
  assert score([0.0] * 3, 0.05) == score([1.0] * 7, 0.05)


def test_unreliable_mixed_rollout_ranks_below_a_pure_one():
  assert score([0.4] * 4 + [0.0] * 4, 0.2) < score([1.0] * 8, 0.2)


def test_every_step_of_the_formula_rounds_to_float64():
  """All statistics of up to 16 steps in sixteenths, in Python floats, without a fused step."""
  for alpha in (0.05, 0.2):
    rows = [(n, k, u) for n in range(1, 17) for k in range(n + 1) for u in range(k, 16 * k + 1)]
    n, k, u = np.array(rows).T
    ours = bis_scores(n.astype(np.int16), k.astype(np.int16), u / 16, alpha)
    for (n_, k_, u_), got in zip(rows, ours.tolist(), strict=True):
      p = k_ / n_
      assert got == (p * (1.0 - p) + alpha) * ((u_ / 16) / k_ if k_ else 1.0)


def test_scores_are_within_rounding_of_the_rational_value():
  for n, k, u in [(3, 1, 5), (7, 3, 40), (11, 10, 99), (15, 8, 8), (13, 13, 1)]:
    p, alpha = Fraction(k, n), Fraction(0.05)
    exact = (p * (1 - p) + alpha) * Fraction(u, 16) / k
    got = bis_scores(np.array([n]), np.array([k]), np.array([u / 16]), 0.05)[0]
    assert abs(Fraction(float(got)) - exact) <= exact * Fraction(4, 2**53)
