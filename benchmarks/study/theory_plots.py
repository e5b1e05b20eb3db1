"""Figures of the theory page, from the content of theory.json; each is the bytes of a PNG file."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from bis_jax.reports import plot_style as style

_WORDS = {
  "square": "expected squared gradient",
  "signal": "component along the teacher",
  "snr": "signal-to-noise along the teacher",
}


def deviations(simulation: Mapping) -> bytes:
  """Returns all deviations in standard errors, sorted, against those of a correct theory."""
  figure, axes = style.new_figure(
    "expected of a right closed form",
    "simulation - closed form, standard errors",
    width=6.4,
    height=4,
  )
  for (name, words), colour in zip(_WORDS.items(), style.LINES, strict=False):
    z = np.sort([row["z"][name] for row in simulation["table"]])
    expected = stats.norm.ppf((np.arange(len(z)) + 0.5) / len(z))
    axes.plot(expected, z, "o", color=colour, markersize=4, label=words, alpha=0.8)
  axes.plot([-3, 3], [-3, 3], color=style.GREY, linewidth=1, linestyle="--")
  for side in (-3, 3):
    axes.axhline(side, color=style.INK, linewidth=0.8)
  axes.set(xlim=(-3, 3), ylim=(-4, 4))
  style.add_legend(axes, loc="upper left")
  return style.png_bytes(figure)


def over_mixture(lines: Mapping[str, Mapping]) -> bytes:
  """Returns square, signal and signal-to-noise over p: curves of the theory, simulated points."""
  figure, panels = style.new_panels(3, width=11, height=3.9)
  for axes, name in zip(panels, _WORDS, strict=True):
    style.label_axes(axes, "share of positive steps, p", title=_WORDS[name])
    _draw_lines(axes, lines, name)
  handles, labels = axes.get_legend_handles_labels()
  labels = [f"student at {label}" for label in labels]
  style.add_legend(figure, handles, labels, loc="outside upper center", ncols=3)
  return style.png_bytes(figure)


def over_flips(lines: Mapping[str, Mapping]) -> bytes:
  """Returns signal and signal-to-noise over the rate of pseudo-positives among the positives."""
  figure, panels = style.new_panels(2, width=8.2, height=3.9)
  for axes, name in zip(panels, ("signal", "snr"), strict=True):
    style.label_axes(axes, "flip+, share of wrong steps among the positive", title=_WORDS[name])
    _draw_lines(axes, lines, name)
    axes.set_ylim(bottom=0)
  style.add_legend(axes)
  return style.png_bytes(figure)


def _draw_lines(axes, lines: Mapping[str, Mapping], name: str) -> None:
  for (label, line), colour in zip(lines.items(), style.LINES, strict=False):
    axes.plot(line["x"], [c[name] for c in line["closed_form"]], color=colour, label=label)
    axes.errorbar(
      line["x"],
      [s[name] for s in line["simulation"]],
      [3 * s[f"{name}_error"] for s in line["simulation"]],
      fmt="o",
      color=colour,
      markersize=3.5,
      linewidth=1,
    )


def flip_rates(rates: Mapping[str, Sequence[float]], measured: Mapping | None) -> bytes:
  """Returns the share of pseudo-positives over the MC score: by Bayes, and counted in the corpus."""
  figure, axes = style.new_figure("MC score of a positive step", "P(wrong)", width=6.4, height=4)
  for (label, rate), colour in zip(rates.items(), style.LINES, strict=False):
    x = np.arange(1, len(rate)) / (len(rate) - 1)
    axes.plot(x, rate[1:], color=colour, label=f"theory, {label}")
  axes.plot(
    [0, 1], [1, 0], color=style.GREY, linewidth=1, linestyle="--", label="calibrated: 1 - MC score"
  )
  if measured:
    points = [
      (c / measured["n_mc"], rate)
      for c, rate in enumerate(measured["rate"])
      if c and rate is not None and measured["steps"][c] >= 20
    ]
    axes.plot(*zip(*points, strict=True), "s", color=style.INK, markersize=5, label="toy corpus")
  axes.set(xlim=(0, 1), ylim=(0, 1.02))
  style.add_legend(axes)
  return style.png_bytes(figure)


def surface(result: Mapping) -> bytes:
  """Returns two maps over mixture and reliability, each of its highest value: exact SNR, and BIS."""
  figure, panels = style.new_panels(2, width=9, height=4, sharey=True)
  titles = {"snr": "exact signal-to-noise", "bis": f"BIS, alpha {result['alpha']:g}"}
  for axes, (name, title) in zip(panels, titles.items(), strict=True):
    style.label_axes(axes, "share of positive steps, p", title=title)
    value = np.array(result[name]) / np.max(result[name])
    levels = np.linspace(min(0, value.min()), 1, 11)
    filled = axes.contourf(result["p"], result["reliability"], value, levels, cmap="Blues")
    axes.contour(
      result["p"], result["reliability"], value, levels, colors=style.INK, linewidths=0.4, alpha=0.5
    )
    figure.colorbar(filled, ax=axes, label="share of the highest")
  panels[0].set_ylabel("MC score of the positive steps, R", color=style.INK)
  return style.png_bytes(figure)


def measured_by_tenth(students: Sequence[Mapping]) -> bytes:
  """Returns signal-to-noise over tenths of p(1-p), R and BIS, one line per student, with intervals."""
  predictors = ("p(1-p)", "R", "BIS")
  figure, panels = style.new_panels(3, width=11, height=4, sharey=True)
  for axes, predictor in zip(panels, predictors, strict=True):
    style.label_axes(axes, f"tenth of the rollouts by {predictor}")
    axes.axhline(0, color=style.GREY, linewidth=1)
    for i, (student, colour) in enumerate(zip(students, style.LINES, strict=False)):
      tenths = student["by_tenth"][predictor]
      x = [t + 1 + 0.07 * i for t, b in enumerate(tenths) if b["snr"] is not None]
      full = [b for b in tenths if b["snr"] is not None]
      axes.plot(
        x, [b["snr"] for b in full], "o-", color=colour, markersize=3.5, label=student["name"]
      )
      ends = np.array([b["interval"] for b in full]).reshape(-1, 2)
      axes.vlines(x, ends[:, 0], ends[:, 1], color=colour, linewidth=1)
    axes.set_xticks(range(1, 11))
  handles = axes.get_legend_handles_labels()
  style.add_legend(figure, *handles, loc="outside upper center", ncols=2)
  figure.supylabel("mean / deviation of -g . teacher", fontsize=10, color=style.INK)
  return style.png_bytes(figure)


def measured_correlations(students: Sequence[Mapping]) -> bytes:
  """Returns rank correlations of |g|^2 and of the aligned component with every predictor."""
  measures = {
    "square": "squared gradient",
    "aligned": "component along the teacher",
    "contrast": "its contrast part",
  }
  predictors = list(students[0]["rank_correlations"]["square"])
  figure, panels = style.new_panels(3, width=11, height=4, sharey=True)
  for axes, (measure, title) in zip(panels, measures.items(), strict=True):
    style.label_axes(axes, "Spearman's rank correlation", title=title)
    axes.axvline(0, color=style.GREY, linewidth=1)
    for i, (student, colour) in enumerate(zip(students, style.LINES, strict=False)):
      found = [student["rank_correlations"][measure][name] for name in predictors]
      y = np.arange(len(predictors)) + 0.13 * (i - (len(students) - 1) / 2)
      axes.plot(
        [f["value"] for f in found], y, "o", color=colour, markersize=4, label=student["name"]
      )
      axes.hlines(y, *zip(*(f["interval"] for f in found), strict=True), color=colour)
    axes.set(xlim=(-1, 1))
    axes.set_yticks(range(len(predictors)), predictors)
  axes.invert_yaxis()
  handles = axes.get_legend_handles_labels()
  style.add_legend(figure, *handles, loc="outside upper center", ncols=2)
  return style.png_bytes(figure)


def measured_by_mixture(students: Sequence[Mapping]) -> bytes:
  """Returns mean |g|^2 and its contrast part over p(1-p), each of its highest bin."""
  figure, panels = style.new_panels(2, width=11, height=4)
  titles = {"square": "squared gradient", "contrast_square": "its contrast part, squared"}
  for axes, (measure, title) in zip(panels, titles.items(), strict=True):
    style.label_axes(axes, "mixture  p (1 - p)", "mean / mean of the highest bin", title)
    for student, colour in zip(students, style.LINES, strict=False):
      x = [b["mixture"] for b in student["by_mixture"]]
      y = np.array([b[measure] for b in student["by_mixture"]])
      axes.plot(x, y / y.max(), "o-", color=colour, markersize=4, label=student["name"])
    axes.plot(
      [0, 0.25], [0, 1], color=style.GREY, linewidth=1, linestyle="--", label="in proportion"
    )
    axes.set(xlim=(-0.01, 0.26), ylim=(0, 1.05))
  handles = axes.get_legend_handles_labels()
  style.add_legend(figure, *handles, loc="outside upper center", ncols=2)
  return style.png_bytes(figure)
