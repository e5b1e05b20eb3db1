"""Figures that only the study draws; each is the bytes of a PNG file."""

from collections.abc import Mapping, Sequence

import numpy as np

from bis_jax.reports import plot_style as style


def seeds(values: Mapping[str, Sequence[float]], measure: str) -> bytes:
  """Returns a strip plot: one row per arm, one dot per seed, vertical tick = mean.

  `values` holds measures in [0, 1] by the arm's name. `measure` labels the x axis.
  """
  figure, axes = style.new_figure(measure, "", height=1.1 + 0.28 * len(values))
  dots = {"color": style.BLUE, "markersize": 6, "alpha": 0.55, "markeredgewidth": 0}
  for row, of_seeds in enumerate(values.values()):
    x = 100 * np.asarray(of_seeds)
    axes.plot(x, [row] * len(x), "o", **dots)
    axes.plot([x.mean()] * 2, [row - 0.32, row + 0.32], color=style.INK, linewidth=1.6)
  style.label_lines(axes, list(values))
  return style.png_bytes(figure)


def gains(rows: Sequence[tuple[str, float, float, float]], label: str, *, marked: float) -> bytes:
  """Returns relative gains with their intervals, one per row; blue if the interval excludes 0.

  Intervals are cut at -40 and 100 %.

  Args:
    rows: (name, gain, low end, high end), as shares: 0.04 is 4 %.
    label: of the x axis.
    marked: gain of the dotted line.
  """
  figure, axes = style.new_figure(label, "", height=1.1 + 0.24 * len(rows))
  axes.axvline(0, color=style.INK, linewidth=1)
  axes.axvline(100 * marked, color=style.VERMILION, linewidth=1.2, linestyle=(0, (2, 2)))
  for row, (_, gain, low, high) in enumerate(rows):
    colour = style.BLUE if low > 0 or high < 0 else style.GREY
    axes.plot([100 * low, 100 * high], [row] * 2, color=colour, linewidth=2)
    axes.plot(100 * gain, row, "o", color=colour, markersize=5)
  ends = [100 * end for row in rows for end in row[2:]]
  axes.set_xlim(max(-40, min(0, *ends) - 2), min(100, max(*ends, 0) + 2))
  style.label_lines(axes, [row[0] for row in rows])
  return style.png_bytes(figure)


def against_mixed(points: Mapping[str, tuple[float, float]], measure: str) -> bytes:
  """Returns a scatter plot of tenths over their share of mixed rollouts.

  `points` holds (share of mixed rollouts, measure), both in [0, 1], by name.
  """
  figure, axes = style.new_figure("mixed rollouts in the tenth, %", measure)
  axes.set_xlim(0, 100)
  values = [100 * value for _, value in points.values()]
  line = 0.05 * (max(values) - min(values))  # height of a name
  lowest = {"left": -np.inf, "right": -np.inf}  # where the next name may stand
  for name, (share, value) in sorted(points.items(), key=lambda point: point[1][1]):
    axes.plot(100 * share, 100 * value, "o", color=style.BLUE, markersize=6)
    side = "right" if share > 0.5 else "left"  # end of the name at the dot, inside the figure
    y = max(100 * value, lowest[side])
    lowest[side] = y + line
    x = 100 * share + (-2 if side == "right" else 2)
    axes.text(x, y, name, ha=side, va="center", fontsize=8)
  return style.png_bytes(figure)
