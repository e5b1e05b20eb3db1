"""The kept set is the paper's rule, record for record, ties at the cut included."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bis_jax.corpus.score_table import PAPER_OK, STRICT_OK
from bis_jax.errors import UserError
from bis_jax.selection.rule import Rule, select


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
    ({"reliability_if_no_positive": 1.1}, r"none_positive is 1.1; it must be in \[0, 1\]"),
    ({"reliability_if_no_positive": float("nan")}, r"must be in \[0, 1\]"),
    ({"order": "file"}, "'strict' or 'paper'"),
    ({"scope": "all"}, "'per_source' or 'global'"),
  ],
)
def test_parameters_outside_their_range_are_named(table_of, change, message):
  with pytest.raises(UserError, match=message):
    select(table_of([[1.0, 0.0]] * 4), **({"strategy": "bis", "fraction": 0.5} | change))


def test_a_table_without_valid_rollouts_is_refused(table_of):
  with pytest.raises(UserError, match="no rollout can be ranked in strict order"):
    select(table_of([[1.0]], flags=[0]), strategy="bis", fraction=0.5)


def rounded(exact):
  """The float64 nearest to an exact value: one IEEE operation, done in rational arithmetic."""
  return Fraction(float(exact))


def slow_sum(values):
  total = Fraction(0)
  for value in values:
    total = rounded(total + value)
  return total


def slow_score(strategy, steps, alpha, none_positive):
  """A rollout's score as the paper writes it, each operation exact and then rounded once."""
  steps = [Fraction(s) for s in steps]
  positive = [s for s in steps if s > 0]
  p = rounded(Fraction(len(positive), len(steps)))
  mixture = rounded(p * rounded(1 - p))
  reliability = rounded(slow_sum(positive) / len(positive)) if positive else none_positive
  spread = slow_sum(rounded(s * rounded(1 - s)) for s in steps)
  return {
    "bis": rounded(rounded(mixture + Fraction(alpha)) * reliability),
    "mixture_only": mixture,
    "reliability_only": reliability,
    "reliable": reliability,
    "low_mc": -reliability if positive else None,
    "average_stepwise": rounded(spread / len(steps)),
  }[strategy]


def slow_select(strategy, rollouts, fraction, alpha, none_positive=1.0):
  """The paper's loop over one file: sort by score, ties in file order, keep the top."""
  none_positive = Fraction(none_positive)
  scores = [slow_score(strategy, rollout, alpha, none_positive) for rollout in rollouts]
  candidates = [i for i, score in enumerate(scores) if score is not None]
  candidates.sort(key=lambda i: scores[i], reverse=True)
  return sorted(candidates[: max(1, int(len(rollouts) * fraction))])


CONTINUATIONS = st.sampled_from([4, 7, 8, 10, 16, 64])


@st.composite
def corpora(draw, sources=3):
  """Rollouts by source; few distinct ones and many copies, so that the cut falls among ties."""
  continuations = draw(CONTINUATIONS)
  step = st.integers(0, continuations).map(lambda c: c / continuations)
  kinds = draw(st.lists(st.lists(step, min_size=1, max_size=7), min_size=1, max_size=6))
  source = st.lists(st.sampled_from(kinds), min_size=1, max_size=25)
  return draw(st.lists(source, min_size=1, max_size=sources))


FRACTIONS = st.sampled_from([0.05, 0.1, 0.25, 0.29, 0.5, 0.9, 1.0])
ALPHAS = st.sampled_from([0.0, 0.05, 0.2, 1.0])
RANKED_BY_STATISTICS = st.sampled_from(
  ["bis", "mixture_only", "reliability_only", "reliable", "low_mc", "average_stepwise"]
)


NONE_POSITIVE = st.sampled_from([1.0, 0.0, 0.3, 0.5])


@settings(max_examples=400)
@given(corpora(), FRACTIONS, ALPHAS, RANKED_BY_STATISTICS, NONE_POSITIVE)
def test_kept_set_is_that_of_rational_arithmetic(
  table_of, corpus, fraction, alpha, strategy, none_positive
):
  names = tuple("abc"[: len(corpus)])
  table = table_of(
    sum(corpus, []),
    source=[i for i, rollouts in enumerate(corpus) for _ in rollouts],
    line=[line for rollouts in corpus for line in range(len(rollouts))],
    names=names,
  )
  rule = {"strategy": strategy, "fraction": fraction, "alpha": alpha}
  rule["reliability_if_no_positive"] = none_positive
  assert kept(select(table, **rule)) == {
    name: slow_select(strategy, rollouts, fraction, alpha, none_positive)
    for name, rollouts in zip(names, corpus, strict=True)
  }
  together = slow_select(strategy, sum(corpus, []), fraction, alpha, none_positive)
  places = [(name, line) for name, of in zip(names, corpus, strict=True) for line in range(len(of))]
  assert kept(select(table, **rule, scope="global")) == {
    name: [line for source, line in (places[i] for i in together) if source == name]
    for name in names
  }


def test_without_its_rule_a_rollout_without_a_positive_step_comes_last(table_of):
  rollouts = [[0.0, 0.0], [1 / 16], [0.0], [1 / 16, 1 / 16]]
  rule = {"strategy": "bis", "fraction": 0.5}
  assert kept(select(table_of(rollouts), **rule)) == {"a": [0, 2]}
  assert kept(select(table_of(rollouts), **rule, reliability_if_no_positive=0.0)) == {"a": [1, 3]}
  tied = select(table_of(rollouts), **rule, reliability_if_no_positive=1 / 16)
  assert kept(tied) == {"a": [0, 1]}


@settings(max_examples=100)
@given(st.data())
def test_a_cut_among_ties_keeps_the_first_of_them(table_of, data):
  """Every rollout ties: the kept ones are a prefix, of exactly the quota."""
  pure = st.sampled_from([[0.0], [0.0, 0.0], [1.0], [1.0] * 5])  # BIS is alpha for each
  rollouts = data.draw(st.lists(pure, min_size=1, max_size=60))
  fraction, alpha = data.draw(FRACTIONS), data.draw(ALPHAS)
  lines = kept(select(table_of(rollouts), strategy="bis", fraction=fraction, alpha=alpha))["a"]
  assert lines == list(range(max(1, int(len(rollouts) * fraction))))


@settings(max_examples=100)
@given(corpora(sources=1), FRACTIONS, st.randoms(use_true_random=False))
def test_both_orders_follow_their_definition(table_of, corpus, fraction, random):
  (rollouts,) = corpus
  flags = [random.choice([0, STRICT_OK, PAPER_OK, STRICT_OK | PAPER_OK]) for _ in rollouts]
  table = table_of(rollouts, flags=flags)
  paper = kept(select(table, strategy="bis", fraction=fraction, order="paper"))["a"]
  ranked_high = slow_select("bis", rollouts, fraction, 0.2)
  assert paper == [line for line in ranked_high if flags[line] & PAPER_OK]
  strict = [line for line, flag in enumerate(flags) if flag & STRICT_OK]
  if strict:
    chosen = slow_select("bis", [rollouts[line] for line in strict], fraction, 0.2)
    expected = [strict[i] for i in chosen]
    assert kept(select(table, strategy="bis", fraction=fraction))["a"] == expected
