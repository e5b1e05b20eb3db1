"""Best-of-N: how often the candidate that a step reward model picks is right, and its baselines.

Candidates come as JSON lines, one question per line, in the order in which they were sampled:

    {"id": "q7", "candidates": [{"answer": "52", "correct": true, "scores": [0.9, 0.8]}, ...]}

A candidate is missing if it is null, has no step scores, or its line has fewer candidates than the
longest; with `missing="worst"` it loses to every other, does not vote and counts as wrong.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from bis_jax.console import log
from bis_jax.evaluation import json_records
from bis_jax.evaluation.json_records import EvaluationError, Probability
from bis_jax.evaluation.step_evaluation import LEVEL, draw_items, interval

MISSING = ("error", "worst")
WAYS = ("text", "math")  # to compare answers

# Scores are float32 probabilities: those that round to 1 count as the largest number below it, so
# that a solution with many certain steps still outranks one with few.
_SUREST = 1 - 2.0**-24


def _sum_logit(scores: np.ndarray) -> float:
  scores = np.minimum(scores, _SUREST)
  return np.sum(np.log(scores) - np.log1p(-scores))


# A candidate's value from its step scores float64[steps], at least one step; higher is better.
AGGREGATIONS: dict[str, Callable[[np.ndarray], float]] = {
  "min": np.min,
  "last": lambda scores: scores[-1],
  "product": np.prod,
  "mean": np.mean,
  "max": np.max,
  "sum_log": lambda scores: np.sum(np.log(scores)),
  "sum_logit": _sum_logit,
}
# Those in [0, 1], which may be the weight of a vote.
VOTES = ("min", "last", "product", "mean")


class Candidate(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
  scores: list[Probability] | None = None  # absent: not scored yet
  # Of each step, from a model with beliefs; see `beliefs`.
  concentrations: list[Annotated[float, msgspec.Meta(gt=0)]] | None = None
  correct: bool | Literal[0, 1] | None = None  # absent: by the question's answer
  answer: str | bool | int | float | None = None
  steps: Any = None


class Question(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
  id: Any
  candidates: list[Candidate | None]
  answer: str | int | float | None = None  # the right one, for candidates that are not judged
  question: Any = None  # these are read only to score the steps of candidates
  image: Any = None
  images: Any = None


@dataclasses.dataclass(frozen=True)
class Candidates:
  """The candidates of Q questions, N each; a missing one is not correct, and None in the lists."""

  correct: np.ndarray  # bool[Q, N]
  answers: list[list[str | None]]
  scores: list[list[np.ndarray | None]]  # float64[steps] each
  concentrations: list[list[np.ndarray | None]] | None = None  # likewise, if all have them
  notes: dict[str, int] = dataclasses.field(default_factory=dict)  # what was read with a remark


def load(path: str, missing: str = "error", ways: str = "text") -> Candidates:
  return check(path, read(path), missing, ways)


def read(path: str) -> list[Question]:
  """Returns the questions of a JSON lines file, whose layout the module's docstring shows.

  Raises EvaluationError for an invalid line, or an id of an earlier line.
  """
  questions: dict[str, Question] = {}
  for where, question in json_records.read(path, Question):
    if str(question.id) in questions:
      raise EvaluationError(
        f"{where}: question {question.id} is on an earlier line: keep one of them"
      )
    questions[str(question.id)] = question
  return [*questions.values()]


def check(
  path: str, questions: Sequence[Question], missing: str = "error", ways: str = "text"
) -> Candidates:
  """Returns the checked candidates of questions; `ways` is how answers are compared.

  A candidate counts as it is marked, even if its answer is marked otherwise elsewhere. Raises
  EvaluationError for a candidate that is missing, not scored or not judged.
  """
  rows: list[list[Candidate | None]] = []
  texts: list[list[str | None]] = []  # of the answers
  notes = collections.Counter()
  for question in questions:
    row = [c if c and c.scores != [] else None for c in question.candidates]
    own = [_answer_text(c.answer) if c else None for c in row]
    if ways == "math":
      from bis_jax.evaluation import answers  # here, because steps do not need it

      own = answers.merged(own)
    judged = collections.defaultdict(set)
    for k, (candidate, answer) in enumerate(zip(row, own, strict=True)):
      if candidate is None:
        continue
      if candidate.scores is None:
        raise EvaluationError(
          f"{path}: question {question.id} candidate {k} has no `scores`: name a model that "
          "scores its `steps` with --checkpoint"
        )
      if candidate.correct is None:
        candidate.correct = _judged(path, question, k, answer, ways)
      notes["numbers as answers"] += isinstance(candidate.answer, int | float)
      notes["0 or 1 as correct"] += not isinstance(candidate.correct, bool)
      judged[answer].add(bool(candidate.correct))
    notes["answers judged both right and wrong"] += sum(
      answer is not None and len(found) > 1 for answer, found in judged.items()
    )
    rows.append(row)
    texts.append(own)
  notes = {note: count for note, count in notes.items() if count}
  for note, count in notes.items():
    log.warning("%s: %d %s; every candidate keeps its own judgement", path, count, note)
  longest = max(map(len, rows), default=0)
  if not longest:
    raise EvaluationError(f"{path} holds no candidate")
  for row in (*rows, *texts):
    row.extend([None] * (longest - len(row)))
  gaps = [(q, k) for q, row in enumerate(rows) for k, entry in enumerate(row) if entry is None]
  if gaps and missing == "error":
    named = "; ".join(f"question {questions[q].id} candidate {k}" for q, k in gaps[:10])
    raise EvaluationError(
      f"{path}: {len(gaps)} candidates of {len(rows)} questions x {longest} are missing or have no "
      f"steps: {named}. Sample them again, or count them as the worst with --missing=worst"
    )
  return Candidates(
    correct=np.array([[c is not None and bool(c.correct) for c in row] for row in rows]),
    answers=texts,
    scores=[[np.array(c.scores, np.float64) if c else None for c in row] for row in rows],
    concentrations=_concentrations(path, questions, rows),
    notes=notes,
  )


def _concentrations(
  path: str, questions: Sequence[Question], rows: list[list[Candidate | None]]
) -> list[list[np.ndarray | None]] | None:
  """Returns those of all candidates; None if none has any."""
  if not any(c and c.concentrations for row in rows for c in row):
    return None
  for question, row in zip(questions, rows, strict=True):
    for k, c in enumerate(row):
      if c and len(c.concentrations or ()) != len(c.scores or ()):
        raise EvaluationError(
          f"{path}: question {question.id} candidate {k} has {len(c.concentrations or ())} "
          f"`concentrations` for {len(c.scores or ())} `scores`: give one per step, or none at all"
        )
  return [[np.array(c.concentrations, np.float64) if c else None for c in row] for row in rows]


def _judged(path: str, question: Question, k: int, answer: str | None, ways: str) -> bool:
  wanted = _answer_text(question.answer)
  if wanted is None:
    raise EvaluationError(
      f"{path}: question {question.id} candidate {k} has no `correct`, and its question no `answer`"
    )
  if answer is None:
    return False
  if ways == "text":
    return wanted == answer
  from bis_jax.evaluation import answers

  return answers.same(wanted, answer)


def _answer_text(answer: str | float | None) -> str | None:
  if isinstance(answer, float) and answer.is_integer():
    answer = int(answer)
  return None if answer is None else str(answer).strip() or None


def aggregate(scores: Sequence[Sequence[np.ndarray | None]], aggregation: str) -> np.ndarray:
  """Returns float64[Q, N], the value of each candidate, NaN if it is missing."""
  function = AGGREGATIONS[aggregation]
  with np.errstate(divide="ignore"):  # log(0) is minus infinity, which is meant
    return np.array([[np.nan if s is None else function(s) for s in row] for row in scores])


def pick(values: np.ndarray, n: int) -> np.ndarray:
  """Returns int64[Q]: the best of the first n of values[Q, N], the first of equals, -1 if all NaN."""
  first = values[:, :n]
  present = ~np.isnan(first)
  best = np.where(present, first, -np.inf).max(1, keepdims=True)
  return np.where(present.any(1), np.argmax(first == best, axis=1), -1)  # NaN equals nothing


def majority(answers: Sequence[Sequence[str | None]], n: int) -> np.ndarray:
  """Returns int64[Q]: the first candidate with the most frequent answer of the first n, or -1."""
  winners = []
  for row in answers:
    votes = collections.Counter(answer for answer in row[:n] if answer is not None)
    winners.append(row.index(max(votes, key=votes.__getitem__)) if votes else -1)
  return np.array(winners, np.int64)


def weighted_majority(
  answers: Sequence[Sequence[str | None]], values: np.ndarray, n: int
) -> np.ndarray:
  """Returns int64[Q]: the first candidate with the answer of the largest sum of values, or -1."""
  winners = []
  for row, weights in zip(answers, values, strict=True):
    votes: collections.defaultdict[str, float] = collections.defaultdict(float)
    for answer, weight in zip(row[:n], weights[:n], strict=True):
      if answer is not None:
        votes[answer] += weight
    winners.append(row.index(max(votes, key=votes.__getitem__)) if votes else -1)
  return np.array(winners, np.int64)


def evaluate(candidates: Candidates, *, bootstrap_draws: int = 1000, seed: int = 0) -> dict:
  """Returns how often the pick is right over N = 1, 2, 4, ... and all candidates, as JSON values.

  A value at n uses only the first n candidates of each question. `pass@n` is the oracle (any of
  them is right); `mean_correct` is the share of right candidates. Intervals are 95 % percentile
  bootstraps over questions.
  """
  questions, longest = candidates.correct.shape
  sizes = [1 << power for power in range(longest.bit_length()) if 1 << power < longest] + [longest]
  right = {
    "pass@n": [candidates.correct[:, :n].any(1) for n in sizes],
    "majority_vote": [_right(candidates, majority(candidates.answers, n)) for n in sizes],
  }
  for name in AGGREGATIONS:
    values = aggregate(candidates.scores, name)
    right[name] = [_right(candidates, pick(values, n)) for n in sizes]
    if name in VOTES:
      chosen = [weighted_majority(candidates.answers, values, n) for n in sizes]
      right[f"{name}_vote"] = [_right(candidates, one) for one in chosen]
  stopped = None
  if candidates.concentrations:
    from bis_jax.evaluation import beliefs  # here, because few models have them

    both = candidates.scores, candidates.concentrations
    bounds, means = beliefs.lower_bounds(*both), beliefs.weighted_means(*both)
    for name, values in (("lower_bound", bounds), ("weighted_mean", means)):
      right[name] = [_right(candidates, pick(values, n)) for n in sizes]
    stopped = beliefs.stopping(bounds, candidates.correct)
  weights = draw_items(questions, bootstrap_draws, seed) / questions
  curve = {}
  for name, by_size in right.items():
    right_QN = np.stack(by_size, axis=1).astype(np.float64)
    curve[name] = {"values": right_QN.mean(0).tolist()}
    if bootstrap_draws:
      curve[name]["intervals"] = [interval(drawn) for drawn in (weights @ right_QN).T]
  return {
    "questions": questions,
    "candidates": longest,
    "n": sizes,
    "pass@1": curve["pass@n"]["values"][0],
    "pass@N": curve["pass@n"]["values"][-1],
    "majority_vote": curve["majority_vote"]["values"][-1],
    "mean_correct": float(candidates.correct.mean()),
    "notes": candidates.notes,
    "curve": curve,
    **({"adaptive_stopping": stopped} if stopped else {}),
    "bootstrap": {"draws": bootstrap_draws, "seed": seed, "level": LEVEL},
  }


def _right(candidates: Candidates, chosen: np.ndarray) -> np.ndarray:
  # bool[Q]; -1 means no candidate, which counts as wrong.
  return candidates.correct[np.arange(len(chosen)), chosen] & (chosen >= 0)
