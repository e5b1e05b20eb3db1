"""The page of a selection: the corpus, what was kept, and what other rules would keep."""

import base64
import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from bis_jax.corpus.score_table import ScoreTable
from bis_jax.errors import UserError
from bis_jax.reports import page, selection_plots
from bis_jax.selection import bis
from bis_jax.selection.rule import Rule, written_rows
from bis_jax.selection.strategies import STRATEGIES

_TAUS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # that "Other choices" offers
_UNIT = 256  # to whose fractions sums of MC scores are rounded there, if they are no counts


class _Summary(NamedTuple):
  """Number of some rollouts, share of mixed ones, mean R and mean scored steps; NaN for none."""

  rollouts: int
  mixed: float
  reliability: float
  steps: float


@dataclasses.dataclass(frozen=True, eq=False)
class _Statistics:
  """Of every row: bool `mixed` (has positive and non-positive steps), float64 p (1 - p) and R."""

  n: np.ndarray
  mixed: np.ndarray
  mixture: np.ndarray
  reliability: np.ndarray

  def cells(self, rows: np.ndarray) -> np.ndarray:
    return selection_plots.cell_counts(self.mixture[rows], self.reliability[rows])

  def summary(self, rows: np.ndarray) -> _Summary:
    count = int(np.count_nonzero(rows))
    if not count:
      return _Summary(0, np.nan, np.nan, np.nan)
    columns = (self.mixed, self.reliability, self.n)
    return _Summary(count, *(float(column[rows].mean()) for column in columns))


def write_report(folder: epath.PathLike, table: ScoreTable, rule: Rule) -> None:
  """Writes folder/index.html and the PNG files of its figures.

  The page compares the rule with every other strategy at the same fraction, and with `neighbours`.
  """
  s = table.statistics(rule.tau, rule.unmeasured)
  mixture = bis.mixture(s.n, s.n_pos)
  reliability = bis.reliability(s.n_pos, s.score_sum, rule.reliability_if_no_positive)
  statistics = _Statistics(s.n, s.is_mixed, mixture, reliability)
  kept = {}
  for name in dict.fromkeys([*STRATEGIES, rule.strategy]):
    with contextlib.suppress(UserError):  # tables without groups or embeddings
      kept[name] = written_rows(table, dataclasses.replace(rule, strategy=name))
  others = {_difference(rule, other): written_rows(table, other) for other in neighbours(rule)}
  chosen, ranked, scores = kept[rule.strategy], rule.ranked(table, s), rule.scores(table, s)
  sources = []
  for name, span in zip(table.source_names, table.spans(), strict=True):
    here = np.zeros(len(table), bool)
    here[span] = True
    cut = scores[here & chosen].min(initial=np.inf)
    summaries = statistics.summary(here & ranked), statistics.summary(here & chosen)
    sources.append((name, *summaries, cut if np.isfinite(cut) else np.nan))
  cells = statistics.cells(chosen)
  changes = [(title, cells, statistics.cells(other)) for title, other in others.items()]
  cuts = np.array([cut for *_, cut in sources if not np.isnan(cut)])
  lines = (rule.alpha, float(np.median(cuts))) if rule.strategy == "bis" else (None, None)
  figures = {
    "plane": selection_plots.plane(statistics.cells(ranked), cells, *lines),
    "overlap": selection_plots.overlap(list(kept), _jaccard(list(kept.values()))),
    "sources": selection_plots.sources(sources),
  }
  if rule.strategy != "full":  # which ranks nothing and has no neighbours
    finite = np.isfinite(scores)
    of_ranked = scores[finite], chosen[finite]
    figures["scores"] = selection_plots.scores(*of_ranked, cuts, rule.strategy)
    figures["change"] = selection_plots.change(changes)
  fraction = rule.fraction or np.count_nonzero(chosen) / max(1, np.count_nonzero(ranked))
  page.write(
    epath.Path(folder) / "index.html",
    "selection.html",
    hard_labels=bool(ranked.any() and (reliability[ranked] == 1).all()),
    figures=figures,
    plots=folder,
    title=_title(rule),
    rule=rule,
    choices=_choices(table, rule) | {"fraction": fraction},
    ranked=statistics.summary(ranked),
    kept=statistics.summary(chosen),
    changes=[(title, *_changes(chosen, other)) for title, other in others.items()],
    strategies=[
      (name, statistics.summary(rows), np.count_nonzero(rows & chosen))
      for name, rows in kept.items()
    ],
    sources=sources,
  )


