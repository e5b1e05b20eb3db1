"""Pictures of a selection, drawn with matplotlib: each function returns the bytes of a PNG file."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, SymLogNorm
from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#c4c4c4"
_INK, _QUIET, _GRID = "#222222", "#6b6b6b", "#e6e6e6"
_DPI = 150
_NAME = 34  # letters of a source name that a picture shows

# Cells of the plane of mixture against reliability. p (1 - p) = 0 has a column of its own.
MIXTURE_EDGES = np.concatenate(([-0.0125], np.linspace(0.0, 0.25, 21) + 1e-9))
RELIABILITY_EDGES = np.linspace(0.0, 1.0, 21) + 1e-9


def cell_counts(mixture: np.ndarray, reliability: np.ndarray) -> np.ndarray:
  """Returns float64[mixture cells, reliability cells]: rollouts in each cell of the plane."""
  reliability = np.clip(reliability, 2e-9, 1.0)
  return np.histogram2d(mixture, reliability, (MIXTURE_EDGES, RELIABILITY_EDGES))[0]


def sources(
  names: Sequence[str],
  rollouts: np.ndarray,
  mixed: tuple[np.ndarray, np.ndarray],
  reliability: tuple[np.ndarray, np.ndarray],
  kept_share: np.ndarray,
) -> bytes:
  """Returns four columns of bars, a line a source: rollouts, mixed share, mean R and kept share.

  Args:
    names: of the sources.
    rollouts: int[sources], how many were ranked.
    mixed: float[sources] twice, share of mixed rollouts among the ranked and among the kept.
    reliability: float[sources] twice, mean R likewise.
    kept_share: float[sources].
  """
  figure = Figure(figsize=(11, 1.3 + 0.21 * len(names)), dpi=_DPI, layout="constrained")
  columns = figure.subplots(1, 4, sharey=True)
  y = np.arange(len(names))
  columns[0].barh(y, rollouts, 0.72, color=_GREY)
  for axes, (before, after) in zip(columns[1:3], (mixed, reliability), strict=True):
    axes.barh(y, 100 * before, 0.72, color=_GREY, label="all ranked")
    axes.plot(100 * after, y, "o", color=_BLUE, markersize=4.5, label="kept", clip_on=False)
  columns[3].barh(y, 100 * kept_share, 0.72, color=_BLUE)
  titles = ("rollouts ranked", "mixed rollouts, %", "mean reliability R x 100", "kept, %")
  for axes, title in zip(columns, titles, strict=True):
    _style(axes, title, "")
    axes.grid(axis="y", visible=False)
    axes.xaxis.get_major_formatter().set_scientific(False)
    axes.tick_params(axis="x", labelsize=8)
  columns[1].set_xlim(0, 100)
  columns[2].set_xlim(0, 100)
  columns[0].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
  columns[0].locator_params(axis="x", nbins=4)
  columns[0].set_yticks(y, [_short(name) for name in names], fontsize=8)
  columns[0].set_ylim(len(names) - 0.4, -0.6)
  figure.legend(
    *columns[1].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False
  )
  return _png(figure)


def plane(everything: np.ndarray, kept: np.ndarray, alpha: float, cut: float | None) -> bytes:
  """Returns where the rollouts lie between mixture and reliability, and which of them are kept.

  Args:
    everything: `cell_counts` of the ranked rollouts.
    kept: `cell_counts` of the kept ones.
    alpha: of the lines of equal BIS.
    cut: a line of this BIS is drawn strong; None for no lines.
  """
  figure = Figure(figsize=(11, 4.6), dpi=_DPI, layout="constrained")
  left, right = figure.subplots(1, 2, sharey=True)
  with np.errstate(invalid="ignore"):
    share = 100 * kept / everything
  counts = np.where(everything > 0, everything, np.nan)
  norm = LogNorm(1, max(2.0, everything.max()))
  for axes, cells, style, label in (
    (left, counts, {"cmap": "viridis", "norm": norm}, "rollouts in a cell"),
    (right, share, {"cmap": "Blues", "vmin": 0, "vmax": 100}, "of them kept, %"),
  ):
    mesh = _cells(axes, cells, **style)
    figure.colorbar(mesh, ax=axes, label=label, pad=0.02)
  if cut is not None:
    _bis_lines(right, alpha, cut)
  left.set_title("all ranked rollouts", fontsize=10, color=_INK)
  right.set_title("kept", fontsize=10, color=_INK)
  right.set_ylabel("")
  return _png(figure)


def change(panels: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> bytes:
  """Returns, a panel a comparison, where rollouts come in and go out between two selections.

  Args:
    panels: (title, kept before, kept after), the latter two as `cell_counts`.
  """
  figure = Figure(figsize=(5.6 * len(panels), 4.6), dpi=_DPI, layout="constrained")
  row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  for axes, (title, before, after) in zip(row, panels, strict=True):
    difference = np.where((before > 0) | (after > 0), after - before, np.nan)
    most = max(1.0, np.nanmax(np.abs(difference), initial=1.0))
    # Logarithmic on both sides: a few cells of pure rollouts hold most of a corpus.
    mesh = _cells(axes, difference, cmap="RdBu", norm=SymLogNorm(10, vmin=-most, vmax=most))
    figure.colorbar(mesh, ax=axes, label="rollouts more (+) or fewer (\N{MINUS SIGN})", pad=0.02)
    axes.set_title(title, fontsize=10, color=_INK)
  for axes in row[1:]:
    axes.set_ylabel("")
  return _png(figure)


def scores(
  everything: np.ndarray, kept: np.ndarray, cuts: np.ndarray, strategy: str, bins: int = 60
) -> bytes:
  """Returns the distribution of the strategy's scores, the kept part coloured, and the cuts.

  Args:
    everything: float64[rows], finite scores of the ranked rollouts.
    kept: bool[rows].
    cuts: float64[sources], lowest kept score of each source.
    strategy: its name.
  """
  figure = Figure(figsize=(7, 4), dpi=_DPI, layout="constrained")
  axes = figure.subplots()
  low, high = float(everything.min()), float(everything.max())
  edges = np.linspace(low, high if high > low else low + 1e-6, bins + 1)
  for values, colour, word in ((everything, _GREY, "ranked"), (everything[kept], _BLUE, "kept")):
    axes.hist(values, edges, color=colour, label=f"{word}: {values.size:,}")
  axes.set_yscale("log")
  _style(axes, f"score by {strategy}", "rollouts (log scale)")
  if cuts.size:
    middle = float(np.median(cuts))
    axes.axvspan(cuts.min(), cuts.max(), color=_ORANGE, alpha=0.13, linewidth=0, zorder=0)
    label = f"cut: median {middle:.4g}, {cuts.min():.4g} to {cuts.max():.4g}"
    axes.axvline(middle, color=_ORANGE, linewidth=1.6, label=label)
  axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=8.5)
  return _png(figure)


def overlap(names: Sequence[str], jaccard: np.ndarray) -> bytes:
  """Returns the heat map of how much the strategies' kept sets have in common.

  Args:
    names: of the strategies.
    jaccard: float64[strategies, strategies], size of the intersection over that of the union.
  """
  figure = Figure(figsize=(7.4, 6.2), dpi=_DPI, layout="constrained")
  axes = figure.subplots()
  image = axes.imshow(100 * jaccard, cmap="Blues", vmin=0, vmax=100)
  for (row, column), value in np.ndenumerate(jaccard):
    colour = "white" if value > 0.55 else _INK
    axes.text(
      column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8.5
    )
  positions = np.arange(len(names))
  axes.set_xticks(positions, names, rotation=40, ha="right", fontsize=9)
  axes.set_yticks(positions, names, fontsize=9)
  axes.tick_params(length=0, colors=_INK)
  for spine in axes.spines.values():
    spine.set_visible(False)
  figure.colorbar(image, ax=axes, label="Jaccard overlap of the kept sets x 100", pad=0.02)
  return _png(figure)


def _cells(axes: Axes, cells: np.ndarray, **style):
  """Draws cells of the plane; those that are NaN stay empty."""
  mesh = axes.pcolormesh(MIXTURE_EDGES, RELIABILITY_EDGES, cells.T, **style)
  _style(axes, "mixture  p (1 \N{MINUS SIGN} p)", "reliability  R")
  axes.grid(visible=False)
  axes.set_facecolor("#f7f7f5")
  return mesh


def _bis_lines(axes: Axes, alpha: float, cut: float) -> None:
  x, y = np.meshgrid(np.linspace(MIXTURE_EDGES[0], 0.25, 120), np.linspace(0.0, 1.0, 120))
  levels = np.linspace(0.0, 0.25 + alpha, 10)[1:-1]
  bis = (np.maximum(x, 0.0) + alpha) * y
  axes.contour(x, y, bis, levels, colors="#777777", linewidths=0.6, alpha=0.7)
  line = axes.contour(x, y, bis, [cut], colors=_ORANGE, linewidths=1.8)
  axes.clabel(line, fmt="BIS %.3f", fontsize=8)


def _short(name: str) -> str:
  return name if len(name) <= _NAME else name[: _NAME - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _style(axes: Axes, x_label: str, y_label: str) -> None:
  axes.set_xlabel(x_label, color=_INK)
  axes.set_ylabel(y_label, color=_INK)
  axes.grid(color=_GRID, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(colors=_INK, labelsize=9, length=0)
  for side in ("top", "right", "left"):
    axes.spines[side].set_visible(False)
  axes.spines["bottom"].set_color(_QUIET)


def _png(figure: Figure) -> bytes:
  encoded = io.BytesIO()
  figure.savefig(encoded, format="png", facecolor="white")
  return encoded.getvalue()
