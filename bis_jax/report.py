"""The command that sets runs side by side: a table, two figures and a page of every item.

    python -m bis_jax.report WORKDIR... --out=report

Writes into the out folder
  table.md, table.csv, table.tex    strategy x fraction x seed, with mean and deviation
  overall_against_fraction.png      a line a strategy, the full corpus as a level
  overall_against_step.png          of the runs that evaluated as they trained
  index.html                        these
  items.html, items/                every benchmark item, under every run that kept its scores
"""

import html
import json
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags
from etils import epath
from ml_collections import ConfigDict

from bis_jax.errors import UserError
from bis_jax.evaluation import benchmarks, score_files, step_evaluation
from bis_jax.reports import items_page, page_style, plots, run_table
from bis_jax.reports.run_table import Run
from bis_jax.settings import locations

_OUT = flags.DEFINE_string("out", "report", "folder to write into")
_MEASURE = flags.DEFINE_string("measure", "overall_source_weighted", "of evaluation.json's blocks")
_THRESHOLD = flags.DEFINE_enum(
  "threshold", "tuned_on_test", list(step_evaluation.ORIGINS), "where the threshold comes from"
)
_BENCHMARK = flags.DEFINE_string("benchmark", "", "folder; default: that of the first run's config")


def main(argv: list[str]) -> None:
  """Writes the report; a workdir that is none ends it with a message and exit code 1."""
  if len(argv) < 2:
    sys.exit("report: name at least one workdir: python -m bis_jax.report WORKDIR... --out=FOLDER")
  out = pathlib.Path(_OUT.value)
  try:
    runs = [run_table.read_run(path, _THRESHOLD.value, _MEASURE.value) for path in argv[1:]]
    rows = run_table.rows_of(runs)
    out.mkdir(parents=True, exist_ok=True)
    has_items = _write_items(out, runs)
  except (UserError, ValueError, OSError) as error:
    sys.exit(f"report: {error}")
  tables = {
    "table.md": run_table.markdown(rows),
    "table.csv": run_table.comma_separated(rows),
    "table.tex": run_table.latex(rows),
  }
  for name, text in tables.items():
    (out / name).write_text(text, encoding="utf-8")
  _write_index(out, runs, has_items)
  print(f"{_MEASURE.value} x 100, {_THRESHOLD.value}\n\n{tables['table.md']}")
  print(f"wrote {out / 'index.html'}" + (f" and {out / 'items.html'}" if has_items else ""))


def _write_items(out: pathlib.Path, runs: Sequence[Run]) -> bool:
  """Writes items.html for the runs that kept their scores; returns whether there are any."""
  scored = [run for run in runs if (epath.Path(run.workdir) / "scores.jsonl").exists()]
  if not scored:
    print("no workdir holds a scores.jsonl, so there is no page of items")
    return False
  benchmark = _BENCHMARK.value
  if not benchmark:
    config = json.loads((epath.Path(scored[0].workdir) / "config.json").read_text())
    benchmark = str(locations.locate(ConfigDict(config)).benchmark)
  items = benchmarks.load(benchmark)
  scores = {
    f"{run.group}, seed {run.seed}": score_files.read_scores(f"{run.workdir}/scores.jsonl", items)
    for run in scored
  }
  items_page.write_items_page(out, title="Benchmark items", items=items, runs=scores)
  return True


def _write_index(out: pathlib.Path, runs: Sequence[Run], has_items: bool) -> None:
  """Writes the figures and index.html, which shows them beside the table."""
  rows = run_table.rows_of(runs)
  words = f"{_MEASURE.value} x 100, {_THRESHOLD.value}"
  figures = {
    "overall_against_fraction": (
      plots.against_fraction(rows, words),
      "Against the share of the corpus that was trained on; means over seeds, bars one deviation.",
    )
  }
  if any(run.curve for run in runs):
    figures["overall_against_step"] = (
      plots.against_step(runs, words),
      "Against the training step; means over seeds.",
    )
  for name, (png, _) in figures.items():
    (out / f"{name}.png").write_bytes(png)
  head, *body = run_table.cells(rows)
  lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in body]
  page = [
    "<h1>Runs</h1>",
    f'<p class="quiet">{html.escape(words)}; {len(runs)} runs.</p>',
    page_style.table(head, [f"<tr>{line}</tr>" for line in lines]),
    '<h2>Figures</h2><div class="figures">',
    *(page_style.figure(png, caption) for png, caption in figures.values()),
    "</div>",
  ]
  if has_items:
    page.append('<p><a href="items.html">Every benchmark item under these runs</a></p>')
  (out / "index.html").write_text(page_style.document("Runs", "\n".join(page)), encoding="utf-8")


if __name__ == "__main__":
  app.run(main)
