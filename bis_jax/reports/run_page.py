"""Writes a run's plots and index.html: what was selected, how it trained, how well it judges."""

import html
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from bis_jax.reports import page_style, plots

# (measure, heading) of the tables; the names are those of evaluation.json.
_OVERALL_COLUMNS = (
  ("overall_source_weighted", "overall"),
  ("macro_f1_pooled", "pooled"),
  ("macro_f1_source_mean", "source mean"),
  ("accuracy", "accuracy"),
  ("f1_correct", "F1+"),
  ("f1_error", "F1\N{MINUS SIGN}"),
  ("roc_auc", "ROC-AUC"),
  ("first_error_f1", "first-error F1"),
)
_SOURCE_COLUMNS = _OVERALL_COLUMNS[3:6] + _OVERALL_COLUMNS[7:]
_LABELS = {
  1: ("correct", "\N{CHECK MARK} correct"),
  -1: ("error", "\N{BALLOT X} error"),
  0: ("neutral", "\N{EN DASH} neutral"),
}


def write_page(
  workdir: str,
  *,
  title: str,
  items: Sequence,
  scores: Sequence[np.ndarray],
  evaluation: dict,
  history: Sequence[dict] = (),
  selection: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
  alpha: float | None = None,
  shown_items: int = 12,
  links: Mapping[str, str] | None = None,
) -> None:
  """Writes `workdir`/index.html and `workdir`/plots/*.png.

  `items` and `scores` are those of `step_evaluation.evaluate`, `evaluation` is its result (or
  evaluation.json read back), `history` the lines of metrics.jsonl as dicts. `selection` is
  (mixture float[M], reliability float[M], kept bool[M]) over all scorable rollouts, with `alpha`
  where BIS chose. `links` are {words: address} of further pages. A plot whose input is missing is left out. `workdir` may be a local path or
  gs://. The page holds every image it shows and opens from file://.
  """
  workdir = epath.Path(workdir)
  figures = _figures(evaluation, history, selection, alpha)
  (workdir / "plots").mkdir(parents=True, exist_ok=True)
  for name, (png, _) in figures.items():
    (workdir / "plots" / f"{name}.png").write_bytes(png)
  threshold = evaluation["thresholds"]["fixed_0.5"]["threshold"]
  examples = "\n".join(
    item_html(items[i], scores[i], threshold) for i in example_items(items, scores, shown_items)
  )
  body = "\n".join(
    [
      f"<h1>{html.escape(title)}</h1>",
      _summary(evaluation),
      *(
        f'<p><a href="{html.escape(address)}">{html.escape(words)}</a></p>'
        for words, address in (links or {}).items()
      ),
      "<h2>Figures</h2>",
      '<div class="figures">'
      + "".join(page_style.figure(*figures[name]) for name in figures)
      + "</div>",
      "<h2>Measures</h2>",
      '<p class="quiet">overall: macro-F1 of each source, weighted by its steps (what the paper '
      "calls overall micro-F1); pooled: macro-F1 of all steps together; source mean: unweighted. "
      "Small figures are 95 % bootstrap intervals over items.</p>",
      _overall_table(evaluation),
      "<h2>Sources, at threshold 0.5</h2>",
      _source_table(evaluation),
      "<h2>Policy models, at threshold 0.5</h2>",
      _policy_table(evaluation),
      "<h2>Benchmark items</h2>",
      '<p class="quiet">Steps are coloured by score <span class="key"></span> from erroneous to '
      "correct; beside each stand its score and its human label. Per source, the best judged, the "
      "worst judged and one between.</p>",
      examples,
    ]
  )
  (workdir / "index.html").write_text(page_style.document(title, body), encoding="utf-8")


def example_items(items: Sequence, scores: Sequence[np.ndarray], count: int) -> list[int]:
  """Returns up to `count` positions to show: by turns over the sources, best, worst and between.

  Items are ranked by the mean squared error of their labelled steps; the choice is deterministic.
  """
  error = np.array([item_error(item, s) for item, s in zip(items, scores, strict=True)])
  ranked = {}
  for i in np.argsort(error, kind="stable"):
    if not np.isnan(error[i]):
      ranked.setdefault(items[i].data_source, []).append(int(i))
  chosen = []
  for share in (0, 1, 0.5, 0.75, 0.25):
    for source in sorted(ranked):
      chosen.append(ranked[source][round(share * (len(ranked[source]) - 1))])
  return list(dict.fromkeys(chosen))[:count]


def item_error(item, scores: np.ndarray) -> float:
  """Returns the mean squared error of an item's labelled steps, NaN if it has none."""
  labels = np.asarray(item.labels)
  if not labels.any():
    return float("nan")
  return float(np.mean((np.asarray(scores)[labels != 0] - (labels[labels != 0] == 1)) ** 2))


def item_html(item, scores: np.ndarray, threshold: float) -> str:
  """Returns a card with an item's images, question and steps, each with its score and label."""
  steps = "\n".join(
    _step_html(text, label, float(score), threshold)
    for text, label, score in zip(item.steps, item.labels, scores, strict=True)
  )
  images = "".join(
    f'<img alt="image {i}" src="{page_style.data_uri(*page_style.thumbnail(image.read()))}">'
    for i, image in enumerate(item.images, start=1)
  )
  about = f"item {item.index}, {item.data_source}, solved by {item.policy_model}"
  return (
    f'<article class="card item"><div class="images">{images}</div><div>'
    f'<h3 class="small quiet">{html.escape(about)}</h3>'
    f'<div class="question">{html.escape(item.question)}</div>'
    f'<ol class="steps">{steps}</ol>'
    f'<p class="small quiet">Answer: {html.escape(item.answer)}</p></div></article>'
  )


