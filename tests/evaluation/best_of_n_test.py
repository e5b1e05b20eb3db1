"""Best-of-N against plain loops, ties, missing candidates and certain scores included."""

import collections
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bis_jax.evaluation import answers, best_of_n
from bis_jax.evaluation.json_records import EvaluationError
from bis_jax.reports import plots

EXACT = {"rtol": 0, "atol": 1e-12}
SCORES = st.lists(st.sampled_from([0, 0.25, 0.5, 1]) | st.floats(0, 1), max_size=5)
CANDIDATE = st.none() | st.fixed_dictionaries(
  {"answer": st.sampled_from(["1", "2", " 3 ", "", None]), "scores": SCORES}
)
# An answer is right by its text; a candidate without one is wrong.
QUESTIONS = st.lists(st.lists(CANDIDATE, max_size=6), min_size=1, max_size=8).filter(
  lambda rows: any(rows)
)


def write(path, rows):
  lines = []
  for q, row in enumerate(rows):
    marked = [c and {**c, "correct": (c["answer"] or "").strip() == "1"} for c in row]
    lines.append(json.dumps({"id": q, "candidates": marked}))
  path.write_text("\n".join(lines) + "\n")
  return str(path)


def one_number(scores, name):
  """The aggregation of a list of scores by its definition."""
  if name in ("sum_log", "sum_logit") and 0 in scores:
    return -math.inf
  return {
    "min": lambda: min(scores),
    "last": lambda: scores[-1],
    "product": lambda: math.prod(scores),
    "mean": lambda: sum(scores) / len(scores),
    "max": lambda: max(scores),
    "sum_log": lambda: sum(map(math.log, scores)),
    "sum_logit": lambda: sum(
      math.log(p) - math.log1p(-p) for p in (min(s, 1 - 2**-24) for s in scores)
    ),
  }[name]()


def right_by_loops(row, n, value):
  """Whether the first present candidate with the highest value among the first n is right."""
  best = None
  for candidate in row[:n]:
    if candidate is None or not candidate["scores"]:
      continue
    if best is None or value(candidate) > value(best):
      best = candidate
  return best is not None and (best["answer"] or "").strip() == "1"


@settings(max_examples=60)
@given(rows=QUESTIONS)
def test_every_pick_is_the_definitions(tmp_path_factory, rows):
  path = write(tmp_path_factory.getbasetemp() / "candidates.jsonl", rows)
  candidates = best_of_n.load(path, missing="worst")
  result = best_of_n.evaluate(candidates, bootstrap_draws=0)
  longest = max(map(len, rows))
  assert result["n"] == sorted({*(2**k for k in range(5) if 2**k <= longest), longest})
  # Picks hang on comparisons of sums, so the loops compare the aggregates that were tested below.
  values = {name: best_of_n.aggregate(candidates.scores, name) for name in best_of_n.AGGREGATIONS}
  for name in best_of_n.AGGREGATIONS:
    for position, n in enumerate(result["n"]):
      want = []
      for q, row in enumerate(rows):
        of = {id(c): values[name][q, k] for k, c in enumerate(row)}
        want.append(right_by_loops(row, n, lambda c, of=of: of[id(c)]))
      assert result["curve"][name]["values"][position] == np.mean(want)
  for position, n in enumerate(result["n"]):
    some, most = [], []
    for row in rows:
      answers = [(c["answer"] or "").strip() for c in row[:n] if c and c["scores"]]
      some.append("1" in answers)
      votes = collections.Counter(filter(None, answers)).most_common()  # first given, of equals
      most.append(bool(votes) and votes[0][0] == "1")
    assert result["curve"]["pass@n"]["values"][position] == np.mean(some)
    assert result["curve"]["majority_vote"]["values"][position] == np.mean(most)


@settings(max_examples=200)
@given(
  st.lists(st.floats(0, 1), min_size=1, max_size=6), st.sampled_from([*best_of_n.AGGREGATIONS])
)
def test_aggregations_are_their_definitions(scores, name):
  got = best_of_n.aggregate([[np.array(scores), None]], name)
  assert np.isnan(got[0, 1])
  np.testing.assert_allclose(got[0, 0], one_number(scores, name), rtol=1e-12, atol=1e-12)


def test_ties_go_to_the_first_candidate():
  values = np.array([[0.5, 0.9, 0.9], [0.2, 0.2, 0.2], [np.nan, -np.inf, -np.inf]])
  assert best_of_n.pick(values, 3).tolist() == [1, 0, 1]
  assert best_of_n.pick(values, 1).tolist() == [0, 0, -1]
  assert best_of_n.majority([["b", "a", "a", "b"], [None, "a", "b"], [None]], 4).tolist() == [
    0,
    1,
    -1,
  ]


