"""Compares runs: tables, figures, and a page of every benchmark item.

    python -m bis_jax.report WORKDIR... --out=report

Writes into the out folder
  table.md, table.csv, table.tex    strategy x fraction x seed, with mean and standard deviation
  overall_against_fraction.png      a line per strategy; training on the full corpus is a level
  overall_against_step.png          of runs that evaluated during training
  index.html                        the table and the figures
  items.html, items/                every benchmark item, under every run that kept its scores
"""

from collections.abc import Sequence

from absl import app, flags
from etils import epath

from bis_jax import files
from bis_jax.console import command
from bis_jax.errors import UserError
from bis_jax.evaluation import benchmarks, score_files, step_evaluation
from bis_jax.reports import items_page, page, plots, run_table
from bis_jax.reports.run_table import Run
from bis_jax.settings import locations
from bis_jax.settings.workdir import read_config

_OUT = flags.DEFINE_string("out", "report", "folder to write")
_MEASURE = flags.DEFINE_string(
  "measure", "overall_source_weighted", "measure of evaluation.json to compare"
)
_THRESHOLD = flags.DEFINE_enum(
  "threshold", "tuned_on_test", list(step_evaluation.ORIGINS), "threshold of the measure"
)
_BENCHMARK = flags.DEFINE_string(
  "benchmark", "", "benchmark folder; default: that of the first run's config"
)


def main(argv: list[str]) -> None:
  with command("report", argv):
    if len(argv) < 2:
      raise UserError("name at least one workdir: python -m bis_jax.report WORKDIR... --out=FOLDER")
    write(argv[1:], files.absolute(_OUT.value))


def write(workdirs: Sequence[str], out: epath.Path) -> None:
  inputs = {f"the workdir {path}": path for path in workdirs}
  files.refuse_overwriting({"--out": out}, inputs, {"--benchmark": _BENCHMARK.value})
  runs = [run_table.read_run(path, _THRESHOLD.value, _MEASURE.value) for path in workdirs]
  rows = run_table.rows_of(runs)
  has_items = _write_items(out, runs)
  table = run_table.markdown(rows)
  files.write_text(out / "table.md", table)
  files.write_text(out / "table.csv", run_table.comma_separated(rows))
  files.write_text(out / "table.tex", run_table.latex(rows))
  measure = f"{_MEASURE.value} x 100, {_THRESHOLD.value}"
  figures = {"overall_against_fraction": plots.against_fraction(rows, measure)}
  if any(run.curve for run in runs):
    figures["overall_against_step"] = plots.against_step(runs, measure)
  headings, *body = run_table.cells(rows)
  page.write(
    out / "index.html",
    "report.html",
    figures=figures,
    plots=out,
    title="Runs",
    measure=measure,
    runs=len(runs),
    table=page.Table(headings, body),
    has_items=has_items,
  )
  print(f"{measure}\n\n{table}")
  print(f"wrote {out / 'index.html'}" + (f" and {out / 'items.html'}" if has_items else ""))


def _write_items(out: epath.Path, runs: Sequence[Run]) -> bool:
  scored = [run for run in runs if (epath.Path(run.workdir) / "scores.jsonl").exists()]
  if not scored:
    print("no workdir has a scores.jsonl, so there is no page of items")
    return False
  benchmark = _BENCHMARK.value
  if not benchmark:
    benchmark = str(locations.locate(read_config(epath.Path(scored[0].workdir))).benchmark)
  items = benchmarks.load(benchmark)
  scores = {
    f"{run.group}, seed {run.seed}": score_files.read_scores(f"{run.workdir}/scores.jsonl", items)
    for run in scored
  }
  items_page.write_items_page(out, title="Benchmark items", items=items, runs=scores)
  return True


if __name__ == "__main__":
  app.run(main)
