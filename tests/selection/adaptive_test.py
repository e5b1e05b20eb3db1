"""Rollouts whose sampling may stop are never among the kept ones, whatever the other continuations."""

import itertools

import numpy as np
import pytest

from bis_jax.errors import UserError
from bis_jax.selection.adaptive import standing
from bis_jax.selection.rule import Rule, select


def table(table_of, counts, totals, **rest):
  """`counts` and `totals` are lists of rollouts of steps."""
  flat = [n for rollout in totals for n in rollout]
  scores = [
    [k / n if n else 0.0 for k, n in zip(*pair, strict=True)]
    for pair in zip(counts, totals, strict=True)
  ]
  return table_of(scores, continuations=flat, **rest)


@pytest.mark.parametrize("end", [4, 3])
@pytest.mark.parametrize(("tau", "none_positive"), [(0.0, 1.0), (0.4, 0.3), (0.0, 0.0)])
def test_bounds_are_those_of_all_completions(table_of, end, tau, none_positive):
  rng = np.random.default_rng(0)
  rule = Rule("bis", fraction=0.5, tau=tau, reliability_if_no_positive=none_positive)
  for _ in range(30):
    totals = rng.integers(0, end + 1, rng.integers(1, 4))
    counts = rng.integers(0, totals + 1)
    found = standing(table(table_of, [counts], [totals]), rule, end)
    choices = [range(k, k + end - n + 1) for k, n in zip(counts, totals, strict=True)]
    complete = [list(finals) for finals in itertools.product(*choices)]
    ends = table(table_of, complete, [[end] * len(counts)] * len(complete))
    scores = rule.scores(ends, ends.statistics(tau))
    assert found.low[0] == pytest.approx(scores.min(), rel=1e-8) and found.low[0] <= scores.min()
    assert found.high[0] == pytest.approx(scores.max(), rel=1e-8) and found.high[0] >= scores.max()
    assert found.left[0] == (end - totals).sum()


def test_a_score_of_exactly_tau_is_not_positive(table_of):
  """0.58 * 50 is below 29 in floating point, but 29 of 50 is not more than 0.58."""
  complete = table(table_of, [[29, 50]], [[50, 50]])
  found = standing(complete, Rule("bis", fraction=0.5, tau=0.58), 50)
  expected = (0.5 * 0.5 + 0.2) * 1.0  # one of two steps is positive, with an MC score of 1
  np.testing.assert_allclose([found.low[0], found.high[0]], expected, rtol=1e-8)


@pytest.mark.parametrize("scope", ["per_source", "global"])
def test_the_kept_set_is_the_same_if_sampling_stops(table_of, scope):
  """100 corpora whose continuations are sampled in turn; closed rollouts never open again."""
  rng, stopped = np.random.default_rng(1), 0
  rule = {"strategy": "bis", "fraction": 0.2, "scope": scope}
  for _ in range(100):
    counts = [rng.integers(0, 9, n) * rng.integers(0, 2, n) for n in rng.integers(1, 5, 40)]
    where = {"source": [0] * 25 + [1] * 15, "line": [*range(25), *range(15)], "names": ("a", "b")}
    complete = table(table_of, counts, [[8] * k.size for k in counts], **where)
    manifest = select(complete, **rule)
    lines = [25 * i + s.lines for i, s in enumerate(manifest.sources)]
    kept = np.isin(np.arange(40), np.concatenate(lines))
    drawn, before = [np.zeros_like(k) for k in counts], np.ones(40, bool)
    for sampled in range(1, 9):
      chance = [(k - d) / (9 - sampled) for k, d in zip(counts, drawn, strict=True)]
      drawn = [d + (rng.random(d.size) < p) for d, p in zip(drawn, chance, strict=True)]
      now = table(table_of, drawn, [[sampled] * k.size for k in counts], **where)
      is_open = standing(now, Rule(**rule), 8).open
      assert not (kept & ~is_open).any() and not (is_open & ~before).any()
      before = is_open
      stopped += (8 - sampled) * sum(counts[i].size for i in np.flatnonzero(~is_open))
    assert (is_open == kept).all(), "all are decided when all are sampled"
  assert stopped > 200


def test_ties_with_the_cut_are_closed_once_enough_stand_before_them(table_of):
  pure = table(table_of, [[0]] * 4, [[4]] * 4)
  rule = Rule("bis", count=2)
  assert standing(pure, rule, 4).open.tolist() == [True, True, False, False]
  half = table(table_of, [[0]] * 4, [[4], [2], [4], [4]])  # the second may fall or rise
  assert standing(half, rule, 4).open.tolist() == [True, True, True, False]


def test_what_cannot_be_said_is_refused(table_of):
  rule = Rule("bis", fraction=0.5)
  for rollouts in (table_of([[0.5]]), table(table_of, [[8]], [[16]])):
    with pytest.raises(UserError, match="needs num_mc_correct and num_mc_total of every step"):
      standing(rollouts, rule, 8)
  with pytest.raises(UserError, match="needs --strategy=bis"):
    standing(table(table_of, [[8]], [[16]]), Rule("random", fraction=0.5), 16)