@settings(max_examples=60)
@given(rows=QUESTIONS, name=st.sampled_from(best_of_n.VOTES))
def test_a_weighted_vote_is_its_definition(tmp_path_factory, rows, name):
  """Mutation caught: a vote counts candidates, or the largest value of an answer."""
  path = write(tmp_path_factory.getbasetemp() / "votes.jsonl", rows)
  candidates = best_of_n.load(path, missing="worst")
  values = best_of_n.aggregate(candidates.scores, name)
  n = len(values[0])
  right = []
  for row, weights in zip(candidates.answers, values, strict=True):
    sums = {}
    for answer, weight in zip(row, weights, strict=True):
      if answer is not None:
        sums[answer] = sums.get(answer, 0.0) + weight
    first = next((a for a in row if a is not None and sums[a] == max(sums.values())), None)
    right.append(first == "1")
  result = best_of_n.evaluate(candidates, bootstrap_draws=0)
  assert result["n"][-1] == n
  assert result["curve"][f"{name}_vote"]["values"][-1] == np.mean(right)


def test_two_certain_voters_lose_to_one_more_certain_answer():
  answers = [["a", "b", "b", None]]
  weights = np.array([[0.9, 0.3, 0.5, np.nan]])
  assert best_of_n.weighted_majority(answers, weights, 4).tolist() == [0]
  assert best_of_n.weighted_majority(answers, weights + 0.2, 4).tolist() == [1]
  assert best_of_n.weighted_majority([[None]], np.array([[np.nan]]), 1).tolist() == [-1]


@pytest.mark.parametrize(
  ("first", "second", "equal"),
  [
    ("52", "52.0", True),
    ("1/2", "0.5", True),
    ("$0.5$", r"\frac{1}{2}", True),
    (r"\frac12", r"$\dfrac{1}{2}$", True),
    ("1,000", "1000", True),
    ("50%", "0.5", True),
    (r"2\sqrt{3}", r"\sqrt{12}", True),
    (r"2\sqrt{3}", "2", False),
    ("(B)", "b", True),
    ("B", "C", False),
    ("Yes.", "yes", True),
    ("3 cm", "3 m", False),
    ("x = 3", "3 apples", False),
    ("3", "4", False),
  ],
)
def test_answers_are_the_same_as_mathematics(first, second, equal):
  assert answers.same(first, second) == answers.same(second, first) == equal


def test_equal_answers_vote_together_and_are_judged_by_the_questions(tmp_path):
  """Mutation caught: 0.5 and 1/2 are two answers, so the majority is another."""
  row = [{"answer": a, "scores": [0.5]} for a in ("3", "1/2", "0.5", r"\frac{1}{2}", "3.0", None)]
  (tmp_path / "c").write_text(json.dumps({"id": 1, "answer": "0.50", "candidates": row}))
  found = best_of_n.load(str(tmp_path / "c"), ways="math")
  assert found.answers == [["3", "1/2", "1/2", "1/2", "3", None]]
  assert found.correct.tolist() == [[False, True, True, True, False, False]]
  assert best_of_n.evaluate(found, bootstrap_draws=0)["majority_vote"] == 1
  assert not best_of_n.load(str(tmp_path / "c")).correct.any()  # as text, none is right
  (tmp_path / "c").write_text(json.dumps({"id": 1, "candidates": row}))
  with pytest.raises(EvaluationError, match="candidate 0 has no `correct`, and its question no"):
    best_of_n.load(str(tmp_path / "c"))


