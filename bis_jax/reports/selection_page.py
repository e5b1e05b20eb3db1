"""The page of a selection: the corpus, what was kept, and what other rules would keep."""

import dataclasses
import itertools

import numpy as np
from etils import epath

from bis_jax.corpus.score_table import ScoreTable
from bis_jax.reports import page, selection_plots
from bis_jax.selection import bis
from bis_jax.selection.rule import Rule, written_rows
from bis_jax.selection.strategies import STRATEGIES

_BIS_LINES = " Lines have equal BIS; the bold one is the median of the sources' cuts."


@dataclasses.dataclass(frozen=True, eq=False)
class _Statistics:
  """Of every row: bool `mixed` (has positive and non-positive steps), float64 p (1 - p) and R."""

  table: ScoreTable
  mixed: np.ndarray
  mixture: np.ndarray
  reliability: np.ndarray

  def cells(self, rows: np.ndarray) -> np.ndarray:
    return selection_plots.cell_counts(self.mixture[rows], self.reliability[rows])

  def summary(self, rows: np.ndarray) -> tuple[int, float, float, float]:
    """Returns (rollouts, share mixed, mean R, mean scored steps) of some rows, NaN for none."""
    count = int(np.count_nonzero(rows))
    if not count:
      return 0, np.nan, np.nan, np.nan
    columns = (self.mixed, self.reliability, self.table.n)
    return (count, *(float(column[rows].mean()) for column in columns))


def write_report(folder: epath.PathLike, table: ScoreTable, rule: Rule) -> None:
  """Writes folder/index.html and the PNG files of its figures.

  The page compares the rule with every other strategy at the same fraction, and with `neighbours`.
  """
  folder = epath.Path(folder)
  statistics = _Statistics(
    table,
    mixed=(table.n_pos > 0) & (table.n_pos < table.n),
    mixture=bis.mixture(table.n, table.n_pos),
    reliability=bis.reliability(table.n_pos, table.score_sum, rule.reliability_if_no_positive),
  )
  kept = {
    name: written_rows(table, dataclasses.replace(rule, strategy=name)) for name in STRATEGIES
  }
  chosen, ranked, scores = kept[rule.strategy], rule.ranked(table), rule.scores(table)
  cuts = _cuts(table, scores, chosen)
  others = {_difference(rule, other): written_rows(table, other) for other in neighbours(rule)}
  page.write(
    folder / "index.html",
    "selection.html",
    figures=_figures(rule, statistics, scores, ranked, kept, others, cuts),
    plots=folder,
    title=_title(rule),
    tiles=_tiles(statistics.summary(ranked), statistics.summary(chosen)),
    changes=[
      f"{difference}: {np.count_nonzero(other & ~chosen):,} rollouts are added, "
      f"{np.count_nonzero(chosen & ~other):,} removed, {np.count_nonzero(other & chosen):,} stay."
      for difference, other in others.items()
    ],
    strategies=_strategy_table(rule, statistics, kept),
    sources=_source_table(statistics, ranked, chosen, cuts),
  )