def _step_html(text: str, label: int, score: float, threshold: float) -> str:
  kind, words = _LABELS[label]
  wrong = label != 0 and (score >= threshold) != (label == 1)
  verdict = ' <span class="wrong">misjudged</span>' if wrong else ""
  return (
    f'<li class="step" style="--score:{score:.4f}"><span class="text">{html.escape(text)}</span>'
    f'<span class="marks"><span class="score">{score:.2f}</span>{verdict}<br>'
    f'<span class="label {kind}">{words}</span></span></li>'
  )


def _figures(evaluation, history, selection, alpha) -> dict[str, tuple[bytes, str]]:
  """Returns {file name: (PNG, caption)} of the plots whose inputs are there."""
  figures = {}
  if selection is not None:
    caption = "What was selected: every scorable rollout in grey, the kept ones in blue."
    figures["selection"] = (plots.selection(*selection, alpha), caption)
  if any("loss" in line for line in history):
    figures["loss"] = (plots.loss(history), "Training loss.")
  caption = (
    "Macro-F1 of every source against the constant predictor, which calls every step the "
    "source's more frequent label. Whiskers: 95 % bootstrap intervals."
  )
  figures["source_f1"] = (plots.source_f1(evaluation), caption)
  caption = "Reliability: of the steps with a score, how many are correct. On the diagonal is best."
  figures["reliability"] = (plots.reliability(evaluation), caption)
  return figures


def _summary(evaluation: dict) -> str:
  sizes, thresholds = evaluation["benchmark"], evaluation["thresholds"]
  tiles = [
    ("overall_source_weighted", "tuned_on_test", "overall, tuned on test (the paper's figure)"),
    ("overall_source_weighted", "fixed_0.5", "overall at threshold 0.5"),
    ("macro_f1_pooled", "fixed_0.5", "pooled macro-F1 at 0.5"),
    ("roc_auc", "fixed_0.5", "ROC-AUC"),
    ("first_error_f1", "fixed_0.5", "first-error F1 at 0.5"),
  ]
  cards = "".join(
    f'<div class="tile"><b>{_hundred(thresholds[name][measure])}</b>'
    f'<span class="quiet small">{words}</span></div>'
    for measure, name, words in tiles
  )
  return (
    f'<p class="quiet">{sizes["items"]:,} items, {sizes["correct_steps"]:,} correct and '
    f"{sizes['error_steps']:,} erroneous steps ({sizes['neutral_steps']:,} neutral steps left "
    f'out). Measures are multiplied by 100.</p><div class="tiles">{cards}</div>'
  )


def _overall_table(evaluation: dict) -> str:
  rows = []
  for name, block in evaluation["thresholds"].items():
    intervals = {**evaluation.get("intervals", {}), **block.get("intervals", {})}
    cells = [_cell(block[measure], intervals.get(measure)) for measure, _ in _OVERALL_COLUMNS]
    first = f"{html.escape(name)}<small>t = {block['threshold']:.4g}; {block['origin']}</small>"
    rows.append(f"<tr><td>{first}</td>{''.join(cells)}</tr>")
  return page_style.table(["threshold", *(heading for _, heading in _OVERALL_COLUMNS)], rows)


def _source_table(evaluation: dict) -> str:
  rows = []
  for source, report in evaluation["per_source"].items():
    block = report["thresholds"]["fixed_0.5"]
    intervals = {**report.get("intervals", {}), **block.get("intervals", {})}
    values = [("macro_f1", block["macro_f1"]), (None, report["constant_macro_f1"])]
    values += [(measure, block[measure]) for measure, _ in _SOURCE_COLUMNS]
    values.append(("roc_auc", report["roc_auc"]))
    cells = [_cell(value, intervals.get(measure)) for measure, value in values]
    sizes = f"<small>{report['items']:,} items, {report['steps']:,} steps</small>"
    rows.append(f"<tr><td>{html.escape(source)}{sizes}</td>{''.join(cells)}</tr>")
  headings = [
    "source",
    "macro-F1",
    "constant",
    *(heading for _, heading in _SOURCE_COLUMNS),
    "ROC-AUC",
  ]
  return page_style.table(headings, rows)


def _policy_table(evaluation: dict) -> str:
  rows = []
  for policy, report in evaluation["per_policy_model"].items():
    measures = {"roc_auc": report["roc_auc"], **report["thresholds"]["fixed_0.5"]}
    intervals = {**report.get("intervals", {}), **measures.get("intervals", {})}
    cells = [_cell(measures[name], intervals.get(name)) for name, _ in _OVERALL_COLUMNS]
    sizes = f"<small>{report['items']:,} items, {report['steps']:,} steps</small>"
    rows.append(f"<tr><td>{html.escape(policy)}{sizes}</td>{''.join(cells)}</tr>")
  return page_style.table(["policy model", *(heading for _, heading in _OVERALL_COLUMNS)], rows)


def _cell(value: float | None, interval: list[float] | None) -> str:
  span = f"<small>{_hundred(interval[0])} to {_hundred(interval[1])}</small>" if interval else ""
  return f"<td>{_hundred(value)}{span}</td>"


def _hundred(value: float | None) -> str:
  return "\N{EN DASH}" if value is None else f"{100 * value:.2f}"
