"""Scores of the rollouts of a score table by nine strategies.

A strategy gives every rollout a float64 score on the host: higher is kept first, -inf is never kept.
The score depends on the row alone, so slices of a table can be scored separately. All but `bis` are
baselines of arXiv 2602.04145; no code was released for them, so their exact rules are our reading.
"""

import hashlib
from collections.abc import Callable

import numpy as np

from bis_jax.corpus.score_table import ScoreTable, mix64
from bis_jax.selection import bis

# Arguments: table, BIS's alpha, reliability of a rollout without a positive step, seed.
Strategy = Callable[[ScoreTable, float, float, int], np.ndarray]


def _uniform(table: ScoreTable, seed: int, purpose: str) -> np.ndarray:
  """Returns a draw from [0, 1) per row, a function of seed, purpose, source name and line alone."""
  starts = [
    hashlib.blake2b(f"{seed}/{purpose}/{name}".encode(), digest_size=8).digest()
    for name in table.source_names
  ]
  start = np.frombuffer(b"".join(starts), np.uint64)[table.source]
  step = table.line.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
  return (mix64(start + step) >> np.uint64(11)) * 2.0**-53


def _bis(table: ScoreTable, alpha: float, if_no_positive: float, seed: int) -> np.ndarray:
  return bis.bis_scores(table.n, table.n_pos, table.score_sum, alpha, if_no_positive)


def _full(table: ScoreTable, *_) -> np.ndarray:
  return np.zeros(len(table))


def _random(table: ScoreTable, alpha: float, if_no_positive: float, seed: int) -> np.ndarray:
  return _uniform(table, seed, "random")


def _mixed(table: ScoreTable, alpha: float, if_no_positive: float, seed: int) -> np.ndarray:
  return table.is_mixed + _uniform(table, seed, "mixed")


def _reliability(table: ScoreTable, alpha: float, if_no_positive: float, seed: int) -> np.ndarray:
  return bis.reliability(table.n_pos, table.score_sum, if_no_positive)


def _low_mc(table: ScoreTable, *_) -> np.ndarray:
  """Lowest mean MC score of the positive steps first; rollouts without one are never kept."""
  return np.where(table.n_pos > 0, -bis.reliability(table.n_pos, table.score_sum), -np.inf)


def _average_stepwise(table: ScoreTable, *_) -> np.ndarray:
  """Mean of s (1 - s) over the scored steps: the variance of a continuation's outcome."""
  return table.spread_sum / table.n


def _mixture(table: ScoreTable, *_) -> np.ndarray:
  return bis.mixture(table.n, table.n_pos)


STRATEGIES: dict[str, Strategy] = {
  "bis": _bis,
  "full": _full,
  "random": _random,
  "mixed": _mixed,
  "reliable": _reliability,
  "low_mc": _low_mc,
  "average_stepwise": _average_stepwise,
  "mixture_only": _mixture,
  "reliability_only": _reliability,  # BIS without its mixture term: the order of `reliable`
}