def neighbours(rule: Rule) -> list[Rule]:
  """Returns the rules that the page compares with.

  For BIS the paper's other alpha and fraction; for other strategies half and twice as many rollouts;
  none for "full", which keeps everything.
  """
  if rule.strategy == "full":
    return []
  if rule.count is not None:
    sizes = [{"count": max(1, rule.count // 2)}, {"count": 2 * rule.count}]
  elif rule.strategy == "bis":
    sizes = [{"fraction": 0.1 if rule.fraction == 0.25 else 0.25}]
  else:
    sizes = [{"fraction": rule.fraction / 2}, {"fraction": min(1.0, 2 * rule.fraction)}]
  if rule.strategy == "bis":
    sizes = [{"alpha": 0.2 if rule.alpha == 0.05 else 0.05}, sizes[-1]]
  return [dataclasses.replace(rule, **size) for size in sizes]


def _difference(rule: Rule, other: Rule) -> str:
  """Returns the parameters that differ, as "alpha 0.2 -> 0.05"."""
  return ", ".join(
    f"{f.name} {getattr(rule, f.name)} \N{RIGHTWARDS ARROW} {getattr(other, f.name)}"
    for f in dataclasses.fields(Rule)
    if getattr(rule, f.name) != getattr(other, f.name)
  )


def _title(rule: Rule) -> str:
  amount = f"fraction {rule.fraction:g}" if rule.count is None else f"count {rule.count:,}"
  alpha = f", alpha {rule.alpha:g}" if rule.strategy == "bis" else ""
  if rule.reliability_if_no_positive != 1:
    alpha += f", R {rule.reliability_if_no_positive:g} without a positive step"
  return f"Selection by {rule.strategy}: {amount}{alpha}, {rule.order} order, {rule.scope}"


def _cuts(table: ScoreTable, scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
  """Returns the lowest kept score of each source, NaN if nothing is kept."""
  return np.array(
    [scores[span][kept[span]].min() if kept[span].any() else np.nan for span in table.spans()]
  )


def _jaccard(kept: list[np.ndarray]) -> np.ndarray:
  """Returns float64[sets, sets]: intersection over union, 1 for two empty sets."""
  overlap = np.eye(len(kept))
  for a, b in itertools.combinations(range(len(kept)), 2):
    union = np.count_nonzero(kept[a] | kept[b])
    overlap[a, b] = np.count_nonzero(kept[a] & kept[b]) / union if union else 1.0
    overlap[b, a] = overlap[a, b]
  return overlap


def _figures(
  rule: Rule,
  statistics: _Statistics,
  scores: np.ndarray,
  ranked: np.ndarray,
  kept: dict[str, np.ndarray],
  others: dict[str, np.ndarray],
  cuts: np.ndarray,
) -> page.Figures:
  chosen = kept[rule.strategy]
  lines = (rule.alpha, float(np.nanmedian(cuts))) if rule.strategy == "bis" else (None, None)
  cells = statistics.cells(chosen)
  figures = {
    "plane": (
      selection_plots.plane(statistics.cells(ranked), cells, *lines),
      "All rollouts by label mixture and reliability of their positive labels: the number per cell, "
      "and the share that is kept." + _BIS_LINES * (rule.strategy == "bis"),
    ),
    "overlap": (
      selection_plots.overlap(list(kept), _jaccard(list(kept.values()))),
      "Overlap of the rollouts that the strategies keep, all at the same fraction.",
    ),
    "sources": (
      _sources_figure(statistics, ranked, chosen),
      "Sources: rollouts, share with both positive and non-positive steps, mean R, share kept.",
    ),
  }
  if rule.strategy != "full":  # which ranks nothing
    finite = np.isfinite(scores)
    figures["scores"] = (
      selection_plots.scores(scores[finite], chosen[finite], cuts[~np.isnan(cuts)], rule.strategy),
      "Scores of all ranked rollouts and of the kept ones. The shade spans the sources' cuts.",
    )
  if others:
    panels = [(title, cells, statistics.cells(other)) for title, other in others.items()]
    figures["change"] = (
      selection_plots.change(panels),
      "Rollouts that are added (blue) and removed (red) when one parameter changes.",
    )
  return figures


def _sources_figure(statistics: _Statistics, ranked: np.ndarray, kept: np.ndarray) -> bytes:
  table = statistics.table
  size = len(table.source_names)

  def by_source(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    count = np.bincount(table.source[rows], minlength=size)
    with np.errstate(invalid="ignore"):
      return np.bincount(table.source[rows], values[rows], size) / count

  return selection_plots.sources(
    table.source_names,
    np.bincount(table.source[ranked], minlength=size),
    (by_source(statistics.mixed, ranked), by_source(statistics.mixed, kept)),
    (by_source(statistics.reliability, ranked), by_source(statistics.reliability, kept)),
    by_source(kept, ranked),
  )


def _tiles(ranked: tuple, kept: tuple) -> list[tuple[str, str]]:
  """Returns (value, what it is), from the summaries of the ranked and of the kept rollouts."""
  return [
    (f"{ranked[0]:,}", "rollouts ranked"),
    (f"{kept[0]:,}", "kept"),
    (f"{kept[1]:.1%}", f"mixed ({ranked[1]:.1%} of all)"),
    (f"{kept[2]:.3f}", f"mean R ({ranked[2]:.3f} of all)"),
    (f"{kept[3]:.2f}", f"steps per rollout ({ranked[3]:.2f} of all)"),
  ]


def _strategy_table(rule: Rule, statistics: _Statistics, kept: dict[str, np.ndarray]) -> page.Table:
  rows = []
  for name, rollouts in kept.items():
    count, mixed, reliability, steps = statistics.summary(rollouts)
    both = np.count_nonzero(rollouts & kept[rule.strategy])
    numbers = (f"{count:,}", f"{100 * mixed:.1f}", f"{reliability:.3f}", f"{steps:.2f}")
    rows.append((name, *numbers, f"{both:,}"))
  headings = ("strategy", "kept", "mixed, %", "mean R", "steps", f"also kept by {rule.strategy}")
  return page.Table(headings, rows)


def _source_table(
  statistics: _Statistics, ranked: np.ndarray, kept: np.ndarray, cuts: np.ndarray
) -> page.Table:
  rows = []
  for i, name in enumerate(statistics.table.source_names):
    here = statistics.table.source == i
    n, mixed, r, _ = statistics.summary(ranked & here)
    k, kept_mixed, kept_r, _ = statistics.summary(kept & here)
    shares = (f"{100 * mixed:.1f}", f"{100 * kept_mixed:.1f}", f"{r:.3f}", f"{kept_r:.3f}")
    rows.append((name, f"{n:,}", f"{k:,}", *shares, f"{cuts[i]:.6g}"))
  headings = ("source", "ranked", "kept", "mixed, %", "of kept", "mean R", "of kept", "lowest kept")
  return page.Table(headings, rows)
