"""Figures of one run and of several runs; each is the bytes of a PNG file.

`evaluation` is the content of evaluation.json.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bis_jax.reports import plot_style as style
from bis_jax.reports.run_table import Row, Run

_THRESHOLDS = {
  "fixed_0.5": ("threshold 0.5", style.BLUE),
  "tuned_on_dev": ("tuned on held-out training data", style.GREEN),
  "tuned_on_test": ("tuned on test", style.ORANGE),
}
_BASELINES = {
  "pass@n": ("pass@N (oracle)", style.GREY),
  "majority_vote": ("majority vote", style.INK),
}


def loss(history: Sequence[Mapping[str, float]]) -> bytes:
  """Returns the logged loss and its running mean; `history` holds the lines of metrics.jsonl."""
  lines = [line for line in history if "loss" in line]
  step = np.array([line["step"] for line in lines], float)
  value = np.array([line["loss"] for line in lines], float)
  figure, axes = style.new_figure("training step", "loss", height=3.6)
  if len(value) < 10:
    axes.plot(step, value, color=style.BLUE, linewidth=1)
  else:
    axes.plot(step, value, color=style.SKY, linewidth=1, alpha=0.6)
    axes.plot(step, _running_mean(value), color=style.BLUE, linewidth=2, label="running mean")
    style.add_legend(axes)
  axes.margins(x=0.01)
  return style.png_bytes(figure)


def source_f1(evaluation: Mapping[str, Any]) -> bytes:
  """Returns macro-F1 per source at every threshold, and the constant predictor's."""
  sources, names = list(evaluation["per_source"]), list(evaluation["thresholds"])
  figure, axes = style.new_figure("", "macro-F1 x 100", height=3.8)
  positions, width = np.arange(len(sources)), 0.76 / len(names)
  for i, name in enumerate(names):
    blocks = [evaluation["per_source"][source]["thresholds"][name] for source in sources]
    x = positions + (i - (len(names) - 1) / 2) * width
    values = [100 * block["macro_f1"] for block in blocks]
    label, colour = _THRESHOLDS[name]
    axes.bar(x, values, width * 0.92, color=colour, label=label, zorder=2)
    for centre, block in zip(x, blocks, strict=True):
      if span := block.get("intervals", {}).get("macro_f1"):
        ends = [100 * end for end in span]
        axes.plot([centre] * 2, ends, color=style.INK, linewidth=1.1, zorder=3)
  constants = [100 * evaluation["per_source"][source]["constant_macro_f1"] for source in sources]
  line = {"color": style.VERMILION, "linewidth": 2, "linestyle": (0, (3, 1.5)), "zorder": 4}
  axes.hlines(constants, positions - 0.44, positions + 0.44, label="constant predictor", **line)
  axes.set_xticks(positions, sources)
  axes.set_ylim(0, 100)
  axes.grid(axis="x", visible=False)
  style.add_legend(axes, **style.ABOVE, ncols=len(names) + 1, fontsize=8)
  return style.png_bytes(figure)


def calibration(evaluation: Mapping[str, Any]) -> bytes:
  """Returns the share of correct steps over the score, and below it the steps in each bin."""
  bins = evaluation["reliability"]
  full = [b for b in bins if b["steps"]]
  figure, (upper, lower) = style.new_panels(
    1, 2, width=6.4, height=4.4, sharex=True, height_ratios=(4, 1)
  )
  style.label_axes(upper, "", "share of correct steps")
  style.label_axes(lower, "score", "steps")
  width = bins[0]["high"] - bins[0]["low"]
  share = [b["share_correct"] for b in full]
  middle = [b["low"] + width / 2 for b in full]
  upper.bar(middle, share, width * 0.94, color=style.SKY, zorder=2)
  upper.plot([0, 1], [0, 1], color=style.GREY, linewidth=1, linestyle="--", zorder=3)
  line = {"color": style.BLUE, "marker": "o", "markersize": 4, "linewidth": 1.4, "zorder": 4}
  upper.plot([b["mean_score"] for b in full], share, **line)
  words = f"ECE {evaluation['ece']:.3f}\nBrier {evaluation['brier']:.3f}"
  upper.text(0.03, 0.95, words, transform=upper.transAxes, va="top", fontsize=9)
  upper.set(xlim=(0, 1), ylim=(0, 1))
  lower.bar(middle, [b["steps"] for b in full], width * 0.94, color=style.GREY)
  return style.png_bytes(figure)


