"""The page that shows a selection: what there was, what was kept, and what other rules would keep."""

import dataclasses
import html
import itertools
import pathlib

import numpy as np

from bis_jax.corpus.score_table import PAPER_OK, ScoreTable
from bis_jax.reports import page_style, selection_plots
from bis_jax.selection import bis
from bis_jax.selection.rule import Rule, kept_rows
from bis_jax.selection.strategies import STRATEGIES

_BIS_LINES = " Lines have equal BIS; the strong one is the median of the sources' cuts."


@dataclasses.dataclass(frozen=True, eq=False)
class _Measured:
  """What the page needs of every row.

  Attributes:
    table: the score table.
    ranked: bool[rows].
    mixed: bool[rows], has positive and non-positive steps.
    mixture, reliability: float64[rows].
  """

  table: ScoreTable
  ranked: np.ndarray
  mixed: np.ndarray
  mixture: np.ndarray
  reliability: np.ndarray

  def cells(self, rows: np.ndarray) -> np.ndarray:
    return selection_plots.cell_counts(self.mixture[rows], self.reliability[rows])

  def summary(self, rows: np.ndarray) -> tuple[int, float, float, float]:
    """Returns (rollouts, share mixed, mean R, mean scored steps) of some rows, NaN of none."""
    count = int(np.count_nonzero(rows))
    if not count:
      return 0, np.nan, np.nan, np.nan
    return (
      count,
      float(self.mixed[rows].mean()),
      float(self.reliability[rows].mean()),
      float(self.table.n[rows].mean()),
    )


def write_report(folder: pathlib.Path, table: ScoreTable, rule: Rule) -> None:
  """Writes folder/index.html and the PNG files that it shows.

  Beside the rule itself it shows every other strategy at the same fraction, and what changes with
  another alpha (BIS) or fraction.
  """
  measured = _Measured(
    table,
    ranked=rule.ranked(table),
    mixed=(table.n_pos > 0) & (table.n_pos < table.n),
    mixture=bis.mixture(table.n, table.n_pos),
    reliability=bis.reliability(table.n_pos, table.score_sum, rule.none_positive),
  )
  kept = {name: _written(table, dataclasses.replace(rule, strategy=name)) for name in STRATEGIES}
  chosen = kept[rule.strategy]
  scores = rule.scores(table)
  cuts = _cuts(table, scores, chosen)
  others = [(_difference(rule, other), _written(table, other)) for other in neighbours(rule)]
  pictures = {
    "plane": (
      selection_plots.plane(
        measured.cells(measured.ranked),
        measured.cells(chosen),
        rule.alpha,
        float(np.nanmedian(cuts)) if rule.strategy == "bis" else None,
      ),
      "Every rollout by label mixture and reliability of its positive labels: how many lie in a "
      "cell, and which share of them is kept." + _BIS_LINES * (rule.strategy == "bis"),
    ),
    "scores": (
      _scores_picture(rule, scores, chosen, cuts[~np.isnan(cuts)]),
      "Scores of all ranked rollouts and of the kept ones. The shade spans the sources' cuts.",
    ),
    "overlap": (
      selection_plots.overlap(list(kept), _jaccard(list(kept.values()))),
      "How much of what one strategy keeps another keeps too, all at the same fraction.",
    ),
    "change": (
      selection_plots.change(
        [(title, measured.cells(chosen), measured.cells(o)) for title, o in others]
      )
      if others
      else None,
      "Where rollouts come in (blue) and go out (red) when one parameter changes.",
    ),
    "sources": (
      _sources_picture(measured, chosen),
      "The sources: rollouts, share with both positive and non-positive steps, mean R, share kept.",
    ),
  }
  folder.mkdir(parents=True, exist_ok=True)
  for name, (png, _) in pictures.items():
    if png:
      (folder / f"{name}.png").write_bytes(png)
  page = _page(rule, measured, kept, others, cuts, pictures)
  part = folder / "index.html.part"
  part.write_text(page, encoding="utf-8")
  part.replace(folder / "index.html")


