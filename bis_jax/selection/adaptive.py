"""Which rollouts can no longer be kept while the continuations of their steps are being sampled."""

import dataclasses

import numpy as np

from bis_jax.corpus.score_table import ScoreTable
from bis_jax.errors import UserError
from bis_jax.selection.bis import bis_scores
from bis_jax.selection.rule import Rule


@dataclasses.dataclass(frozen=True, eq=False)
class Standing:
  """Of each row, the range of its BIS in the end, and whether it can still be kept."""

  low: np.ndarray  # float64[rows]
  high: np.ndarray  # float64[rows]
  open: np.ndarray  # bool[rows], False: not kept, whatever the other continuations are
  left: np.ndarray  # int64[rows], continuations not sampled yet


def standing(table: ScoreTable, rule: Rule, continuations: int) -> Standing:
  """Returns where every rollout stands if each step gets `continuations` in the end.

  A step of 0 of 0 is one that is still to be sampled. Raises UserError for another strategy than
  `bis`, or steps whose counts are unknown or more than `continuations`.
  """
  if rule.strategy != "bis" or rule.unmeasured != "negative":
    raise UserError("--adaptive needs --strategy=bis and --unmeasured=negative")
  if table.scores.size or table.total.max(initial=0) > continuations:
    raise UserError(
      f"--adaptive={continuations} needs num_mc_correct and num_mc_total of every step, at most "
      f"{continuations}: give the number that every step gets in the end, and the counts"
    )
  rows = *table.chunks(), slice(0, 0)  # so that there is a part
  parts = [_bounds(table.take(part), rule, continuations) for part in rows]
  low, high, left = map(np.concatenate, zip(*parts, strict=True))
  ranked, can_be_kept = rule.ranked(table, table.statistics(rule.tau)), np.zeros(len(table), bool)
  for rows in table.spans() if rule.scope == "per_source" else [slice(0, len(table))]:
    at = rows.start + np.flatnonzero(ranked[rows])
    can_be_kept[at] = _can_be_kept(low[at], high[at], rule.quota(at.size))
  return Standing(low, high, can_be_kept, left)


def _can_be_kept(low: np.ndarray, high: np.ndarray, quota: int) -> np.ndarray:
  """Returns False for rollouts behind as many others, of no lower score and earlier if it ties."""
  if not quota:
    return np.zeros(low.size, bool)
  cut = np.partition(low, low.size - quota)[low.size - quota]
  tied = low == cut
  certain = np.count_nonzero(low > cut) + np.cumsum(tied) - tied
  return (high > cut) | ((high == cut) & (certain < quota))


def _bounds(table: ScoreTable, rule: Rule, continuations: int) -> tuple[np.ndarray, ...]:
  """Returns the least and the highest score that a few rollouts can have, and continuations left."""
  length, most = table.steps.astype(np.int64), int(table.steps.max(initial=0))
  held = np.arange(most) < length[:, None]
  least, total = np.zeros((2, *held.shape), np.int64)
  least[held], total[held] = table.correct, table.total
  highest = np.where(held, least + continuations - total, 0)
  # A step is positive if more than `threshold` continuations are correct; some may still become it.
  threshold = np.count_nonzero(np.arange(continuations + 1) / continuations <= rule.tau) - 1
  surely = held & (least > threshold)
  perhaps = held & ~surely & (highest > threshold)
  extra = -np.sort(-np.where(perhaps, highest, 0), axis=1)
  # Columns: the number of those that become positive; the sums are lowest and highest for it.
  more = np.arange(most + 1)
  possible = more <= perhaps.sum(1)[:, None]
  n_pos = surely.sum(1)[:, None] + more
  low = np.where(surely, least, 0).sum(1)[:, None] + more * (threshold + 1)
  high = np.where(surely, highest, 0).sum(1)[:, None] + np.cumsum(
    np.pad(extra, ((0, 0), (1, 0))), 1
  )
  margin = 0 if continuations & (continuations - 1) == 0 else 1e-9  # sums of other fractions round
  low, high = (
    bis_scores(
      length[:, None], n_pos, sums / continuations, rule.alpha, rule.reliability_if_no_positive
    )
    for sums in (low, high)
  )
  low, high = np.where(possible, low, np.inf).min(1), np.where(possible, high, -np.inf).max(1)
  return low * (1 - margin), high * (1 + margin), np.where(held, continuations - total, 0).sum(1)
