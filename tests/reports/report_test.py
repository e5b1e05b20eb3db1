"""The report of several workdirs: its tables by hand, and its pages in a real browser."""

import csv
import functools
import json
import pathlib
import re
import statistics

import numpy as np
import pytest

from bis_jax.evaluation import score_files, visual_process_bench
from bis_jax.reports import run_table

MEASURE = ("tuned_on_test", "overall_source_weighted")


def workdir(folder, strategy, fraction, seed, value, curve=()):
  """Writes the files of a run that the report reads."""
  folder.mkdir(parents=True)
  config = {"seed": seed, "selection": {"strategy": strategy, "fraction": fraction}}
  (folder / "config.json").write_text(json.dumps(config))
  block = {"threshold": 0.4, MEASURE[1]: value}
  (folder / "evaluation.json").write_text(json.dumps({"thresholds": {MEASURE[0]: block}}))
  lines = [{"step": 0, "loss": 1.0}]
  lines += [{"step": step, "evaluation/" + "/".join(MEASURE): v} for step, v in curve]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(folder)


@pytest.fixture
def report(command):
  return functools.partial(command, "bis_jax.report")


@pytest.fixture
def workdirs(tmp_path):
  """Six runs: full, BIS at two fractions with two seeds, low_mc; one of them with a curve."""
  return [
    workdir(tmp_path / "a", "bis", 0.1, 0, 0.61, [(50, 0.5), (100, 0.6)]),
    workdir(tmp_path / "b", "bis", 0.1, 1, 0.65),
    workdir(tmp_path / "c", "bis", 0.25, 0, 0.7),
    workdir(tmp_path / "d", "bis", 0.25, 3, 0.75),
    workdir(tmp_path / "e", "full", 1.0, 0, 0.655),
    workdir(tmp_path / "f", "low_mc", 0.1, 1, 0.6),
  ]


def test_tables_hold_every_seed_mean_and_deviation(tmp_path, workdirs):
  rows = run_table.rows_of([run_table.read_run(path, *MEASURE) for path in workdirs])
  assert [(row.strategy, row.fraction) for row in rows] == [
    ("full", 1.0),
    ("bis", 0.25),
    ("bis", 0.1),
    ("low_mc", 0.1),
  ]
  assert rows[2].by_seed == {0: 0.61, 1: 0.65}
  assert rows[2].mean == pytest.approx(0.63) and rows[0].deviation is None
  assert rows[2].deviation == pytest.approx(statistics.stdev([0.61, 0.65]))
  assert run_table.markdown(rows).splitlines() == [
    "| strategy | fraction | seed 0 | seed 1 | seed 3 | mean | deviation |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    "| full | 1 | 65.50 |  |  | 65.50 |  |",
    "| bis | 0.25 | 70.00 |  | 75.00 | 72.50 | 3.54 |",
    "| bis | 0.1 | 61.00 | 65.00 |  | 63.00 | 2.83 |",
    "| low_mc | 0.1 |  | 60.00 |  | 60.00 |  |",
  ]
  values = list(csv.DictReader(run_table.comma_separated(rows).splitlines()))
  assert float(values[1]["seed 3"]) == 0.75 and values[1]["seed 1"] == ""
  latex = run_table.latex(rows).splitlines()
  assert latex[0] == r"\begin{tabular}{lrrrrrr}" and latex[-1] == r"\end{tabular}"
  assert r"low\_mc & 0.1 &  & 60.00 &  & 60.00 &  \\" in latex


def test_the_command_writes_tables_figures_and_a_page(tmp_path, workdirs, report, browse):
  out = tmp_path / "report"
  run = report(*workdirs, f"--out={out}")
  assert run.returncode == 0, run.stderr
  assert "| bis | 0.1 | 61.00 | 65.00 |" in run.stdout
  assert "no page of items" in run.stdout
  assert sorted(path.name for path in out.iterdir()) == [
    "index.html",
    "overall_against_fraction.png",
    "overall_against_step.png",
    "table.csv",
    "table.md",
    "table.tex",
  ]
  dom, console = browse(out / "index.html")
  assert console == [] and dom.count("<figure>") == 2
  assert not re.search(r"""(?:src|href)="(?!data:image/png)""", dom)


def test_items_stand_under_every_run_that_kept_its_scores(tmp_path, workdirs, report, benchmark):
  items = visual_process_bench.load(benchmark)
  score_files.write_scores(
    pathlib.Path(workdirs[1]) / "scores.jsonl", [np.full(len(i.steps), 0.25) for i in items]
  )
  run = report(*workdirs[:2], f"--out={tmp_path / 'report'}", f"--benchmark={benchmark}")
  assert run.returncode == 0, run.stderr
  page = (tmp_path / "report/items.html").read_text(encoding="utf-8")
  data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
  assert data["runs"] == ["bis 10 %, seed 1"]
  assert len(data["items"]) == 10 and len(list((tmp_path / "report/items").iterdir())) == 13


@pytest.mark.parametrize("missing", ["config.json", "evaluation.json", "measure", "twin", "none"])
def test_an_unusable_workdir_ends_with_a_message(tmp_path, workdirs, report, missing):
  arguments, message = workdirs[:2], f"holds no {missing}"
  if missing.endswith(".json"):
    (pathlib.Path(workdirs[1]) / missing).unlink()
  elif missing == "measure":
    arguments, message = [*workdirs, "--measure=nonsense"], "has no tuned_on_test nonsense; it has"
  elif missing == "twin":
    arguments, message = [workdirs[0], workdirs[0]], "another workdir has bis 10 % with seed 0"
  else:
    arguments, message = [], "name at least one workdir"
  run = report(*arguments, f"--out={tmp_path / 'report'}")
  assert run.returncode == 1
  assert message in run.stderr
  assert not (tmp_path / "report").exists()
