"""Draws a run's figures with matplotlib and returns each as the bytes of a PNG file."""

import io
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bis_jax.reports.run_table import Row, Run

# Okabe and Ito's colours, which stay apart for colour-blind readers.
BLUE, ORANGE, GREEN, PINK, SKY, VERMILION = (
  "#0072b2",
  "#e69f00",
  "#009e73",
  "#cc79a7",
  "#56b4e9",
  "#d55e00",
)
LINES = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, "#8c6d31")
INK, GREY, _GRID = "#222222", "#9a9a9a", "#e3e3e3"
_CELLS = 32
DPI = 160
_THRESHOLD_COLOURS = {"fixed_0.5": BLUE, "tuned_on_dev": GREEN, "tuned_on_test": ORANGE}
_THRESHOLD_WORDS = {
  "fixed_0.5": "threshold 0.5",
  "tuned_on_dev": "tuned on held-out training data",
  "tuned_on_test": "tuned on test",
}


def selection(
  mixture: np.ndarray, reliability: np.ndarray, kept: np.ndarray, alpha: float | None = None
) -> bytes:
  """Returns the picture of a selection: all rollouts in grey and the kept ones in blue.

  `mixture` float[M] is p(1-p), `reliability` float[M] the mean MC score of positive steps,
  `kept` bool[M]. Rollouts fall into cells, and a disc's area grows with the square root of the
  number in its cell. With `alpha`, lines of equal Balanced-Information Score are drawn.
  """
  figure, axes = new_figure("mixture  p (1 - p)", "reliability  R", width=6.4, height=4.4)
  kept = np.asarray(kept, bool)
  edges = np.linspace(0, 0.25, _CELLS + 1), np.linspace(0, 1, _CELLS + 1)
  for mask, colour, word in ((slice(None), "#c9c9c9", "all"), (kept, BLUE, "kept")):
    x, y = np.asarray(mixture)[mask], np.asarray(reliability)[mask]
    cells = [
      np.clip(np.digitize(values, edge) - 1, 0, _CELLS - 1)
      for values, edge in zip((x, y), edges, strict=True)
    ]
    cell, inverse, count = np.unique(
      cells[0] * _CELLS + cells[1], return_inverse=True, return_counts=True
    )
    # The disc stands at the mean of its rollouts, so that p(1-p) = 0 is drawn on the axis.
    centre_x = np.bincount(inverse, x, len(cell)) / count
    centre_y = np.bincount(inverse, y, len(cell)) / count
    area = 400 * np.sqrt(count / max(1, len(kept)))
    label = f"{word}: {len(x):,}"
    axes.scatter(centre_x, centre_y, area + 2, color=colour, label=label, linewidths=0, zorder=2)
  if alpha is not None:
    grid_x, grid_y = np.meshgrid(np.linspace(-0.01, 0.26, 100), np.linspace(0, 1.05, 100))
    lines = axes.contour(
      grid_x,
      grid_y,
      (grid_x + alpha) * grid_y,
      np.arange(0.05, 0.25 + alpha, 0.05),
      colors=INK,
      linewidths=0.6,
      alpha=0.45,
      zorder=3,
    )
    axes.clabel(lines, fmt="BIS %.2f", fontsize=6.5)
  axes.set(xlim=(-0.01, 0.26), ylim=(0, 1.05))
  axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2, frameon=False, fontsize=9)
  return png_bytes(figure)


def loss(history: Sequence[dict]) -> bytes:
  """Returns the loss over training steps: every logged value, and their running mean.

  `history` holds the lines of metrics.jsonl; those without a `loss` are passed over.
  """
  lines = [line for line in history if "loss" in line]
  step = np.array([line["step"] for line in lines], float)
  value = np.array([line["loss"] for line in lines], float)
  figure, axes = new_figure("training step", "loss", width=6.4, height=3.6)
  smooth = len(value) >= 10
  axes.plot(step, value, color=SKY if smooth else BLUE, linewidth=1, alpha=0.6 if smooth else 1)
  if smooth:
    axes.plot(step, _running_mean(value), color=BLUE, linewidth=2, label="running mean")
    axes.legend(frameon=False, fontsize=9)
  axes.margins(x=0.01)
  return png_bytes(figure)


