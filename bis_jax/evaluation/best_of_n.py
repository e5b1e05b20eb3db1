"""Best-of-N: how often the candidate a step reward model picks is right, and what it is up against.

Candidates come as JSON lines, one question a line, in the order in which they were sampled:

    {"id": "q7", "candidates": [{"answer": "52", "correct": true, "scores": [0.9, 0.8]}, ...]}

`scores` are the step scores. A candidate is missing when it is null, when it has no steps, or when
its line has fewer candidates than the longest; by default that is an error, and with
`missing="worst"` such a candidate loses to every other, votes for nothing and counts as wrong.

Legend: Q questions, N candidates of a question, D bootstrap draws.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from bis_jax.evaluation.step_evaluation import LEVEL, draw_items

MISSING = ("error", "worst")


# Scores are float32 probabilities: those that round to 1 count as the largest number below it, so
# that a solution with many sure steps still outranks one with few.
_SUREST = 1 - 2.0**-24


def _sum_of_logits(scores: np.ndarray) -> float:
  """Returns the sum of log(p / (1 - p)), minus infinity if any p is 0."""
  scores = np.minimum(scores, _SUREST)
  with np.errstate(divide="ignore"):
    return float(np.sum(np.log(scores) - np.log1p(-scores)))


def _sum_of_logs(scores: np.ndarray) -> float:
  with np.errstate(divide="ignore"):
    return float(np.sum(np.log(scores)))


# One number a solution from its step scores float64[steps], at least one step; high is good.
AGGREGATIONS: dict[str, Callable[[np.ndarray], float]] = {
  "min": lambda scores: float(scores.min()),
  "last": lambda scores: float(scores[-1]),
  "product": lambda scores: float(scores.prod()),
  "mean": lambda scores: float(scores.mean()),
  "max": lambda scores: float(scores.max()),
  "sum_log": _sum_of_logs,
  "sum_logit": _sum_of_logits,
}


@dataclasses.dataclass(frozen=True)
class Candidates:
  """The candidates of Q questions, N each; a missing one has no answer, no scores, is not correct.

  `correct` bool[Q, N]; `answers` and `scores` are lists [Q][N] of str or None, and of
  float64[steps] or None. `ids` name the questions.
  """

  ids: tuple[str, ...]
  correct: np.ndarray
  answers: list[list[str | None]]
  scores: list[list[np.ndarray | None]]


def load(path: str, missing: str = "error") -> Candidates:
  """Returns the candidates of a JSON lines file (module docstring), checked.

  Raises ValueError naming the line and question, and the candidate, for anything out of place: a
  missing candidate unless `missing` is "worst", a score outside [0, 1], the same answer once right
  and once wrong.
  """
  if missing not in MISSING:
    raise ValueError(f"missing is {missing!r}; it must be one of {', '.join(MISSING)}")
  ids, rows = [], []
  for line_number, line in enumerate(pathlib.Path(path).read_bytes().split(b"\n"), start=1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
      candidates = record["candidates"]
      identity = str(record["id"])
      if not isinstance(candidates, list):
        raise TypeError("`candidates` is no list")
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(
        f'{path} line {line_number}: {{"id": ..., "candidates": [...]}} is wanted '
        f"({type(error).__name__}: {error})"
      ) from error
    where = f"{path} line {line_number} (question {identity})"
    ids.append(identity)
    rows.append([_parse(c, f"{where} candidate {k}") for k, c in enumerate(candidates)])
    _check_answers(rows[-1], where)
  longest = max((len(row) for row in rows), default=0)
  if not longest:
    raise ValueError(f"{path} holds no candidate")
  rows = [row + [None] * (longest - len(row)) for row in rows]
  gaps = [(q, k) for q, row in enumerate(rows) for k, entry in enumerate(row) if entry is None]
  if gaps and missing == "error":
    named = "; ".join(f"question {ids[q]} candidate {k}" for q, k in gaps[:10])
    raise ValueError(
      f"{path}: {len(gaps)} candidates of {len(rows)} questions x {longest} are missing or have no "
      f"steps: {named}. Sample them again, or let them count as the worst with missing=worst"
    )
  return Candidates(
    ids=tuple(ids),
    correct=np.array([[entry is not None and entry[1] for entry in row] for row in rows]),
    answers=[[entry[0] if entry else None for entry in row] for row in rows],
    scores=[[entry[2] if entry else None for entry in row] for row in rows],
  )


def aggregate(scores: Sequence[Sequence[np.ndarray | None]], aggregation: str) -> np.ndarray:
  """Returns float64[Q, N]: each candidate's step scores made one number, NaN where missing."""
  function = AGGREGATIONS[aggregation]
  return np.array([[np.nan if s is None else function(s) for s in row] for row in scores])