def neighbours(rule: Rule) -> list[Rule]:
  """Returns the rules that the page compares with: for BIS the paper's other alpha and fraction,
  for other strategies half as much and twice as much; none for "full", which keeps everything.
  """
  if rule.strategy == "full":
    return []
  if rule.fraction is None:
    sizes = [{"count": max(1, rule.count // 2)}, {"count": 2 * rule.count}]
  elif rule.strategy == "bis":
    sizes = [{"fraction": 0.1 if rule.fraction == 0.25 else 0.25}]
  else:
    sizes = [{"fraction": rule.fraction / 2}, {"fraction": min(1.0, 2 * rule.fraction)}]
  if rule.strategy == "bis":
    sizes = [{"alpha": 0.2 if rule.alpha == 0.05 else 0.05}, sizes[-1]]
  return [dataclasses.replace(rule, **size) for size in sizes]


def _written(table: ScoreTable, rule: Rule) -> np.ndarray:
  """Returns bool[rows] of the rollouts that end up in the subset."""
  kept = kept_rows(table, rule)
  return kept & (table.flags & PAPER_OK != 0) if rule.order == "paper" else kept


def _difference(rule: Rule, other: Rule) -> str:
  """Returns in words which parameter differs, as "alpha 0.2 -> 0.05"."""
  return ", ".join(
    f"{f.name} {getattr(rule, f.name)} \N{RIGHTWARDS ARROW} {getattr(other, f.name)}"
    for f in dataclasses.fields(Rule)
    if getattr(rule, f.name) != getattr(other, f.name)
  )


def _cuts(table: ScoreTable, scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
  """Returns the lowest kept score of each source, NaN where nothing is kept."""
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


def _scores_picture(
  rule: Rule, scores: np.ndarray, kept: np.ndarray, cuts: np.ndarray
) -> bytes | None:
  """Returns the distribution of scores; None for "full", which ranks nothing."""
  if rule.strategy == "full":
    return None
  finite = np.isfinite(scores)
  return selection_plots.scores(scores[finite], kept[finite], cuts, rule.strategy)


def _sources_picture(measured: _Measured, kept: np.ndarray) -> bytes:
  ranked, table = measured.ranked, measured.table

  def by_source(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    size = len(table.source_names)
    count = np.bincount(table.source[rows], minlength=size)
    with np.errstate(invalid="ignore"):
      return np.bincount(table.source[rows], values[rows], size) / count

  return selection_plots.sources(
    table.source_names,
    np.bincount(table.source[ranked], minlength=len(table.source_names)),
    (by_source(measured.mixed, ranked), by_source(measured.mixed, kept)),
    (by_source(measured.reliability, ranked), by_source(measured.reliability, kept)),
    by_source(kept, ranked),
  )


def _page(rule, measured, kept, others, cuts, pictures) -> str:
  chosen = kept[rule.strategy]
  amount = f"fraction {rule.fraction:g}" if rule.count is None else f"count {rule.count:,}"
  alpha = f", alpha {rule.alpha:g}" if rule.strategy == "bis" else ""
  if rule.none_positive != 1:
    alpha += f", R {rule.none_positive:g} without a positive step"
  title = f"Selection by {rule.strategy}: {amount}{alpha}, {rule.order} order, {rule.scope}"
  shown = {name: page_style.figure(*picture) for name, picture in pictures.items() if picture[0]}
  middle = "".join(shown[name] for name in ("scores", "overlap") if name in shown)
  changes = "".join(
    f"<p>{html.escape(words)}: {np.count_nonzero(other & ~chosen):,} rollouts come in, "
    f"{np.count_nonzero(chosen & ~other):,} go out, {np.count_nonzero(other & chosen):,} stay.</p>"
    for words, other in others
  )
  return page_style.document(
    title,
    f"<h1>{html.escape(title)}</h1>{_tiles(measured, chosen)}"
    f'<h2>Figures</h2><div class="figures"><div style="grid-column: 1 / -1">{shown["plane"]}</div>'
    f"{middle}</div>"
    + (f"<h2>What changes</h2>{changes}{shown['change']}" if others else "")
    + f"<h2>Strategies</h2>{_strategy_table(rule, measured, kept)}"
    f"<h2>Sources</h2>{shown['sources']}{_source_table(measured, chosen, cuts)}",
  )


def _tiles(measured: _Measured, chosen: np.ndarray) -> str:
  before, after = measured.summary(measured.ranked), measured.summary(chosen)
  tiles = (
    ("rollouts ranked", f"{before[0]:,}"),
    ("kept", f"{after[0]:,}"),
    (f"mixed ({before[1]:.1%} of all)", f"{after[1]:.1%}"),
    (f"mean R ({before[2]:.3f} of all)", f"{after[2]:.3f}"),
    (f"steps a rollout ({before[3]:.2f} of all)", f"{after[3]:.2f}"),
  )
  cells = "".join(f'<div class="tile"><b>{value}</b>{name}</div>' for name, value in tiles)
  return f'<div class="tiles">{cells}</div>'


def _strategy_table(rule: Rule, measured: _Measured, kept: dict[str, np.ndarray]) -> str:
  rows = []
  for name, chosen in kept.items():
    count, mixed, reliability, steps = measured.summary(chosen)
    both = np.count_nonzero(chosen & kept[rule.strategy])
    rows.append(
      f"<tr><td>{name}</td><td>{count:,}</td><td>{100 * mixed:.1f}</td><td>{reliability:.3f}</td>"
      f"<td>{steps:.2f}</td><td>{both:,}</td></tr>"
    )
  headings = ("strategy", "kept", "mixed, %", "mean R", "steps", f"also kept by {rule.strategy}")
  return page_style.table(headings, rows)


def _source_table(measured: _Measured, chosen: np.ndarray, cuts: np.ndarray) -> str:
  rows = []
  for name, span, cut in zip(
    measured.table.source_names, measured.table.spans(), cuts.tolist(), strict=True
  ):
    masks = [np.zeros(len(measured.table), bool) for _ in range(2)]
    for mask, of in zip(masks, (measured.ranked, chosen), strict=True):
      mask[span] = of[span]
    (n, mixed, r, _), (k, kept_mixed, kept_r, _) = map(measured.summary, masks)
    rows.append(
      f"<tr><td>{html.escape(name)}</td><td>{n:,}</td><td>{k:,}</td><td>{100 * mixed:.1f}</td>"
      f"<td>{100 * kept_mixed:.1f}</td><td>{r:.3f}</td><td>{kept_r:.3f}</td><td>{cut:.6g}</td></tr>"
    )
  headings = ("source", "ranked", "kept", "mixed, %", "of kept", "mean R", "of kept", "lowest kept")
  return page_style.table(headings, rows)