def source_f1(evaluation: dict) -> bytes:
  """Returns macro-F1 per source at every threshold, with intervals, over the constant predictor.

  `evaluation` is the content of evaluation.json.
  """
  sources = list(evaluation["per_source"])
  names = list(evaluation["thresholds"])
  figure, axes = new_figure("", "macro-F1 x 100", width=6.4, height=3.8)
  width = 0.76 / len(names)
  for i, name in enumerate(names):
    blocks = [evaluation["per_source"][source]["thresholds"][name] for source in sources]
    x = np.arange(len(sources)) + (i - (len(names) - 1) / 2) * width
    values = np.array([block["macro_f1"] for block in blocks])
    spans = [block.get("intervals", {}).get("macro_f1") for block in blocks]
    axes.bar(
      x,
      100 * values,
      width * 0.92,
      color=_THRESHOLD_COLOURS[name],
      label=_THRESHOLD_WORDS[name],
      zorder=2,
    )
    for centre, span in zip(x, spans, strict=True):
      if span:
        axes.plot([centre] * 2, [100 * end for end in span], color=INK, linewidth=1.1, zorder=3)
  constants = [100 * evaluation["per_source"][source]["constant_macro_f1"] for source in sources]
  positions = np.arange(len(sources))
  axes.hlines(
    constants,
    positions - 0.44,
    positions + 0.44,
    color=VERMILION,
    linewidth=2,
    linestyle=(0, (3, 1.5)),
    label="constant predictor",
    zorder=4,
  )
  axes.set_xticks(positions, sources)
  axes.set_ylim(0, 100)
  axes.grid(axis="x", visible=False)
  axes.legend(
    loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names) + 1, frameon=False, fontsize=8
  )
  return png_bytes(figure)


def reliability(evaluation: dict) -> bytes:
  """Returns the reliability diagram of evaluation.json: scores against shares of correct steps.

  Below it stands how many steps fall into each bin.
  """
  bins = evaluation["reliability"]
  full = [b for b in bins if b["steps"]]
  figure = Figure(figsize=(6.4, 4.4), dpi=DPI, layout="constrained")
  upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
  for axes, word in ((upper, "share of correct steps"), (lower, "steps")):
    style_axes(axes, "", word)
  lower.set_xlabel("score", color=INK)
  width = bins[0]["high"] - bins[0]["low"]
  upper.bar(
    [b["low"] + width / 2 for b in full],
    [b["share_correct"] for b in full],
    width * 0.94,
    color=SKY,
    zorder=2,
  )
  upper.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", zorder=3)
  upper.plot(
    [b["mean_score"] for b in full],
    [b["share_correct"] for b in full],
    color=BLUE,
    marker="o",
    markersize=4,
    linewidth=1.4,
    zorder=4,
  )
  words = [f"{name} {evaluation[key]:.3f}" for name, key in (("ECE", "ece"), ("Brier", "brier"))]
  upper.text(0.03, 0.95, "\n".join(words), transform=upper.transAxes, va="top", fontsize=9)
  upper.set(xlim=(0, 1), ylim=(0, 1))
  lower.bar(
    [b["low"] + width / 2 for b in bins], [b["steps"] for b in bins], width * 0.94, color=GREY
  )
  return png_bytes(figure)


def best_of_n(result: dict) -> bytes:
  """Returns the Best-of-N curves: share of questions right over the number of candidates.

  `result` is that of `best_of_n.evaluate`. Shaded are the intervals of the best aggregation, and of
  the majority vote.
  """
  figure, axes = new_figure("candidates a question", "questions right x 100", width=6.4, height=4.2)
  curve = result["curve"]
  baselines = {"pass@n": ("pass@N (oracle)", GREY), "majority_vote": ("majority vote", INK)}
  aggregations = [name for name in curve if name not in baselines]
  best = max(aggregations, key=lambda name: curve[name]["values"][-1])
  colours = dict(zip(aggregations, LINES, strict=True))
  for name, line in curve.items():
    label, colour = baselines.get(name, (name.replace("_", " of "), colours.get(name)))
    dashed = name in baselines
    values = 100 * np.array(line["values"])
    axes.plot(
      result["n"],
      values,
      color=colour,
      label=label,
      linestyle="--" if dashed else "-",
      linewidth=2.4 if name == best else 1.4,
      marker="o",
      markersize=3.5,
    )
    if "intervals" in line and name in (best, "majority_vote"):
      low, high = 100 * np.array(line["intervals"]).T
      axes.fill_between(result["n"], low, high, color=colour, alpha=0.12, linewidth=0)
  axes.set_xscale("log", base=2)
  axes.set_xticks(result["n"], [str(n) for n in result["n"]])
  axes.legend(frameon=False, fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))
  return png_bytes(figure)


def against_fraction(rows: Sequence[Row], measure: str) -> bytes:
  """Returns the measure over the share of the corpus, a line a strategy, bars one deviation.

  Lines stand a little beside each other, so that their bars can be told apart. Rows of the whole
  corpus (fraction 1) are levels across the figure. `measure` names the y axis.
  """
  figure, axes = new_figure("share of the corpus, %", measure, width=6.4, height=4)
  strategies = list(dict.fromkeys(row.strategy for row in rows if row.fraction < 1))
  colours = itertools.cycle(LINES)
  for place, (strategy, colour) in enumerate(zip(strategies, colours, strict=False)):
    line = sorted((r for r in rows if r.strategy == strategy), key=lambda row: row.fraction)
    beside = 1 + 0.02 * (place - (len(strategies) - 1) / 2)
    axes.errorbar(
      [100 * row.fraction * beside for row in line],
      [100 * row.mean for row in line],
      [100 * (row.deviation or 0) for row in line],
      color=colour,
      marker="o",
      markersize=4,
      linewidth=1.6,
      capsize=3,
      label=strategy,
    )
  for row in rows:
    if row.fraction == 1 and row.strategy not in strategies:
      axes.axhline(100 * row.mean, color=INK, linestyle="--", linewidth=1.2, label=row.strategy)
  fractions = sorted({row.fraction for row in rows if row.fraction < 1})
  if fractions:
    axes.set_xscale("log")
    axes.set_xticks([100 * f for f in fractions], [f"{100 * f:g}" for f in fractions], minor=False)
    axes.minorticks_off()
  axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
  return png_bytes(figure)


