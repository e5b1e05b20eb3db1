"""The paper's selection rule: the highest scores of each source, ties in file order."""

import dataclasses

import numpy as np

from bis_jax.corpus.score_table import PAPER_OK, PAPER_SKIPS, STRICT_OK, ScoreTable, Statistics
from bis_jax.errors import UserError
from bis_jax.selection import cut, strategies
from bis_jax.selection.manifest import KeptSource, Manifest


@dataclasses.dataclass(frozen=True)
class Rule:
  """Parameters of a selection; raises UserError for a value outside its range."""

  strategy: str  # see `strategies.find`; "full" keeps everything, regardless of the fraction
  fraction: float | None = None  # share to keep, in (0, 1]; or:
  count: int | None = None  # number of rollouts to keep
  alpha: float = 0.2  # BIS smoothing
  reliability_if_no_positive: float = 1.0  # in [0, 1]; 1 in the paper
  # "strict" ranks valid rollouts only; "paper" ranks every scorable rollout and then drops the invalid
  # ones, as the paper's builder does.
  order: str = "strict"
  scope: str = "per_source"  # fraction or count of each source (paper), or "global"
  seed: int = 0  # of the random strategies
  tau: float = 0.0  # a step is positive if its MC score is above
  unmeasured: str = "negative"  # or "ignore": steps without continuations do not count

  def __post_init__(self):
    strategies.find(self.strategy)
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
    if not np.isfinite(self.tau):
      raise UserError(f"tau is {self.tau}; it must be a number, e.g. 0")
    if self.unmeasured not in ("negative", "ignore"):
      raise UserError(f"unmeasured is {self.unmeasured!r}; it must be 'negative' or 'ignore'")

  def quota(self, rollouts: int) -> int:
    """Returns how many of `rollouts` are kept; for a fraction max(1, floor(rollouts * fraction))."""
    if self.strategy == "full":
      return rollouts
    # The product is in float64: 0.29 of 100 rollouts is 28.999999999999996, so 28.
    quota = self.count or rollouts
    if self.fraction is not None:
      quota = max(1, int(rollouts * self.fraction))
    return min(quota, rollouts)

  def ranked(self, table: ScoreTable, statistics: Statistics) -> np.ndarray:
    """Returns bool[rows]: the rollouts that may be kept; a fraction is a share of them."""
    paper = self.order == "paper"
    taken = table.flags & PAPER_SKIPS == 0 if paper else table.flags & STRICT_OK != 0
    return taken & (statistics.n > 0)

  def scores(self, table: ScoreTable, statistics: Statistics) -> np.ndarray:
    """Returns float64[rows], -inf for rollouts that are never kept."""
    with np.errstate(invalid="ignore", divide="ignore"):  # infinite scores and n = 0
      scores = strategies.find(self.strategy).score(statistics, table, self)
    return np.where(np.isnan(scores) | ~self.ranked(table, statistics), -np.inf, scores)


def written(flags: np.ndarray, rule: Rule, kept: np.ndarray) -> np.ndarray:
  """Returns `kept`, bool[rows], without those that `paper` order drops after the ranking."""
  return kept & (flags & PAPER_OK != 0) if rule.order == "paper" else kept


def written_rows(table: ScoreTable, rule: Rule) -> np.ndarray:
  """Returns bool[rows], the rollouts that the rule keeps."""
  chosen = [kept for _, kept in cut.Ranking(table, rule).kept()]
  return written(table.flags, rule, np.concatenate([np.zeros(0, bool), *chosen]))


def select(table: ScoreTable, *, devices: bool = False, **parameters) -> Manifest:
  """Returns the manifest of a selection, such as select(table, strategy="bis", fraction=0.1).

  `parameters` are the fields of `Rule`. With `devices`, all devices of all JAX processes share the
  work; each process has the same table and returns the same manifest. Raises UserError for an
  invalid rule, no rollout to rank, or processes whose rules or tables differ.
  """
  rule = Rule(**parameters)
  ranking = cut.Ranking(table, rule, devices=devices)
  together, names = ranking.processes, table.source_names
  cut.check_same(together, repr((rule, names, table.digest, len(table))))
  numbers, lines = np.zeros((len(names), 2), np.int64), [np.zeros(0, np.int32)]
  for rows, chosen in ranking.kept():
    kept = written(table.flags[rows], rule, chosen)
    for column, which in enumerate((chosen, kept)):
      numbers[:, column] += np.bincount(table.source[rows][which], minlength=len(names))
    lines.append(table.line[rows][kept])
  numbers = together.add(numbers)
  lines = np.split(together.concatenate(np.concatenate(lines)), np.cumsum(numbers[:, 1]))
  ranked = together.add(ranking.ranked)
  sources = tuple(
    KeptSource(name, scorable=int(m), dropped=int(of_ranking - written), lines=kept_lines)
    for name, m, (of_ranking, written), kept_lines in zip(
      names, ranked, numbers, lines, strict=False
    )
  )
  if not any(source.scorable for source in sources):
    raise UserError(
      f"no rollout can be ranked in {rule.order} order: check the annotations and their rejections"
    )
  checksum = np.array([ranking.checksum % 2**64], np.uint64).view(np.uint16).astype(np.int64)
  checksum = sum(int(part) << 16 * at for at, part in enumerate(together.add(checksum)))
  return Manifest(
    **dataclasses.asdict(rule),
    corpus_digest=table.digest,
    table_checksum=f"{checksum % 2**64:016x}",
    sources=sources,
  )