def best_of_n(result: Mapping[str, Any]) -> bytes:
  figure, axes = style.new_figure("candidates per question", "correct answers x 100", height=4.2)
  curve = result["curve"]
  aggregations = [name for name in curve if name not in _BASELINES]
  best = max(aggregations, key=lambda name: curve[name]["values"][-1])
  votes = [name for name in aggregations if name.endswith("_vote")]
  colours = dict(zip([n for n in aggregations if n not in votes], style.LINES, strict=True))
  labels = {name: (name.replace("_", " of "), colour) for name, colour in colours.items()}
  for name in votes:
    weight = name.removesuffix("_vote")
    labels[name] = (f"vote by {weight}", colours[weight])
  for name, line in curve.items():
    label, colour = (labels | _BASELINES)[name]
    dash = "--" if name in _BASELINES else ":" if name in votes else "-"
    width = 2.4 if name == best else 1.4
    values = 100 * np.array(line["values"])
    marks = {"marker": "o", "markersize": 3.5, "linestyle": dash, "linewidth": width}
    axes.plot(result["n"], values, color=colour, label=label, **marks)
    if "intervals" in line and name in (best, "majority_vote"):
      low, high = 100 * np.array(line["intervals"]).T
      axes.fill_between(result["n"], low, high, color=colour, alpha=0.12, linewidth=0)
  axes.set_xscale("log", base=2)
  axes.set_xticks(result["n"], [str(n) for n in result["n"]])
  style.add_legend(axes, **style.BESIDE, fontsize=8)
  return style.png_bytes(figure)


def against_fraction(rows: Sequence[Row], measure: str) -> bytes:
  """Returns the measure over the share of the corpus, one line per strategy."""
  # Error bars are one standard deviation. Rows of the whole corpus are horizontal lines.
  figure, axes = style.new_figure("share of the corpus, %", measure)
  strategies = list(dict.fromkeys(row.strategy for row in rows if row.fraction < 1))
  marks = {"marker": "o", "markersize": 4, "linewidth": 1.6, "capsize": 3}
  for i, strategy in enumerate(strategies):
    line = sorted((r for r in rows if r.strategy == strategy), key=lambda row: row.fraction)
    # so that error bars do not overlap
    shift = 1 + 0.02 * (i - (len(strategies) - 1) / 2)
    axes.errorbar(
      [100 * row.fraction * shift for row in line],
      [100 * row.mean for row in line],
      [100 * (row.deviation or 0) for row in line],
      color=style.LINES[i % len(style.LINES)],
      label=strategy,
      **marks,
    )
  level = {"color": style.INK, "linestyle": "--", "linewidth": 1.2}
  for row in rows:
    if row.fraction == 1 and row.strategy not in strategies:
      axes.axhline(100 * row.mean, label=row.strategy, **level)
  if percents := sorted({100 * row.fraction for row in rows if row.fraction < 1}):
    axes.set_xscale("log")
    axes.set_xticks(percents, [f"{percent:g}" for percent in percents], minor=False)
    axes.minorticks_off()
  style.add_legend(axes, **style.BESIDE, fontsize=8)
  return style.png_bytes(figure)


def against_step(runs: Sequence[Run], measure: str) -> bytes:
  """Returns the measure over training steps per strategy and fraction: mean and range over seeds."""
  figure, axes = style.new_figure("training step", measure)
  groups: dict[str, list[dict[int, float]]] = {}
  for run in runs:
    if run.curve:
      groups.setdefault(run.group, []).append(dict(run.curve))
  for (group, curves), colour in zip(groups.items(), itertools.cycle(style.LINES), strict=False):
    # the steps that every run of the group evaluated
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = 100 * np.array([[curve[step] for step in steps] for curve in curves])
    axes.plot(steps, values.mean(0), color=colour, marker="o", markersize=3.5, label=group)
    axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.13, linewidth=0)
  style.add_legend(axes)
  return style.png_bytes(figure)


def _running_mean(values: np.ndarray) -> np.ndarray:
  """Returns the mean of each value and its neighbours, up to 1/30 of the run on either side."""
  window = np.ones(2 * max(1, len(values) // 30) + 1)
  count = np.convolve(np.ones(len(values)), window, "same")
  return np.convolve(values, window, "same") / count
