"""Strategies: float64 scores of rollouts; higher is kept first, -inf and NaN are never kept.

Scores are made on the host: TPUs have no float64. `bis` is the score of arXiv 2602.04145. The others up
to `reliability_only` are its baselines; no code was released for them, so their exact rules are our
reading. The rest is not of the paper; docs/selection.md says what it is for.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from bis_jax.corpus.score_table import ScoreTable, Statistics, mix64
from bis_jax.errors import UserError, imported
from bis_jax.selection import bis, semdedup

if TYPE_CHECKING:
  from bis_jax.selection.rule import Rule


@dataclasses.dataclass(frozen=True)
class Strategy:
  # (statistics of the rows, table of the rows, rule) -> float64[rows]
  score: Callable[..., np.ndarray]
  of_sums: bool = False  # the score depends on n, n_pos and score_sum alone
  among: str = ""  # "source" or "table": a rollout's score depends on the other rollouts of it


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


def _grouped(s: Statistics, table: ScoreTable, rule: "Rule") -> np.ndarray:
  """The i-th best rollout of a question counts 1 / i of its BIS."""
  if not table.group.any():
    raise UserError(
      "the score table does not say which rollouts have the same question: delete it, or the "
      "prepared corpus that holds it, and make it again"
    )

  def of_source(s: Statistics, table: ScoreTable) -> np.ndarray:
    scores, group = _ranked_bis(s, table, rule), table.group
    # Rollouts of a question follow each other, as a rule, and small integers are sorted fast.
    start = np.flatnonzero(np.append(True, group[1:] != group[:-1]))
    of_run = np.unique(group[start], return_inverse=True)[1]
    number = np.repeat(of_run, np.diff(np.append(start, group.size)))
    return scores / (1 + _places(scores, number.astype(np.min_scalar_type(start.size)))[0])

  return _by_source(of_source, s, table)


def _by_position(s: Statistics, table: ScoreTable, rule: "Rule") -> np.ndarray:
  """The best by BIS of every stratum: the fifth of the steps with the first error, or no error."""

  def of_source(s: Statistics, table: ScoreTable) -> np.ndarray:
    wrong = table.mc_scores() <= rule.tau
    if rule.unmeasured == "ignore":
      wrong &= table.total != 0
    start, lengths = table.starts(), table.steps
    at = np.append(np.flatnonzero(wrong), wrong.size)
    first = at[np.cumsum(wrong)[start] - wrong[start]] - start
    stratum = np.minimum(5 * first // lengths, 5)
    scores = _ranked_bis(s, table, rule)
    ranked = scores > -np.inf
    place, size = _places(scores, (2 * stratum + ranked).astype(np.uint8))
    return np.where(ranked, -(place + 0.5) / size, -np.inf)

  return _by_source(of_source, s, table)


def _by_source(score: Callable[..., np.ndarray], s: Statistics, table: ScoreTable) -> np.ndarray:
  spans = [rows for rows in table.spans() if rows.start < rows.stop]
  return np.concatenate([np.zeros(0), *(score(s.take(rows), table.take(rows)) for rows in spans)])


def _ranked_bis(s: Statistics, table: ScoreTable, rule: "Rule") -> np.ndarray:
  return np.where(rule.ranked(table, s), _bis(s, table, rule), -np.inf)


def _places(score: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns int64[rows], each row's place among those of equal key, best first, and their number."""
  order = np.lexsort((-score, key))  # stable: ties in file order
  start = np.flatnonzero(np.append(score.size > 0, np.diff(key[order]) != 0))
  sizes = np.diff(np.append(start, score.size))
  place, size = np.empty((2, score.size), np.int64)
  place[order] = np.arange(score.size) - np.repeat(start, sizes)
  size[order] = np.repeat(sizes, sizes)
  return place, size