def against_step(runs: Sequence[Run], measure: str) -> bytes:
  """Returns the measure over training steps, a line a strategy and fraction, means over seeds.

  A step is drawn where every run of the group evaluated; the shade spans the seeds.
  """
  figure, axes = new_figure("training step", measure, width=6.4, height=4)
  groups = {}
  for run in runs:
    if run.curve:
      groups.setdefault(run.group, []).append(dict(run.curve))
  for (group, curves), colour in zip(groups.items(), itertools.cycle(LINES), strict=False):
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = 100 * np.array([[curve[step] for step in steps] for curve in curves])
    axes.plot(steps, values.mean(0), color=colour, marker="o", markersize=3.5, label=group)
    axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.13, linewidth=0)
  axes.legend(frameon=False, fontsize=9)
  return png_bytes(figure)


def _running_mean(values: np.ndarray) -> np.ndarray:
  """Returns the mean of each value and its neighbours, a fifteenth of the run on either side."""
  reach = max(1, len(values) // 30)
  sums = np.concatenate([[0.0], np.cumsum(values)])
  low = np.maximum(np.arange(len(values)) - reach, 0)
  high = np.minimum(np.arange(len(values)) + reach + 1, len(values))
  return (sums[high] - sums[low]) / (high - low)


def seeds(values: Mapping[str, Sequence[float]], measure: str) -> bytes:
  """Returns the measure of every seed, a dot each, a line an arm, the first on top; bars are means.

  `values` holds measures in [0, 1] by the arm's name. `measure` names the x axis.
  """
  figure, axes = new_figure(measure, "", width=6.4, height=1.1 + 0.28 * len(values))
  for place, of_seeds in enumerate(values.values()):
    x = 100 * np.asarray(of_seeds)
    axes.plot(x, [place] * len(x), "o", color=BLUE, markersize=6, alpha=0.55, markeredgewidth=0)
    axes.plot([x.mean()] * 2, [place - 0.32, place + 0.32], color=INK, linewidth=1.6)
  _name_lines(axes, list(values))
  return png_bytes(figure)


def gains(rows: Sequence[tuple[str, float, float, float]], words: str, *, marked: float) -> bytes:
  """Returns relative gains with their intervals, a line each, the first on top.

  Intervals that leave out 0 are blue. They are cut where the figure ends, at -40 and 100 %.

  Args:
    rows: (name, gain, low end, high end), as shares: 0.04 is 4 %.
    words: name the x axis.
    marked: a gain that a dotted line stands for.
  """
  figure, axes = new_figure(words, "", width=6.4, height=1.1 + 0.24 * len(rows))
  axes.axvline(0, color=INK, linewidth=1)
  axes.axvline(100 * marked, color=VERMILION, linewidth=1.2, linestyle=(0, (2, 2)))
  for place, (_, gain, low, high) in enumerate(rows):
    colour = BLUE if low > 0 or high < 0 else GREY
    axes.plot([100 * low, 100 * high], [place] * 2, color=colour, linewidth=2)
    axes.plot(100 * gain, place, "o", color=colour, markersize=5)
  ends = [100 * end for row in rows for end in row[2:]]
  axes.set_xlim(max(-40, min(0, *ends) - 2), min(100, max(*ends, 0) + 2))
  _name_lines(axes, [row[0] for row in rows])
  return png_bytes(figure)


def _name_lines(axes: Axes, names: Sequence[str]) -> None:
  """Names the places 0, 1, ... of the y axis, the first on top."""
  axes.set_yticks(range(len(names)), names, fontsize=8)
  axes.set_ylim(len(names) - 0.4, -0.6)
  axes.grid(axis="y", visible=False)


def new_figure(x_label: str, y_label: str, *, width: float, height: float) -> tuple[Figure, Axes]:
  """Returns a styled figure (inches) and its axes, outside pyplot's global state."""
  figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
  axes = figure.subplots()
  style_axes(axes, x_label, y_label)
  return figure, axes


def style_axes(axes: Axes, x_label: str, y_label: str) -> None:
  """Gives axes the look of all figures, with these labels."""
  axes.set_xlabel(x_label, color=INK)
  axes.set_ylabel(y_label, color=INK)
  axes.grid(color=_GRID, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(colors=INK, labelsize=9, length=0)
  for side in ("top", "right", "left"):
    axes.spines[side].set_visible(False)
  axes.spines["bottom"].set_color(GREY)


def png_bytes(figure: Figure) -> bytes:
  """Returns the PNG file of a figure."""
  encoded = io.BytesIO()
  figure.savefig(encoded, format="png", facecolor="white")
  return encoded.getvalue()
