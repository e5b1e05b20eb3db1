"""Sets runs side by side: what each workdir measured, by strategy, fraction and seed."""

import collections
import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Sequence

from etils import epath


@dataclasses.dataclass(frozen=True)
class Run:
  """What one workdir says of its run.

  `value` is the measure after training, `curve` ((training step, measure), ...) while it trained,
  empty for a run that evaluated only at its end.
  """

  workdir: str
  strategy: str
  fraction: float
  seed: int
  value: float
  curve: tuple[tuple[int, float], ...]

  @property
  def group(self) -> str:
    """Words for strategy and fraction, the same for every seed."""
    return self.strategy if self.fraction == 1 else f"{self.strategy} {100 * self.fraction:g} %"


@dataclasses.dataclass(frozen=True)
class Row:
  """The runs of one strategy and fraction: {seed: value}, their mean, and sample deviation.

  `deviation` divides by n - 1 and is None for a single seed.
  """

  strategy: str
  fraction: float
  by_seed: dict[int, float]
  mean: float
  deviation: float | None


def read_run(workdir: str, threshold: str, measure: str) -> Run:
  """Returns the run of a workdir from its config.json, evaluation.json and metrics.jsonl.

  The curve takes the lines of metrics.jsonl that hold `evaluation/THRESHOLD/MEASURE`. Raises
  FileNotFoundError when the workdir has no config or no evaluation, ValueError when the evaluation
  lacks the measure.
  """
  folder = epath.Path(workdir)
  for name, remedy in (("config.json", "name a run's workdir"), ("evaluation.json", "finish it")):
    if not (folder / name).exists():
      raise FileNotFoundError(f"{workdir} holds no {name}: {remedy}")
  config = json.loads((folder / "config.json").read_text())
  blocks = json.loads((folder / "evaluation.json").read_text())["thresholds"]
  if blocks.get(threshold, {}).get(measure) is None:
    held = "; ".join(f"{name}: {', '.join(block)}" for name, block in blocks.items())
    raise ValueError(f"{workdir}/evaluation.json has no {threshold} {measure}; it has {held}")
  metrics = folder / "metrics.jsonl"
  lines = [json.loads(s) for s in metrics.read_text().splitlines()] if metrics.exists() else []
  key = f"evaluation/{threshold}/{measure}"
  return Run(
    workdir=str(workdir),
    strategy=config["selection"]["strategy"],
    fraction=float(config["selection"]["fraction"]),
    seed=int(config["seed"]),
    value=blocks[threshold][measure],
    curve=tuple((line["step"], line[key]) for line in lines if key in line),
  )


def rows_of(runs: Sequence[Run]) -> list[Row]:
  """Returns a row for each strategy and fraction, larger fractions first, then by name.

  Raises ValueError when two workdirs are of the same strategy, fraction and seed.
  """
  groups = collections.defaultdict(dict)
  for run in runs:
    seeds = groups[run.strategy, run.fraction]
    if run.seed in seeds:
      raise ValueError(f"{run.workdir}: another workdir has {run.group} with seed {run.seed} too")
    seeds[run.seed] = run.value
  rows = []
  for (strategy, fraction), seeds in sorted(groups.items(), key=lambda g: (-g[0][1], g[0][0])):
    values = list(seeds.values())
    deviation = statistics.stdev(values) if len(values) > 1 else None
    rows.append(Row(strategy, fraction, seeds, statistics.fmean(values), deviation))
  return rows


def cells(rows: Sequence[Row]) -> list[list[str]]:
  """Returns the table as text, headings first; measures x 100 with two decimals, "" for none."""
  return _cells(rows, lambda value: f"{100 * value:.2f}")


def markdown(rows: Sequence[Row]) -> str:
  """Returns `cells` as a Markdown table."""
  head, *body = cells(rows)
  marks = ["---", *["---:"] * (len(head) - 1)]
  return "".join("| " + " | ".join(line) + " |\n" for line in (head, marks, *body))


def comma_separated(rows: Sequence[Row]) -> str:
  """Returns the table as CSV, measures in [0, 1] with every digit."""
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows(_cells(rows, repr))
  return text.getvalue()


def latex(rows: Sequence[Row]) -> str:
  r"""Returns `cells` as a LaTeX tabular, with \hline and no package."""
  head, *body = (" & ".join(line).replace("_", r"\_") + r" \\" for line in cells(rows))
  columns = "l" + "r" * (len(cells(rows)[0]) - 1)
  return "\n".join(
    [
      rf"\begin{{tabular}}{{{columns}}}",
      r"\hline",
      head,
      r"\hline",
      *body,
      r"\hline",
      r"\end{tabular}",
      "",
    ]
  )


def _cells(rows: Sequence[Row], number) -> list[list[str]]:
  seeds = sorted({seed for row in rows for seed in row.by_seed})
  lines = [["strategy", "fraction", *(f"seed {seed}" for seed in seeds), "mean", "deviation"]]
  for row in rows:
    values = [*(row.by_seed.get(seed) for seed in seeds), row.mean, row.deviation]
    numbers = ["" if value is None else number(value) for value in values]
    lines.append([row.strategy, f"{row.fraction:g}", *numbers])
  return lines