def _posterior(s: Statistics, table: ScoreTable, rule: "Rule") -> np.ndarray:
  """Expected BIS if the continuations were sampled anew: p and R by their Beta-Binomial posterior."""
  # Two terms of each step are one complex number, for half the sums: the chance that it is positive and
  # the variance; the mean of its MC score, 0 if it is not positive, and log(1 - the chance).
  positive, most = table.scores > rule.tau, np.iinfo(table.total.dtype).max
  known = [_terms(positive.astype(float), np.where(positive, table.scores, 0))]
  start, size = np.zeros(most + 1, np.int64), table.scores.size
  for total in np.flatnonzero(np.bincount(table.total, minlength=most)[:most]).tolist():
    counts = total > 0 or rule.unmeasured == "negative"
    known.append(_predicted(total, rule.tau) if counts else np.zeros((2, 1)))
    start[total], size = size, size + total + 1
  place = start[table.total] + table.correct
  place[table.is_unstated] = np.arange(table.scores.size)
  chance, mean = (
    np.add.reduceat(terms[place], table.starts()) for terms in np.concatenate(known, axis=1)
  )
  n, none = np.maximum(s.n, 1), np.exp(mean.imag)  # none: the chance that no step is positive
  mixture = chance.real / n * (1 - chance.real / n) - chance.imag / n**2
  reliability = mean.real / np.where(chance.real > 0, chance.real, 1)
  reliability = (1 - none) * reliability + none * rule.reliability_if_no_positive
  return (mixture + rule.alpha) * reliability


@functools.cache
def _predicted(total: int, tau: float) -> np.ndarray:
  """Returns the terms of a step with K = 0 ... N of N continuations: complex[2, N + 1]."""
  new, old = np.arange(total + 1), np.arange(total + 1)[:, None]
  right, wrong = old + 0.5, total - old + 0.5  # Beta posterior of Jeffreys' prior
  chance = _log_beta(new + right, total - new + wrong) - _log_beta(right, wrong)
  chance = np.exp(chance - _log_beta(new + 1, total - new + 1)) / (total + 1)
  share = new / max(total, 1)
  chance = np.where(share > tau, chance, 0)
  return _terms(np.minimum(chance.sum(1), 1), (chance * share).sum(1))


def _terms(chance: np.ndarray, mean: np.ndarray) -> np.ndarray:
  terms = np.empty((2, chance.size), complex)  # of their parts: infinity times 1j is NaN
  terms.real, terms.imag = (chance, mean), (chance * (1 - chance), np.log1p(-chance))
  return terms


def _log_beta(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  log_gamma = np.vectorize(math.lgamma)  # importing SciPy takes longer than a selection
  return log_gamma(a) + log_gamma(b) - log_gamma(a + b)


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
  "bis_grouped": Strategy(_grouped, among="source"),
  "bis_by_position": Strategy(_by_position, among="source"),
  "bis_posterior": Strategy(_posterior),
  "semdedup": Strategy(semdedup.score, among="table"),
}


def find(name: str) -> Strategy:
  """Returns the strategy of a name, or the user's own, "package.module:function".

  The function takes (counts, N, lengths): correct continuations and all continuations of each
  counted step, rollout after rollout, and the number of steps of each rollout, at least 1; it returns a
  score for each rollout. A step whose continuations are unknown has its MC score as count, and N = 1.
  It is called with blocks of rollouts, and in training on every host.
  """
  if name in STRATEGIES:
    return STRATEGIES[name]
  if ":" not in name:
    names = ", ".join(STRATEGIES)
    raise UserError(
      f"unknown strategy {name!r}: choose one of {names}, or name your own MODULE:FUNCTION"
    )
  own = imported(name)

  def score(s: Statistics, table: ScoreTable, rule: "Rule") -> np.ndarray:
    correct, total, lengths = table.counts(rule.unmeasured)
    scores, lengths = np.full(len(table), -np.inf), lengths[some := lengths > 0]
    found = np.asarray(own(correct, total, lengths), np.float64)
    if found.shape != lengths.shape:
      raise UserError(
        f"strategy {name} returned scores of shape {found.shape} for {lengths.size} rollouts: return "
        "one score per rollout"
      )
    scores[some] = found
    return scores

  return Strategy(score)
