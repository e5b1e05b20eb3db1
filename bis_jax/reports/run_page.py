"""Writes a run's index.html: selection, training loss, evaluation, and example items."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from bis_jax.reports import page, plots, selection_plots

# {measure of evaluation.json: heading of its column}
_MEASURES = {
  "overall_source_weighted": "overall",
  "macro_f1_pooled": "pooled",
  "macro_f1_source_mean": "source mean",
  "accuracy": "accuracy",
  "f1_correct": "F1+",
  "f1_error": "F1\N{MINUS SIGN}",
  "roc_auc": "ROC-AUC",
  "first_error_f1": "first-error F1",
}
_SOURCE_MEASURES = {"macro_f1": "macro-F1", "constant_macro_f1": "constant"} | {
  name: _MEASURES[name]
  for name in ("accuracy", "f1_correct", "f1_error", "first_error_f1", "roc_auc")
}


def write_page(
  workdir: epath.PathLike,
  *,
  title: str,
  items: Sequence,
  scores: Sequence[np.ndarray],
  evaluation: Mapping[str, Any],
  history: Sequence[Mapping[str, float]] = (),
  selection: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
  alpha: float | None = None,
  shown_items: int = 12,
  links: Mapping[str, str] | None = None,
) -> None:
  """Writes `workdir`/index.html and `workdir`/plots/*.png; a figure without its input is left out.

  Args:
    items, scores, evaluation: arguments and result of `step_evaluation.evaluate`.
    history: lines of metrics.jsonl.
    selection: (mixture float[M], reliability float[M], kept bool[M]) of all scorable rollouts.
    alpha: of BIS, if the selection used it.
    shown_items: number of items on the page.
    links: {words: address} of further pages.
  """
  workdir = epath.Path(workdir)
  shown = example_items(items, scores, shown_items)
  page.write(
    workdir / "index.html",
    "run.html",
    figures=_figures(evaluation, history, selection, alpha),
    plots=workdir / "plots",
    title=title,
    sizes=evaluation["benchmark"],
    thresholds=evaluation["thresholds"],
    links=links or {},
    overall=_overall_table(evaluation),
    sources=_group_table("source", _SOURCE_MEASURES, evaluation["per_source"]),
    policies=_group_table("policy model", _MEASURES, evaluation["per_policy_model"]),
    threshold=evaluation["thresholds"]["fixed_0.5"]["threshold"],
    cards=[item_card(items[i], scores[i]) for i in shown],
  )


def example_items(items: Sequence, scores: Sequence[np.ndarray], count: int) -> list[int]:
  """Returns the positions of up to `count` items by error: best, worst, between; sources in turn."""
  error = np.array([item_error(item, s) for item, s in zip(items, scores, strict=True)])
  ranked: dict[str, list[int]] = {}
  for i in np.argsort(error, kind="stable"):
    if not np.isnan(error[i]):
      ranked.setdefault(items[i].data_source, []).append(int(i))
  chosen = [
    ranked[source][round(share * (len(ranked[source]) - 1))]
    for share in (0, 1, 0.5, 0.75, 0.25)
    for source in sorted(ranked)
  ]
  return list(dict.fromkeys(chosen))[:count]


def item_error(item: Any, scores: np.ndarray) -> float:
  """Returns the mean squared error of an item's labelled steps, NaN if it has none."""
  labels = np.asarray(item.labels)
  if not labels.any():
    return float("nan")
  return float(np.mean((np.asarray(scores)[labels != 0] - (labels[labels != 0] == 1)) ** 2))


def item_card(item: Any, scores: np.ndarray) -> tuple[Any, list[tuple], list[str]]:
  """Returns the item, (text, label, score) of its steps and its images, for item.html."""
  steps = list(zip(item.steps, item.labels, np.asarray(scores).tolist(), strict=True))
  return item, steps, [page.data_uri(*page.thumbnail(image.read())) for image in item.images]


def _figures(
  evaluation: Mapping[str, Any],
  history: Sequence[Mapping[str, float]],
  selection: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
  alpha: float | None,
) -> dict[str, bytes]:
  figures = {}
  if selection is not None:
    mixture, reliability, kept = selection
    everything = selection_plots.cell_counts(mixture, reliability)
    kept = selection_plots.cell_counts(mixture[kept], reliability[kept])
    figures["selection"] = selection_plots.plane(everything, kept, alpha)
  if any("loss" in line for line in history):
    figures["loss"] = plots.loss(history)
  figures["source_f1"] = plots.source_f1(evaluation)
  return figures | {"calibration": plots.calibration(evaluation)}


def _overall_table(evaluation: Mapping[str, Any]) -> page.Table:
  shared = {"intervals": evaluation.get("intervals", {})}
  lines = {
    (name, f"t = {block['threshold']:.4g}; {block['origin']}"): (shared, block)
    for name, block in evaluation["thresholds"].items()
  }
  return _table("threshold", _MEASURES, lines)


def _group_table(
  heading: str, measures: Mapping[str, str], groups: Mapping[str, Any]
) -> page.Table:
  lines = {}
  for name, group in groups.items():
    size = f"{group['items']:,} items, {group['steps']:,} steps"
    lines[name, size] = group, group["thresholds"]["fixed_0.5"]
  return _table(heading, measures, lines)


def _table(
  heading: str,
  measures: Mapping[str, str],
  lines: Mapping[tuple[str, str], Iterable[Mapping[str, Any]]],
) -> page.Table:
  # The later blocks of a line take precedence.
  rows = []
  for first, blocks in lines.items():
    values, intervals = {}, {}
    for block in blocks:
      values |= block
      intervals |= block.get("intervals", {})
    cells = [(page.percent(values[name]), _interval(intervals.get(name))) for name in measures]
    rows.append([first, *cells])
  return page.Table([heading, *measures.values()], rows)


def _interval(ends: Sequence[float] | None) -> str:
  return f"{page.percent(ends[0])} to {page.percent(ends[1])}" if ends else ""