def pick(values: np.ndarray, n: int) -> np.ndarray:
  """Returns int64[Q]: the best of the first n candidates, the first of equals, -1 if all are NaN.

  `values` float64[Q, N]. A value of minus infinity still beats a missing candidate.
  """
  first = values[:, :n]
  present = ~np.isnan(first)
  best = np.where(present, first, -np.inf).max(1, keepdims=True)
  chosen = np.argmax(first == best, axis=1)  # NaN equals nothing
  return np.where(present.any(1), chosen, -1)


def majority(answers: Sequence[Sequence[str | None]], n: int) -> np.ndarray:
  """Returns int64[Q]: the first candidate with the most frequent answer of the first n.

  Of answers equally frequent, the one given first. Candidates without an answer don't vote; -1 if
  none votes.
  """
  winners = []
  for row in answers:
    votes = {}
    for k, answer in enumerate(row[:n]):
      if answer is not None:
        votes.setdefault(answer, []).append(k)
    winners.append(max(votes.values(), key=len)[0] if votes else -1)
  return np.array(winners, np.int64)


def evaluate(candidates: Candidates, *, bootstrap_draws: int = 1000, seed: int = 0) -> dict:
  """Returns how often the pick is right over N = 1, 2, 4, ... and all candidates, as JSON values.

    {"questions": Q, "candidates": N, "n": [1, 2, 4, ...], "pass@1", "pass@N", "majority_vote",
     "mean_correct", "curve": {"pass@n": {"values": [...], "intervals": [[low, high], ...]},
     "majority_vote": {...}, "min": {...}, ...}, "bootstrap": {"draws", "seed", "level"}}

  Every value at n looks at the first n candidates of each question alone, so at n = 1 all are
  pass@1. `pass@n` is the oracle's: is any of them right? `mean_correct` is the share of right ones
  among all candidates. Intervals are 95 % percentile bootstraps over questions.
  """
  questions, longest = candidates.correct.shape
  sizes = [1 << power for power in range(longest.bit_length()) if 1 << power < longest] + [longest]
  values = {name: aggregate(candidates.scores, name) for name in AGGREGATIONS}
  right = {
    "pass@n": [candidates.correct[:, :n].any(1) for n in sizes],
    "majority_vote": [_right(candidates, majority(candidates.answers, n)) for n in sizes],
    **{name: [_right(candidates, pick(values[name], n)) for n in sizes] for name in values},
  }
  weights = draw_items(questions, bootstrap_draws, seed) / questions
  curve = {}
  for name, by_size in right.items():
    outcome = np.stack(by_size, axis=1).astype(np.float64)
    curve[name] = {"values": outcome.mean(0).tolist()}
    if bootstrap_draws:
      ends = np.quantile(weights @ outcome, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
      curve[name]["intervals"] = ends.T.tolist()
  return {
    "questions": questions,
    "candidates": longest,
    "n": sizes,
    "pass@1": curve["pass@n"]["values"][0],
    "pass@N": curve["pass@n"]["values"][-1],
    "majority_vote": curve["majority_vote"]["values"][-1],
    "mean_correct": float(candidates.correct.mean()),
    "curve": curve,
    "bootstrap": {"draws": bootstrap_draws, "seed": seed, "level": LEVEL},
  }


def _right(candidates: Candidates, chosen: np.ndarray) -> np.ndarray:
  """Returns bool[Q]: whether the chosen candidates are right; -1 is nobody, and wrong."""
  found = candidates.correct[np.arange(len(chosen)), chosen]
  return found & (chosen >= 0)


def _parse(candidate: object, where: str) -> tuple[str | None, bool, np.ndarray] | None:
  """Returns (answer or None, correct, scores), or None for a missing candidate."""
  if candidate is None:
    return None
  if not isinstance(candidate, dict):
    raise ValueError(f"{where}: an object or null is wanted, found {candidate!r:.60}")
  scores, correct, answer = (candidate.get(key) for key in ("scores", "correct", "answer"))
  if not isinstance(scores, list) or not all(
    type(score) in (int, float) and 0 <= score <= 1 for score in scores
  ):
    raise ValueError(f"{where}: `scores` must be a list of probabilities, found {scores!r:.60}")
  if not isinstance(correct, bool):
    raise ValueError(f"{where}: `correct` must be true or false, found {correct!r}")
  if answer is not None and not isinstance(answer, str):
    raise ValueError(f"{where}: `answer` must be a string or null, found {answer!r:.60}")
  if not scores:
    return None
  stripped = (answer or "").strip()
  return stripped or None, correct, np.array(scores, np.float64)


def _check_answers(row: Sequence[tuple | None], where: str) -> None:
  verdicts = {}
  for answer, correct, _ in filter(None, row):
    if answer is not None and verdicts.setdefault(answer, correct) != correct:
      raise ValueError(f"{where}: the answer {answer!r} is marked both correct and not")
