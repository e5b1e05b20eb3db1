"""Which rollouts of a score table are kept: nine strategies and the cut that they share.

A strategy gives every rollout a float64 score, computed on the host: higher is kept first, -inf is
never kept. All but `bis` are baselines of arXiv 2602.04145; no code was released for them, so
their exact rules are our reading.
"""

import hashlib
from collections.abc import Callable

import numpy as np

from bis_jax.corpus.score_table import PAPER_OK, STRICT_OK, ScoreTable, mix64
from bis_jax.selection import bis
from bis_jax.selection.manifest import KeptSource, Manifest

Strategy = Callable[[ScoreTable, float, int], np.ndarray]


def _uniform(table: ScoreTable, seed: int) -> np.ndarray:
  """Returns a draw from [0, 1) per row, a function of seed, source name and line alone."""
  starts = [
    hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    for name in table.source_names
  ]
  start = np.frombuffer(b"".join(starts), np.uint64)[table.source]
  step = table.line.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
  return (mix64(start + step) >> np.uint64(11)) * 2.0**-53


def _bis(table: ScoreTable, alpha: float, seed: int) -> np.ndarray:
  return bis.bis_scores(table.n, table.n_pos, table.score_sum, alpha)


def _full(table: ScoreTable, alpha: float, seed: int) -> np.ndarray:
  return np.zeros(len(table))


def _random(table: ScoreTable, alpha: float, seed: int) -> np.ndarray:
  return _uniform(table, seed)


def _mixed(table: ScoreTable, alpha: float, seed: int) -> np.ndarray:
  """Random among the mixed rollouts, then random among the rest."""
  is_mixed = (table.n_pos > 0) & (table.n_pos < table.n)
  return is_mixed + _uniform(table, seed)


def _reliability(table: ScoreTable, alpha: float, seed: int) -> np.ndarray:
  return bis.reliability(table.n_pos, table.score_sum)


def _low_mc(table: ScoreTable, alpha: float, seed: int) -> np.ndarray:
  """Lowest mean MC score of the positive steps first; rollouts without one are never kept."""
  return np.where(table.n_pos > 0, -bis.reliability(table.n_pos, table.score_sum), -np.inf)


def _average_stepwise(table: ScoreTable, alpha: float, seed: int) -> np.ndarray:
  """Mean over the scored steps of s (1 - s): how undecided the continuations are."""
  return table.spread_sum / table.n


def _mixture(table: ScoreTable, alpha: float, seed: int) -> np.ndarray:
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


def quota(rollouts: int, fraction: float | None, count: int | None) -> int:
  """Returns how many of `rollouts` are kept: max(1, floor(rollouts * fraction)), or `count`."""
  wanted = count if fraction is None else max(1, int(rollouts * fraction))
  return min(wanted, rollouts)


def top(scores: np.ndarray, k: int) -> np.ndarray:
  """Returns bool[rows], True for the k highest scores; ties at the cut go to the first rows.

  Args:
    scores: float64[rows]; rows at -inf are never taken, so fewer than k may be.
    k: how many, at most `rows`.
  """
  k = min(k, np.count_nonzero(scores > -np.inf))
  if k == 0:
    return np.zeros(scores.size, bool)
  cut = np.partition(scores, scores.size - k)[scores.size - k]
  kept = scores > cut
  ties = np.flatnonzero(scores == cut)
  kept[ties[: k - np.count_nonzero(kept)]] = True
  return kept


def check(strategy: str, fraction: float | None, count: int | None, alpha: float, order: str,
          scope: str) -> None:  # fmt: skip
  """Raises ValueError naming the parameter at fault and what it may be."""
  if strategy not in STRATEGIES:
    raise ValueError(f"unknown strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
  if (fraction is None) == (count is None):
    raise ValueError("give either a fraction of the rollouts or a count, not both and not neither")
  if fraction is not None and not 0 < fraction <= 1:
    raise ValueError(f"fraction is {fraction}; it must be in (0, 1], e.g. 0.1 for a tenth")
  if count is not None and count < 1:
    raise ValueError(f"count is {count}; it must be at least 1")
  if not (alpha >= 0 and np.isfinite(alpha)):
    raise ValueError(f"alpha is {alpha}; it must be at least 0 (paper: 0.05 or 0.2)")
  if order not in ("strict", "paper"):
    raise ValueError(f"order is {order!r}; it must be 'strict' or 'paper'")
  if scope not in ("per_source", "global"):
    raise ValueError(f"scope is {scope!r}; it must be 'per_source' or 'global'")


def select(
  table: ScoreTable,
  *,
  strategy: str,
  fraction: float | None = None,
  count: int | None = None,
  alpha: float = 0.2,
  order: str = "strict",
  scope: str = "per_source",
  seed: int = 0,
) -> Manifest:
  """Returns the manifest of the rollouts that a strategy keeps.

  Args:
    table: the corpus.
    strategy: a name of STRATEGIES; "full" keeps everything, whatever the fraction.
    fraction: share kept of each source (scope "per_source") or of all rollouts ("global"), (0, 1].
    count: instead of `fraction`: rollouts kept of each source, or of all.
    alpha: BIS smoothing, at least 0.
    order: "strict" ranks valid rollouts only; "paper" ranks every scorable rollout and drops the
      invalid ones among those kept, as the paper's builder does.
    scope: "per_source" (paper) or "global".
    seed: of the random strategies.

  Raises:
    ValueError: a parameter outside its range, or no rollout to rank.
  """
  check(strategy, fraction, count, alpha, order, scope)
  if strategy == "full":
    fraction, count = 1.0, None
  ranked = np.ones(len(table), bool) if order == "paper" else table.flags & STRICT_OK != 0
  if not ranked.any():
    raise ValueError(
      f"none of {len(table)} rollouts can be ranked in {order} order: check the annotations and "
      "their rejections"
    )
  spans = [table.rows_of(i) for i in range(len(table.source_names))]
  kept = np.zeros(len(table), bool)
  for span in spans if scope == "per_source" else [slice(0, len(table))]:
    rows = np.flatnonzero(ranked[span])
    scores = STRATEGIES[strategy](table.take(span), alpha, seed)[rows]
    scores[np.isnan(scores)] = -np.inf
    kept[span.start + rows[top(scores, quota(rows.size, fraction, count))]] = True
  written = kept & (table.flags & PAPER_OK != 0) if order == "paper" else kept
  sources = tuple(
    KeptSource(
      name,
      scorable=int(np.count_nonzero(ranked[span])),
      dropped=int(np.count_nonzero(kept[span]) - np.count_nonzero(written[span])),
      lines=table.line[span][written[span]],
    )
    for name, span in zip(table.source_names, spans, strict=True)
  )
  return Manifest(
    strategy=strategy,
    fraction=fraction,
    count=count,
    alpha=alpha,
    order=order,
    scope=scope,
    seed=seed,
    tau=table.tau,
    unmeasured=table.unmeasured,
    corpus_digest=table.digest,
    table_checksum=table.checksum(),
    sources=sources,
  )
