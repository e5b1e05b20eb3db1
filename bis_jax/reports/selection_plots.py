"""Figures of a selection; each is the bytes of a PNG file."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, SymLogNorm

from bis_jax.reports import plot_style as style

_NAME = 34  # letters of a source name that a figure shows

# Cells of the plane of mixture and reliability. p (1 - p) = 0 has a column of its own.
MIXTURE_EDGES = np.concatenate(([-0.0125], np.linspace(0.0, 0.25, 21) + 1e-9))
RELIABILITY_EDGES = np.linspace(0.0, 1.0, 21) + 1e-9


def cell_counts(mixture: np.ndarray, reliability: np.ndarray) -> np.ndarray:
  """Returns float64[mixture cells, reliability cells]: rollouts in each cell of the plane."""
  reliability = np.clip(reliability, 2e-9, 1.0)
  return np.histogram2d(mixture, reliability, (MIXTURE_EDGES, RELIABILITY_EDGES))[0]


def sources(rows: Sequence[tuple]) -> bytes:
  """Returns four columns of bars, one bar per source: rollouts, mixed share, mean R and kept share.

  `rows` are (name, summary of the ranked rollouts, summary of the kept ones, ...).
  """
  figure, columns = style.new_panels(4, width=11, height=1.3 + 0.21 * len(rows), sharey=True)
  y = np.arange(len(rows))
  ranked, kept = (np.array([row[i] for row in rows], float).T for i in (1, 2))
  columns[0].barh(y, ranked[0], 0.72, color=style.LIGHT_GREY)
  for axes, before, after in zip(columns[1:3], ranked[1:], kept[1:], strict=False):
    axes.barh(y, 100 * before, 0.72, color=style.LIGHT_GREY, label="all ranked")
    axes.plot(100 * after, y, "o", color=style.BLUE, markersize=4.5, label="kept", clip_on=False)
    axes.set_xlim(0, 100)
  with np.errstate(invalid="ignore"):
    columns[3].barh(y, 100 * kept[0] / ranked[0], 0.72, color=style.BLUE)
  titles = ("rollouts ranked", "mixed rollouts, %", "mean reliability R x 100", "kept, %")
  for axes, title in zip(columns, titles, strict=True):
    style.label_axes(axes, title)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.15g}")
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="y", visible=False)
  columns[0].locator_params(axis="x", nbins=4)
  style.label_lines(columns[0], [_short(row[0]) for row in rows])
  handles = columns[1].get_legend_handles_labels()
  style.add_legend(figure, *handles, loc="outside upper right", ncols=2)
  return style.png_bytes(figure)


def plane(
  everything: np.ndarray, kept: np.ndarray, alpha: float | None, cut: float | None = None
) -> bytes:
  """Returns the rollouts in the plane of mixture and reliability, and the share that is kept.

  `everything` and `kept` are `cell_counts`. With `alpha`, lines of equal BIS are drawn, and a bold one
  at `cut`.
  """
  figure, (left, right) = style.new_panels(2, width=11, height=4.6, sharey=True)
  with np.errstate(invalid="ignore"):
    share = 100 * kept / everything
  counts = np.where(everything > 0, everything, np.nan)
  norm = LogNorm(1, max(2.0, everything.max()))
  _draw_cells(left, counts, "rollouts per cell", cmap="viridis", norm=norm)
  _draw_cells(right, share, "share kept, %", cmap="Blues", vmin=0, vmax=100)
  if alpha is not None:
    _draw_bis_lines(right, alpha, cut)
  left.set_title(f"all ranked rollouts: {everything.sum():,.0f}", fontsize=10, color=style.INK)
  right.set_title(f"kept: {kept.sum():,.0f}", fontsize=10, color=style.INK)
  right.set_ylabel("")
  return style.png_bytes(figure)


def change(panels: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> bytes:
  """Returns where rollouts are added and removed; `panels` are (title, cells before, cells after)."""
  size = {"width": 5.6 * len(panels), "height": 4.6}
  figure, row = style.new_panels(len(panels), **size, sharey=True)
  for axes, (title, before, after) in zip(row, panels, strict=True):
    difference = np.where((before > 0) | (after > 0), after - before, np.nan)
    most = max(1.0, np.nanmax(np.abs(difference), initial=1.0))
    # Logarithmic on both sides: a few cells of pure rollouts hold most of a corpus.
    norm = SymLogNorm(10, vmin=-most, vmax=most)
    label = "rollouts more (+) or fewer (\N{MINUS SIGN})"
    _draw_cells(axes, difference, label, cmap="RdBu", norm=norm)
    axes.set_title(title, fontsize=10, color=style.INK)
  for axes in row[1:]:
    axes.set_ylabel("")
  return style.png_bytes(figure)


def scores(
  everything: np.ndarray, kept: np.ndarray, cuts: np.ndarray, strategy: str, bins: int = 60
) -> bytes:
  """Returns the distribution of the ranked rollouts' scores, and the lowest kept score per source.

  `everything` is float64[rows], finite; `kept` bool[rows]; `cuts` float64[sources].
  """
  figure, axes = style.new_figure(f"score by {strategy}", "rollouts (log scale)", width=7)
  low, high = float(everything.min()), float(everything.max())
  edges = np.linspace(low, high if high > low else low + 1e-6, bins + 1).tolist()
  parts = {"ranked": (everything, style.LIGHT_GREY), "kept": (everything[kept], style.BLUE)}
  for name, (values, colour) in parts.items():
    axes.hist(values, edges, color=colour, label=f"{name}: {values.size:,}")
  axes.set_yscale("log")
  if cuts.size:
    first, middle, last = np.quantile(cuts, (0, 0.5, 1))
    axes.axvspan(first, last, color=style.VERMILION, alpha=0.13, linewidth=0, zorder=0)
    label = f"cut: median {middle:.4g}, {first:.4g} to {last:.4g}"
    axes.axvline(middle, color=style.VERMILION, linewidth=1.6, label=label)
  style.add_legend(axes, **style.ABOVE, ncols=3, fontsize=8.5)
  return style.png_bytes(figure)


def overlap(names: Sequence[str], jaccard: np.ndarray) -> bytes:
  figure, axes = style.new_figure("", "", width=7.4, height=6.2)
  image = axes.imshow(100 * jaccard, cmap="Blues", vmin=0, vmax=100)
  for (row, column), value in np.ndenumerate(jaccard):
    colour = "white" if value > 0.55 else style.INK
    place = {"ha": "center", "va": "center", "fontsize": 8.5}
    axes.text(column, row, f"{100 * value:.0f}", color=colour, **place)
  positions = np.arange(len(names))
  axes.set_xticks(positions, names, rotation=40, ha="right")
  axes.set_yticks(positions, names)
  axes.grid(visible=False)
  axes.spines["bottom"].set_visible(False)
  figure.colorbar(image, ax=axes, label="Jaccard overlap of the kept sets x 100", pad=0.02)
  return style.png_bytes(figure)


def _draw_cells(axes: Axes, cells: np.ndarray, label: str, **options: Any) -> None:
  mesh = axes.pcolormesh(MIXTURE_EDGES, RELIABILITY_EDGES, cells.T, **options)
  style.label_axes(axes, "mixture  p (1 \N{MINUS SIGN} p)", "reliability  R")
  axes.grid(visible=False)
  axes.set_facecolor("#f7f7f5")
  axes.figure.colorbar(mesh, ax=axes, label=label, pad=0.02)


def _draw_bis_lines(axes: Axes, alpha: float, cut: float | None) -> None:
  x, y = np.meshgrid(np.linspace(MIXTURE_EDGES[0], 0.25, 120), np.linspace(0.0, 1.0, 120))
  levels = np.linspace(0.0, 0.25 + alpha, 10)[1:-1]
  bis = (np.maximum(x, 0.0) + alpha) * y
  lines = axes.contour(x, y, bis, levels, colors="#777777", linewidths=0.6, alpha=0.7)
  if cut is not None:
    lines = axes.contour(x, y, bis, [cut], colors=style.VERMILION, linewidths=1.8)
  axes.clabel(lines, fmt="BIS %.3f", fontsize=8)


def _short(name: str) -> str:
  return name if len(name) <= _NAME else name[: _NAME - 1] + "\N{HORIZONTAL ELLIPSIS}"
