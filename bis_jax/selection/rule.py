"""Which rollouts are kept: the best of each source, exactly as many as asked, ties in file order.

`select` is the paper's rule on one host. `distributed.py` is the same rule over slices of a table.
"""

import dataclasses

import numpy as np

from bis_jax.corpus.score_table import PAPER_OK, STRICT_OK, ScoreTable
from bis_jax.selection.manifest import KeptSource, Manifest
from bis_jax.selection.strategies import STRATEGIES

_CHUNK = 1 << 20  # rows scored at a time: a strategy's temporaries stay small


@dataclasses.dataclass(frozen=True)
class Rule:
  """What to keep.

  Attributes:
    strategy: a name of STRATEGIES; "full" keeps everything, whatever the fraction.
    fraction: share kept of each source (scope "per_source") or of all rollouts ("global"), (0, 1].
    count: instead of `fraction`: rollouts kept of each source, or of all.
    alpha: BIS smoothing, at least 0.
    none_positive: reliability of a rollout without a positive step, in [0, 1]; 1 in the paper.
    order: "strict" ranks valid rollouts only; "paper" ranks every scorable rollout and drops the
      invalid ones among those kept, as the paper's builder does.
    scope: "per_source" (paper) or "global".
    seed: of the random strategies.

  Raises:
    ValueError: a value outside its range, named with what it may be.
  """

  strategy: str
  fraction: float | None = None
  count: int | None = None
  alpha: float = 0.2
  none_positive: float = 1.0
  order: str = "strict"
  scope: str = "per_source"
  seed: int = 0

  def __post_init__(self):
    if self.strategy not in STRATEGIES:
      names = ", ".join(STRATEGIES)
      raise ValueError(f"unknown strategy {self.strategy!r}: choose one of {names}")
    if (self.fraction is None) == (self.count is None):
      raise ValueError("give a fraction of the rollouts or a count: not both, and not neither")
    if self.fraction is not None and not 0 < self.fraction <= 1:
      raise ValueError(f"fraction is {self.fraction}; it must be in (0, 1], e.g. 0.1 for a tenth")
    if self.count is not None and self.count < 1:
      raise ValueError(f"count is {self.count}; it must be at least 1")
    if not (self.alpha >= 0 and np.isfinite(self.alpha)):
      raise ValueError(f"alpha is {self.alpha}; it must be at least 0 (paper: 0.05 or 0.2)")
    if not 0 <= self.none_positive <= 1:
      raise ValueError(f"none_positive is {self.none_positive}; it must be in [0, 1] (paper: 1)")
    if self.order not in ("strict", "paper"):
      raise ValueError(f"order is {self.order!r}; it must be 'strict' or 'paper'")
    if self.scope not in ("per_source", "global"):
      raise ValueError(f"scope is {self.scope!r}; it must be 'per_source' or 'global'")

  def quota(self, rollouts: int) -> int:
    """Returns how many of `rollouts` are kept; of a fraction max(1, floor(rollouts * fraction)).

    The product is in float64: 0.29 of 100 rollouts is 28.999999999999996 of them, so 28.
    """
    if self.strategy == "full":
      return rollouts
    wanted = self.count if self.fraction is None else max(1, int(rollouts * self.fraction))
    return min(wanted, rollouts)

  def ranked(self, table: ScoreTable) -> np.ndarray:
    """Returns bool[rows]: the rollouts that a fraction counts and that may be kept."""
    return np.ones(len(table), bool) if self.order == "paper" else table.flags & STRICT_OK != 0

  def scores(self, table: ScoreTable) -> np.ndarray:
    """Returns float64[rows], -inf for what is never kept (not ranked, refused by the strategy)."""
    scores, score = np.empty(len(table)), STRATEGIES[self.strategy]
    for start in range(0, len(table), _CHUNK):
      rows = slice(start, start + _CHUNK)
      with np.errstate(invalid="ignore"):  # infinite MC scores, which only `paper` order takes
        scores[rows] = score(table.take(rows), self.alpha, self.none_positive, self.seed)
    scores[np.isnan(scores) | ~self.ranked(table)] = -np.inf
    return scores


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


def kept_rows(table: ScoreTable, rule: Rule) -> np.ndarray:
  """Returns bool[rows] of the rollouts that the rule keeps, before `paper` order drops any."""
  scores, ranked = rule.scores(table), rule.ranked(table)
  spans = table.spans() if rule.scope == "per_source" else [slice(0, len(table))]
  tops = [top(scores[span], rule.quota(np.count_nonzero(ranked[span]))) for span in spans]
  return np.concatenate([np.zeros(0, bool), *tops])


def kept_sources(table: ScoreTable, rule: Rule, kept: np.ndarray) -> tuple[KeptSource, ...]:
  """Returns what was kept of each source, the rows given by `kept` (bool[rows])."""
  ranked = rule.ranked(table)
  written = kept & (table.flags & PAPER_OK != 0) if rule.order == "paper" else kept
  return tuple(
    KeptSource(
      name,
      scorable=int(np.count_nonzero(ranked[span])),
      dropped=int(np.count_nonzero(kept[span]) - np.count_nonzero(written[span])),
      lines=table.line[span][written[span]],
    )
    for name, span in zip(table.source_names, table.spans(), strict=True)
  )


def manifest_of(rule: Rule, table: ScoreTable, checksum: str, sources: tuple[KeptSource, ...]):
  """Returns the manifest of a selection.

  Raises:
    ValueError: no rollout could be ranked.
  """
  if not any(source.scorable for source in sources):
    raise ValueError(
      f"no rollout can be ranked in {rule.order} order: check the annotations and their rejections"
    )
  return Manifest(
    **dataclasses.asdict(rule),
    tau=table.tau,
    unmeasured=table.unmeasured,
    corpus_digest=table.digest,
    table_checksum=checksum,
    sources=sources,
  )


def select(table: ScoreTable, **rule) -> Manifest:
  """Returns the manifest of the rollouts that a rule keeps; `rule` holds the fields of `Rule`.

    select(table, strategy="bis", fraction=0.1, alpha=0.2)

  Raises:
    ValueError: a parameter outside its range, or no rollout to rank.
  """
  rule = Rule(**rule)
  sources = kept_sources(table, rule, kept_rows(table, rule))
  return manifest_of(rule, table, table.checksum(), sources)