def _choices(table: ScoreTable, rule: Rule) -> dict[str, Any]:
  """Returns the histograms behind "Other choices": rollouts by (n, n_pos, sum), for some tau."""
  unit = table.unit or _UNIT
  taus = [rule.tau] if table.earlier else sorted({rule.tau, 0.0, *_TAUS})
  histograms = []
  for tau in taus:
    s = table.statistics(tau, rule.unmeasured)
    ranked = rule.ranked(table, s)
    group = table.source if rule.scope == "per_source" else np.zeros(len(table), np.int16)
    total = np.rint(np.nan_to_num(np.clip(s.score_sum, 0, s.n)) * unit)
    columns = [column[ranked].astype(np.uint32) for column in (group, s.n, s.n_pos, total)]
    order = np.lexsort(columns[::-1])
    columns = [column[order] for column in columns]
    new = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    starts = np.flatnonzero(np.append(np.ones(min(1, order.size), bool), new))
    columns = [column[starts] for column in columns] + [np.diff(np.append(starts, order.size))]
    names = ("group", "n", "positive", "sum", "count")
    histograms.append(dict(zip(names, map(_packed, columns), strict=True)))
  names = [f"{tau:g}" for tau in taus]
  data = {"unit": unit, "none_positive": rule.reliability_if_no_positive, "taus": histograms}
  return {"data": data, "names": names, "chosen": taus.index(rule.tau), "rounded": not table.unit}


def _packed(column: np.ndarray) -> tuple[str, str]:
  """Returns (type, base64) of unsigned integers, as narrow as they fit."""
  kind = next(kind for kind in ("u1", "u2", "u4") if column.max(initial=0) <= np.iinfo(kind).max)
  return kind, base64.b64encode(column.astype(f"<{kind}").tobytes()).decode()


def neighbours(rule: Rule) -> list[Rule]:
  # For BIS the paper's other alpha and fraction; for other strategies half and twice as many
  # rollouts; none for "full", which keeps everything.
  change = functools.partial(dataclasses.replace, rule)
  if rule.strategy == "full":
    return []
  if rule.fraction is None:
    count = rule.count or 1
    rules = [change(count=max(1, count // 2)), change(count=2 * count)]
  elif rule.strategy == "bis":
    rules = [change(fraction=0.1 if rule.fraction == 0.25 else 0.25)]
  else:
    rules = [change(fraction=rule.fraction / 2), change(fraction=min(1.0, 2 * rule.fraction))]
  if rule.strategy == "bis":
    rules = [change(alpha=0.2 if rule.alpha == 0.05 else 0.05), rules[-1]]
  return rules


def _difference(rule: Rule, other: Rule) -> str:
  """Returns the parameters that differ, as "alpha 0.2 -> 0.05"."""
  new = dataclasses.asdict(other)
  return ", ".join(
    f"{name} {value} \N{RIGHTWARDS ARROW} {new[name]}"
    for name, value in dataclasses.asdict(rule).items()
    if value != new[name]
  )


def _changes(before: np.ndarray, after: np.ndarray) -> list[int]:
  return [int(rows.sum()) for rows in (after & ~before, before & ~after, before & after)]


def _title(rule: Rule) -> str:
  amount = f"fraction {rule.fraction:g}" if rule.count is None else f"count {rule.count:,}"
  alpha = f", alpha {rule.alpha:g}" if rule.strategy == "bis" else ""
  if rule.reliability_if_no_positive != 1:
    alpha += f", R {rule.reliability_if_no_positive:g} without a positive step"
  return f"Selection by {rule.strategy}: {amount}{alpha}, {rule.order} order, {rule.scope}"


def _jaccard(kept: list[np.ndarray]) -> np.ndarray:
  """Returns float64[sets, sets]: intersection over union, 1 for two empty sets."""
  masks = np.array(kept, float)
  both = masks @ masks.T
  union = both.diagonal()[:, None] + both.diagonal() - both
  return np.divide(both, union, out=np.ones_like(both), where=union > 0)
