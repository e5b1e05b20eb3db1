"""Strategies: float64 scores of rollouts; higher is kept first, -inf and NaN are never kept.

Scores are made on the host: TPUs have no float64. All but `bis` and those under "Beyond the paper" are
baselines of arXiv 2602.04145; no code was released for them, so their exact rules are our reading.
"""

import dataclasses
import hashlib
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from bis_jax.corpus.score_table import ScoreTable, Statistics, mix64
from bis_jax.errors import UserError
from bis_jax.selection import bis

if TYPE_CHECKING:
  from bis_jax.selection.rule import Rule


@dataclasses.dataclass(frozen=True)
class Strategy:
  # (statistics of the rows, table of the rows, rule) -> float64[rows]
  score: Callable[..., np.ndarray]
  of_sums: bool = False  # the score depends on n, n_pos and score_sum alone
  of_table: bool = False  # the score of a rollout depends on the other rollouts of the table


def _uniform(table: ScoreTable, seed: int, purpose: str) -> np.ndarray:
  """Returns a draw from [0, 1) per row, a function of seed, purpose, source name and line alone."""
  starts = [
    hashlib.blake2b(f"{seed}/{purpose}/{name}".encode(), digest_size=8).digest()
    for name in table.source_names
  ]
  start = np.frombuffer(b"".join(starts), np.uint64)[table.source]
  step = table.line.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
  return (mix64(start + step) >> np.uint64(11)) * 2.0**-53


def _bis(s: Statistics, table: ScoreTable, rule: "Rule") -> np.ndarray:
  return bis.bis_scores(s.n, s.n_pos, s.score_sum, rule.alpha, rule.reliability_if_no_positive)


def _full(s: Statistics, table: ScoreTable, rule: "Rule") -> np.ndarray:
  return np.zeros(s.n.size)


def _random(s: Statistics, table: ScoreTable, rule: "Rule") -> np.ndarray:
  return _uniform(table, rule.seed, "random")


def _mixed(s: Statistics, table: ScoreTable, rule: "Rule") -> np.ndarray:
  return s.is_mixed + _uniform(table, rule.seed, "mixed")


def _reliability(s: Statistics, table: ScoreTable, rule: "Rule") -> np.ndarray:
  return bis.reliability(s.n_pos, s.score_sum, rule.reliability_if_no_positive)


def _low_mc(s: Statistics, table: ScoreTable, rule: "Rule") -> np.ndarray:
  """Lowest mean MC score of the positive steps first; rollouts without one are never kept."""
  return np.where(s.n_pos > 0, -bis.reliability(s.n_pos, s.score_sum), -np.inf)


def _average_stepwise(s: Statistics, table: ScoreTable, rule: "Rule") -> np.ndarray:
  """Mean of s (1 - s) over the scored steps: the variance of a continuation's outcome."""
  return s.spread_sum / np.maximum(s.n, 1)


def _mixture(s: Statistics, table: ScoreTable, rule: "Rule") -> np.ndarray:
  return bis.mixture(s.n, s.n_pos)


STRATEGIES: dict[str, Strategy] = {
  "bis": Strategy(_bis, of_sums=True),
  "full": Strategy(_full, of_sums=True),
  "random": Strategy(_random),
  "mixed": Strategy(_mixed),
  "reliable": Strategy(_reliability, of_sums=True),
  "low_mc": Strategy(_low_mc, of_sums=True),
  "average_stepwise": Strategy(_average_stepwise),
  "mixture_only": Strategy(_mixture, of_sums=True),
  # BIS without its mixture term: the order of `reliable`
  "reliability_only": Strategy(_reliability, of_sums=True),
}


def find(name: str) -> Strategy:
  """Returns the strategy of a name, or the user's own, "package.module:function".

  The function takes (counts, N, lengths): correct continuations and all continuations of each
  counted step, rollout after rollout, and the number of steps of each rollout; it returns a score
  for each rollout. A step whose continuations are unknown has its MC score as count, and N = 1.
  """
  if name in STRATEGIES:
    return STRATEGIES[name]
  module, colon, function = name.partition(":")
  if not colon:
    names = ", ".join(STRATEGIES)
    raise UserError(
      f"unknown strategy {name!r}: choose one of {names}, or name your own MODULE:FUNCTION"
    )
  try:
    own = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    raise UserError(
      f"no strategy {name!r} ({error}): name an importable MODULE:FUNCTION"
    ) from error

  def score(s: Statistics, table: ScoreTable, rule: "Rule") -> np.ndarray:
    scores = np.asarray(own(*table.counts(rule.unmeasured)), np.float64)
    if scores.shape != s.n.shape:
      raise UserError(
        f"strategy {name} returned scores of shape {scores.shape} for {s.n.size} rollouts: return one "
        "score per rollout"
      )
    return scores

  return Strategy(score)
