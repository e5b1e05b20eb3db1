"""The paper's selection rule on one host: the highest scores of each source, ties in file order.

`distributed.py` applies the same rule to a table that is split over processes.
"""

import dataclasses

import numpy as np

from bis_jax.corpus.score_table import PAPER_OK, PAPER_SKIPS, STRICT_OK, ScoreTable
from bis_jax.errors import UserError
from bis_jax.selection.manifest import KeptSource, Manifest
from bis_jax.selection.strategies import STRATEGIES

_CHUNK = 1 << 20  # rows scored at a time: a strategy's temporaries stay small


@dataclasses.dataclass(frozen=True)
class Rule:
  """Parameters of a selection; raises UserError for a value outside its range."""

  strategy: str  # a name of STRATEGIES; "full" keeps everything, regardless of the fraction
  fraction: float | None = None  # share to keep, in (0, 1]; or:
  count: int | None = None  # number of rollouts to keep
  alpha: float = 0.2  # BIS smoothing
  reliability_if_no_positive: float = 1.0  # in [0, 1]; 1 in the paper
  # "strict" ranks valid rollouts only; "paper" ranks every scorable rollout and then drops the invalid
  # ones, as the paper's builder does.
  order: str = "strict"
  scope: str = "per_source"  # fraction or count of each source (paper), or "global"
  seed: int = 0  # of the random strategies

  def __post_init__(self):
    if self.strategy not in STRATEGIES:
      names = ", ".join(STRATEGIES)
      raise UserError(f"unknown strategy {self.strategy!r}: choose one of {names}")
    if (self.fraction is None) == (self.count is None):
      raise UserError("give a fraction of the rollouts or a count: not both, and not neither")
    if self.fraction is not None and not 0 < self.fraction <= 1:
      raise UserError(f"fraction is {self.fraction}; it must be in (0, 1], e.g. 0.1 for a tenth")
    if self.count is not None and self.count < 1:
      raise UserError(f"count is {self.count}; it must be at least 1")
    if not (self.alpha >= 0 and np.isfinite(self.alpha)):
      raise UserError(f"alpha is {self.alpha}; it must be at least 0 (paper: 0.05 or 0.2)")
    if not 0 <= self.reliability_if_no_positive <= 1:
      raise UserError(
        f"none_positive is {self.reliability_if_no_positive}; it must be in [0, 1] (paper: 1)"
      )
    if self.order not in ("strict", "paper"):
      raise UserError(f"order is {self.order!r}; it must be 'strict' or 'paper'")
    if self.scope not in ("per_source", "global"):
      raise UserError(f"scope is {self.scope!r}; it must be 'per_source' or 'global'")

  def quota(self, rollouts: int) -> int:
    """Returns how many of `rollouts` are kept; for a fraction max(1, floor(rollouts * fraction))."""
    if self.strategy == "full":
      return rollouts
    # The product is in float64: 0.29 of 100 rollouts is 28.999999999999996, so 28.
    quota = self.count or rollouts
    if self.fraction is not None:
      quota = max(1, int(rollouts * self.fraction))
    return min(quota, rollouts)

  def ranked(self, table: ScoreTable) -> np.ndarray:
    """Returns bool[rows]: the rollouts that may be kept; a fraction is a share of them."""
    paper = self.order == "paper"
    return table.flags & PAPER_SKIPS == 0 if paper else table.flags & STRICT_OK != 0

  def scores(self, table: ScoreTable) -> np.ndarray:
    """Returns float64[rows], -inf for rollouts that are never kept."""
    scores, score = np.empty(len(table)), STRATEGIES[self.strategy]
    for start in range(0, len(table), _CHUNK):
      rows = slice(start, start + _CHUNK)
      with np.errstate(invalid="ignore"):  # infinite MC scores, which only `paper` order takes
        scores[rows] = score(
          table.take(rows), self.alpha, self.reliability_if_no_positive, self.seed
        )
    scores[np.isnan(scores) | ~self.ranked(table)] = -np.inf
    return scores


def top(scores: np.ndarray, k: int) -> np.ndarray:
  """Returns bool[rows], True for the k highest scores above -inf; ties go to the first rows."""
  k = min(k, int(np.count_nonzero(scores > -np.inf)))
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
  tops = [top(scores[span], rule.quota(int(ranked[span].sum()))) for span in spans]
  return np.concatenate([np.zeros(0, bool), *tops])


def written_rows(table: ScoreTable, rule: Rule) -> np.ndarray:
  return _valid(table, rule, kept_rows(table, rule))


def _valid(table: ScoreTable, rule: Rule, kept: np.ndarray) -> np.ndarray:
  return kept & (table.flags & PAPER_OK != 0) if rule.order == "paper" else kept


def kept_sources(table: ScoreTable, rule: Rule, kept: np.ndarray) -> tuple[KeptSource, ...]:
  ranked, written = rule.ranked(table), _valid(table, rule, kept)
  return tuple(
    KeptSource(
      name,
      scorable=int(ranked[span].sum()),
      dropped=int((kept[span] & ~written[span]).sum()),
      lines=table.line[span][written[span]],
    )
    for name, span in zip(table.source_names, table.spans(), strict=True)
  )


def manifest_of(
  rule: Rule, table: ScoreTable, checksum: str, sources: tuple[KeptSource, ...]
) -> Manifest:
  if not any(source.scorable for source in sources):
    raise UserError(
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
  """Returns the manifest of a selection, such as select(table, strategy="bis", fraction=0.1).

  `rule` holds the fields of `Rule`. Raises UserError for an invalid one, or no rollout to rank.
  """
  rule = Rule(**rule)
  sources = kept_sources(table, rule, kept_rows(table, rule))
  return manifest_of(rule, table, table.checksum(), sources)