def test_an_empty_solution_never_wins_under_a_log(tmp_path):
  rows = [[{"answer": "1", "scores": []}, {"answer": "2", "scores": [0.0, 0.1]}]]
  result = best_of_n.evaluate(best_of_n.load(write(tmp_path / "c", rows), "worst"))
  for name in best_of_n.AGGREGATIONS:
    assert result["curve"][name]["values"][-1] == 0
  assert result["pass@N"] == 0


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ([[{"answer": "1", "scores": [0.5]}, None]], "question 0 candidate 1"),
    ([[{"answer": "1", "scores": []}]], "question 0 candidate 0"),
    ([[{"answer": "1", "scores": [0.5]}], []], "question 1 candidate 0.*missing=worst"),
    (
      [[{"answer": "1", "scores": [1.5]}]],
      r"line 1: .*<= 1.0 - at `\$.candidates\[0\].scores\[0\]`",
    ),
    ([[{"answer": "1", "scores": None}]], "question 0 candidate 0 has no `scores`: name"),
    ([[{"answer": [1], "scores": [1]}]], r"got `array` - at `\$.candidates\[0\].answer`"),
    ([[], []], "holds no candidate"),
  ],
)
def test_what_is_missing_or_odd_is_an_error_that_names_it(tmp_path, rows, message):
  lines = [
    json.dumps({"id": q, "candidates": [c and {"correct": True, **c} for c in row]})
    for q, row in enumerate(rows)
  ]
  (tmp_path / "c").write_text("\n".join(lines))
  with pytest.raises(EvaluationError, match=message):
    best_of_n.load(str(tmp_path / "c"))


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{", "line 2 is not valid JSON"),
    ("[]", "line 2: Expected `object`"),
    ("[" * 100_000, "line 2 is not valid JSON"),
    ('{"id": "\\ud800", "candidates": []}', "line 2 is not valid JSON: half of a surrogate"),
    ('{"id": 1, "candidate": []}', "unknown key `candidate`; .*nearest known key is `candidates`"),
    (
      '{"id": 1, "candidates": [{"score": [1], "correct": true}]}',
      r"unknown key `score` - at `\$.candidates\[0\]`; .* `scores`",
    ),
    ('{"id": 1}', "field `candidates`"),
    ('{"id": 1, "candidates": 3}', r"got `int` - at `\$.candidates`"),
    ('{"id": 1, "candidates": [[]]}', r"got `array` - at `\$.candidates\[0\]`"),
    (
      '{"id": 1, "candidates": [{"scores": [1], "correct": 2}]}',
      r"`\$.candidates\[.*\].correct`",
    ),
    ('{"id": 0, "candidates": []}', "line 2: question 0 is on an earlier line"),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
  good = '{"id": 0, "candidates": [{"scores": [1], "correct": true, "answer": "a"}]}'
  (tmp_path / "c").write_text(good + "\n" + line)
  with pytest.raises(EvaluationError, match=message):
    best_of_n.load(str(tmp_path / "c"), missing="worst")


def test_judgements_and_answers_are_read_as_people_write_them(tmp_path, caplog):
  """One answer judged both ways, numbers as answers and 0 or 1 as booleans, each counted."""
  candidates = [
    {"answer": "a", "correct": True, "scores": [0.2]},
    {"answer": " a", "correct": False, "scores": [0.9]},
    {"answer": 52, "correct": 1, "scores": [0.5]},
    {"answer": 52.0, "correct": 0, "scores": [0.1]},
    {"answer": "52", "correct": 1, "scores": [0.1]},
  ]
  (tmp_path / "c").write_text(json.dumps({"id": 1, "candidates": candidates}))
  found = best_of_n.load(str(tmp_path / "c"))
  assert found.correct.tolist() == [[True, False, True, False, True]]
  assert found.answers == [["a", "a", "52", "52", "52"]]
  report = best_of_n.evaluate(found, bootstrap_draws=0)
  assert report["notes"] == {
    "numbers as answers": 2,
    "0 or 1 as correct": 3,
    "answers judged both right and wrong": 2,
  }
  assert report["curve"]["max"]["values"][-1] == 0 and report["majority_vote"] == 1
  assert "2 answers judged both right and wrong" in caplog.text


def test_a_better_scorer_wins_intervals_hold_and_the_plot_draws(tmp_path):
  rng = np.random.default_rng(0)
  rows = []
  for _ in range(200):
    answers = rng.choice(["1", "2", "3"], 8, p=[0.4, 0.3, 0.3])
    rows.append(
      [
        {
          "answer": str(a),
          "scores": np.clip(rng.normal(0.4 + 0.3 * (a == "1"), 0.1, 3), 0, 1).tolist(),
        }
        for a in answers
      ]
    )
  result = best_of_n.evaluate(best_of_n.load(write(tmp_path / "c", rows)))
  means = result["curve"]["mean"]
  assert means["values"] == sorted(means["values"]) and means["values"][-1] > 0.9
  assert result["pass@N"] >= means["values"][-1] > result["majority_vote"] > result["pass@1"]
  for value, (low, high) in zip(means["values"], means["intervals"], strict=True):
    assert low <= value <= high
  expected = math.sqrt(means["values"][0] * (1 - means["values"][0]) / 200) * 2 * 1.96
  low, high = means["intervals"][0]
  assert 0.8 < (high - low) / expected < 1.2
  assert plots.best_of_n(result).startswith(b"\x89PNG")
