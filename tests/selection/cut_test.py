"""The kept set is the paper's rule, record for record, ties at the cut included."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bis_jax.corpus.score_table import PAPER_OK, STRICT_OK
from bis_jax.selection.cut import Rule, select


def kept(manifest):
  return {s.name: s.lines.tolist() for s in manifest.sources}


def test_ties_go_to_the_first_in_the_file(table_of):
  rollouts = [[0.0], [1.0] * 3, [0.0] * 2, [1.0]]  # one BIS value, four rollouts
  assert kept(select(table_of(rollouts), strategy="bis", fraction=0.5)) == {"a": [0, 1]}


@pytest.mark.parametrize(
  ("rollouts", "fraction", "expected"),
  [
    (1, 0.1, 1),
    (9, 0.1, 1),
    (19, 0.1, 1),
    (20, 0.1, 2),
    (10, 0.29, 2),
    (100, 0.29, 28),
    (7, 1.0, 7),
  ],
)
def test_quota_is_the_floor_of_the_float64_product(rollouts, fraction, expected):
  assert Rule("bis", fraction).quota(rollouts) == expected


def test_each_source_keeps_its_own_share(table_of):
  table = table_of(
    [[0.5, 0.0]] * 10 + [[1.0]] * 10, source=[0] * 10 + [1] * 10, line=[*range(10)] * 2,
    names=("a", "b"),
  )  # fmt: skip
  assert kept(select(table, strategy="bis", fraction=0.2)) == {"a": [0, 1], "b": [0, 1]}
  everywhere = select(table, strategy="bis", fraction=0.2, scope="global")
  assert kept(everywhere) == {"a": [0, 1, 2, 3], "b": []}
  assert kept(select(table, strategy="bis", count=3)) == {"a": [0, 1, 2], "b": [0, 1, 2]}


def test_strict_ranks_valid_rollouts_only_and_paper_drops_after_ranking(table_of):
  flags = [PAPER_OK, 0, STRICT_OK | PAPER_OK, STRICT_OK | PAPER_OK]
  table = table_of([[1.0, 0.0], [0.9, 0.0], [0.8, 0.0], [0.7, 0.0]], flags=flags)
  strict = select(table, strategy="bis", fraction=0.5)
  assert (kept(strict), strict.sources[0].scorable) == ({"a": [2]}, 2)
  paper = select(table, strategy="bis", fraction=0.5, order="paper")
  assert (kept(paper), paper.sources[0].scorable) == ({"a": [0]}, 4)
  assert paper.sources[0].dropped == 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"strategy": "best"}, "unknown strategy 'best': choose one of bis, full"),
    ({"fraction": 0.0}, r"must be in \(0, 1\]"),
    ({"fraction": 1.5}, r"must be in \(0, 1\]"),
    ({"fraction": float("nan")}, r"must be in \(0, 1\]"),
    ({"count": 3}, "not both"),
    ({"fraction": None}, "not neither"),
    ({"fraction": None, "count": 0}, "at least 1"),
    ({"alpha": -0.1}, "at least 0"),
    ({"order": "file"}, "'strict' or 'paper'"),
    ({"scope": "all"}, "'per_source' or 'global'"),
  ],
)
def test_parameters_outside_their_range_are_named(table_of, change, message):
  with pytest.raises(ValueError, match=message):
    select(table_of([[1.0, 0.0]] * 4), **({"strategy": "bis", "fraction": 0.5} | change))


def test_a_table_without_valid_rollouts_is_refused(table_of):
  with pytest.raises(ValueError, match="no rollout can be ranked in strict order"):
    select(table_of([[1.0]], flags=[0]), strategy="bis", fraction=0.5)


def reference(rollouts, fraction, alpha, key):
  """The paper's loop over one file: sort by score, ties in file order, keep the top."""
  order = sorted(range(len(rollouts)), key=lambda i: key(rollouts[i], alpha), reverse=True)
  return sorted(order[: max(1, int(len(rollouts) * fraction))])


def float_bis(steps, alpha):
  positive = [s for s in steps if s > 0]
  total = 0.0
  for s in positive:
    total += s
  p = len(positive) / len(steps)
  return (p * (1.0 - p) + alpha) * (total / len(positive) if positive else 1.0)


def rational_bis(steps, alpha):
  """The same in rational arithmetic: no rounding at all."""
  steps = [Fraction(s) for s in steps]
  positive = [s for s in steps if s > 0]
  p = Fraction(len(positive), len(steps))
  reliability = sum(positive) / len(positive) if positive else Fraction(1)
  return (p * (1 - p) + alpha) * reliability


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_kept_set_is_that_of_a_plain_float64_loop(table_of, data):
  continuations = data.draw(st.sampled_from([4, 8, 10, 16, 64]))
  step = st.integers(0, continuations).map(lambda c: c / continuations)
  # Few distinct rollouts, many copies: the cut falls among ties more often than not.
  kinds = data.draw(st.lists(st.lists(step, min_size=1, max_size=6), min_size=1, max_size=5))
  rollouts = data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=40))
  fraction = data.draw(st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.9, 1.0]))
  alpha = data.draw(st.sampled_from([0.0, 0.05, 0.2, 1.0]))
  manifest = select(table_of(rollouts), strategy="bis", fraction=fraction, alpha=alpha)
  assert kept(manifest) == {"a": reference(rollouts, fraction, alpha, float_bis)}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_kept_set_is_that_of_rational_arithmetic_where_float64_is_exact(table_of, data):
  """Powers of two as step counts and alpha keep every float64 operation exact."""
  steps = st.sampled_from([1, 2, 4, 8]).flatmap(
    lambda n: st.integers(0, n).filter(lambda k: k in (0, 1, 2, 4, 8)).flatmap(
      lambda k: st.lists(st.integers(1, 16), min_size=k, max_size=k).map(
        lambda u: [c / 16 for c in u] + [0.0] * (n - k)
      )
    )
  )  # fmt: skip
  rollouts = data.draw(st.lists(steps, min_size=1, max_size=30))
  fraction = data.draw(st.sampled_from([0.1, 0.25, 0.5]))
  manifest = select(table_of(rollouts), strategy="bis", fraction=fraction, alpha=0.25)
  assert kept(manifest) == {"a": reference(rollouts, fraction, Fraction(1, 4), rational_bis)}
