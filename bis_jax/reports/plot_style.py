"""The style that all figures share, and their conversion to the bytes of a PNG file."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#e69f00", "#009e73", "#cc79a7"
SKY, VERMILION = "#56b4e9", "#d55e00"
LINES = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, "#8c6d31")
INK, GREY, LIGHT_GREY = "#222222", "#9a9a9a", "#c6c6c6"
# Places of a legend.
BESIDE = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
ABOVE = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}


def new_figure(
  x_label: str, y_label: str, *, width: float = 6.4, height: float = 4.0
) -> tuple[Figure, Axes]:
  figure, (axes,) = new_panels(1, width=width, height=height)
  label_axes(axes, x_label, y_label)
  return figure, axes


def new_panels(
  columns: int, rows: int = 1, *, width: float, height: float, **subplots: Any
) -> tuple[Figure, list[Axes]]:
  """Returns a figure (inches) and its panels; `subplots` as in `Figure.subplots`."""
  # The figure is outside pyplot's global state, so threads may draw at the same time.
  figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
  panels = np.ravel(figure.subplots(rows, columns, **subplots)).tolist()
  for axes in panels:
    axes.grid(color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
  return figure, panels


def label_axes(axes: Axes, x_label: str, y_label: str = "", title: str = "") -> None:
  axes.set_xlabel(x_label, color=INK)
  axes.set_ylabel(y_label, color=INK)
  axes.set_title(title, fontsize=10, color=INK)


def label_lines(axes: Axes, names: Sequence[str]) -> None:
  """Names the positions 0, 1, ... of the y axis, the first on top."""
  axes.set_yticks(range(len(names)), names, fontsize=8)
  axes.set_ylim(len(names) - 0.4, -0.6)
  axes.grid(axis="y", visible=False)


def add_legend(axes: Axes | Figure, *args: Any, fontsize: float = 9, **options: Any) -> None:
  axes.legend(*args, frameon=False, fontsize=fontsize, **options)


def png_bytes(figure: Figure) -> bytes:
  encoded = io.BytesIO()
  figure.savefig(encoded, format="png", facecolor="white")
  return encoded.getvalue()
