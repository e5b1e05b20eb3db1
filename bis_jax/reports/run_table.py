"""Reads the results of runs, and tabulates them by strategy, fraction and seed."""

import collections
import csv
import dataclasses
import io
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from etils import epath

from bis_jax import files
from bis_jax.errors import UserError


class _Selection(msgspec.Struct):
  strategy: str
  fraction: float


class _Config(msgspec.Struct):
  selection: _Selection
  seed: int


class _Evaluation(msgspec.Struct):
  thresholds: dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Run:
  workdir: str
  strategy: str
  fraction: float
  seed: int
  value: float  # after training
  curve: tuple[tuple[int, float], ...]  # ((training step, value), ...) during training

  @property
  def group(self) -> str:
    return self.strategy if self.fraction == 1 else f"{self.strategy} {100 * self.fraction:g} %"


@dataclasses.dataclass(frozen=True)
class Row:
  """The runs of one strategy and fraction: {seed: value}."""

  strategy: str
  fraction: float
  by_seed: dict[int, float]

  @property
  def mean(self) -> float:
    return statistics.fmean(self.by_seed.values())

  @property
  def deviation(self) -> float | None:
    """Sample standard deviation (n - 1), None for a single seed."""
    return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None


def read_run(workdir: str, threshold: str, measure: str) -> Run:
  """Returns the run of a workdir from its config.json, evaluation.json and metrics.jsonl.

  Raises UserError if a file is missing, or the evaluation lacks the measure.
  """
  folder = epath.Path(workdir)
  for name, remedy in (("config.json", "name a run's workdir"), ("evaluation.json", "finish it")):
    if not (folder / name).exists():
      raise UserError(f"{workdir} holds no {name}: {remedy}")
  files.changed_files(folder, "config.json", "evaluation.json", "metrics.jsonl")
  config = files.read_json(folder / "config.json", "put it back", _Config)
  evaluation = folder / "evaluation.json"
  blocks = files.read_json(
    evaluation, "resume the run, which writes it again", _Evaluation
  ).thresholds
  value = blocks.get(threshold, {}).get(measure)
  if not isinstance(value, int | float):
    held = "; ".join(f"{name}: {', '.join(block)}" for name, block in blocks.items())
    raise UserError(f"{evaluation} has no {threshold} {measure}; it has {held}")
  lines = files.read_log(folder / "metrics.jsonl")
  key = f"evaluation/{threshold}/{measure}"
  return Run(
    workdir=str(workdir),
    strategy=config.selection.strategy,
    fraction=config.selection.fraction,
    seed=config.seed,
    value=value,
    curve=tuple(
      (line["step"], line[key])
      for line in lines
      if isinstance(line.get("step"), int) and isinstance(line.get(key), float)
    ),
  )


def rows_of(runs: Sequence[Run]) -> list[Row]:
  """Returns a row per strategy and fraction, larger fractions first, then by name.

  Raises UserError if two workdirs have the same strategy, fraction and seed.
  """
  groups: dict[tuple[float, str], dict[int, float]] = collections.defaultdict(dict)
  for run in runs:
    seeds = groups[-run.fraction, run.strategy]
    if run.seed in seeds:
      raise UserError(f"{run.workdir}: another workdir has {run.group} with seed {run.seed} too")
    seeds[run.seed] = run.value
  return [Row(strategy, -fraction, seeds) for (fraction, strategy), seeds in sorted(groups.items())]


def cells(
  rows: Sequence[Row], number: Callable[[float], str] = lambda value: f"{100 * value:.2f}"
) -> list[list[str]]:
  """Returns the table as text, headings first; measures x 100 by default, "" for none."""
  seeds = sorted({seed for row in rows for seed in row.by_seed})
  lines = [["strategy", "fraction", *(f"seed {seed}" for seed in seeds), "mean", "deviation"]]
  for row in rows:
    values = [*(row.by_seed.get(seed) for seed in seeds), row.mean, row.deviation]
    numbers = ["" if value is None else number(value) for value in values]
    lines.append([row.strategy, f"{row.fraction:g}", *numbers])
  return lines


def markdown(rows: Sequence[Row]) -> str:
  head, *body = cells(rows)
  marks = ["---", *["---:"] * (len(head) - 1)]
  return "".join("| " + " | ".join(line) + " |\n" for line in (head, marks, *body))


def comma_separated(rows: Sequence[Row]) -> str:
  """Returns the table as CSV, measures in [0, 1] with every digit."""
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows(cells(rows, repr))
  return text.getvalue()


def latex(rows: Sequence[Row]) -> str:
  r"""Returns the table as a LaTeX tabular that needs no package."""
  head, *body = (" & ".join(line).replace("_", r"\_") + " \\\\\n" for line in cells(rows))
  columns = "l" + "r" * (len(cells(rows)[0]) - 1)
  start = rf"\begin{{tabular}}{{{columns}}}" "\n\\hline\n"
  return start + head + "\\hline\n" + "".join(body) + "\\hline\n\\end{tabular}\n"
