"""Reads the study's workdirs: every measure of every arm, and paired differences of arms."""

import itertools
import json
import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.study import arms
from benchmarks.study.arms import Part
from bis_jax.reports import run_table

# Four measures called "overall" in the literature, ROC-AUC, and that of first errors.
MEASURES = (
  "overall_source_weighted",
  "macro_f1_pooled",
  "macro_f1_source_mean",
  "accuracy",
  "roc_auc",
  "first_error_f1",
)
THRESHOLDS = ("tuned_on_test", "tuned_on_dev", "fixed_0.5")
HEADLINE = ("tuned_on_test", "overall_source_weighted")  # as in the paper's tables

BySeed = Mapping[int, float]
_WITH_FULL = {part.name for part in (*arms.CONFIRM, *arms.WEAK) if "full" in part.strategies}


def read(folder: pathlib.Path, parts: Sequence[Part]) -> list[dict[str, Any]]:
  """Returns an entry per arm of `parts` that has a finished seed, in their order.

  {"part", "words", "like", "strategy", "fraction", "steps",
  "values": {threshold: {measure: {seed: value}}}, "curves": {seed: [[step, headline measure], ...]},
  "errors_lost": {seed: share}}: with grey images, at the threshold tuned on test. Thresholds that an
  arm lacks are absent.
  """
  return [arm | _of_seeds(workdirs) for arm, workdirs in finished(folder, parts)]


def finished(
  folder: pathlib.Path, parts: Sequence[Part]
) -> Iterator[tuple[dict[str, Any], list[pathlib.Path]]]:
  """Yields {"part", "words", "like", "strategy", "fraction"} of every arm, and its finished runs."""
  for part in parts:
    for strategy, fraction in itertools.product(part.strategies, part.fractions):
      pattern = f"{strategy}_{fraction:g}_seed*/evaluation.json"
      workdirs = [path.parent for path in sorted((folder / part.name).glob(pattern))]
      if workdirs:
        arm = {"part": part.name, "words": part.words, "like": part.like}
        yield arm | {"strategy": strategy, "fraction": fraction}, workdirs


def _of_seeds(workdirs: Sequence[pathlib.Path]) -> dict[str, Any]:
  values: dict = {}
  curves, steps, lost = {}, [], {}
  for workdir in workdirs:
    run = run_table.read_run(str(workdir), *HEADLINE)
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    blocks = evaluation["thresholds"]
    if blank := evaluation.get("blank_images"):
      lost[run.seed] = blank[HEADLINE[0]]["errors_lost"]
    for threshold in THRESHOLDS:
      for measure in MEASURES if threshold in blocks else ():
        by_seed = values.setdefault(threshold, {}).setdefault(measure, {})
        by_seed[run.seed] = blocks[threshold][measure]
    curves[run.seed] = [list(point) for point in run.curve]
    last = (workdir / "metrics.jsonl").read_text().splitlines()[-1]
    steps.append(json.loads(last)["step"])
  steps = round(statistics.fmean(steps))
  return {"steps": steps, "values": values, "curves": curves, "errors_lost": lost}


def headline(entry: Mapping[str, Any]) -> BySeed:
  """Returns {seed: `overall_source_weighted`, tuned on test} of an arm."""
  threshold, measure = HEADLINE
  return entry["values"][threshold][measure]


def find(
  entries: Sequence[Mapping[str, Any]], part: str, strategy: str, fraction: float
) -> Mapping[str, Any] | None:
  """Returns the entry of an arm, or None if it has not run."""
  arm = part, strategy, fraction
  return next((e for e in entries if (e["part"], e["strategy"], e["fraction"]) == arm), None)


def spread(by_seed: BySeed) -> tuple[float, float | None]:
  """Returns mean and sample deviation over seeds; None for one seed."""
  values = list(by_seed.values())
  return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired(ours: BySeed, theirs: BySeed) -> dict[str, Any] | None:
  """Returns the difference of `ours` and `theirs` over the seeds that both have; None without one.

  {"seeds", "difference", "interval", "relative", "relative_interval"}: means over seeds of the
  difference and of the ratio minus 1, with Student's 95 % intervals of paired samples, None for one
  seed.
  """
  seeds = sorted(set(ours) & set(theirs))
  if not seeds:
    return None
  a, b = (np.array([one[seed] for seed in seeds]) for one in (ours, theirs))
  difference, relative = a - b, a / b - 1
  return {
    "seeds": len(seeds),
    "difference": float(difference.mean()),
    "interval": _interval(difference),
    "relative": float(relative.mean()),
    "relative_interval": _interval(relative),
  }


def _interval(values: np.ndarray) -> list[float] | None:
  if len(values) < 2:
    return None
  reach = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
  return [float(values.mean() - reach), float(values.mean() + reach)]


def seeds_needed(by_seed: BySeed, relative: float, power: float = 0.8) -> int | None:
  """Returns how many seeds show a relative difference of two arms with probability `power`.

  By Student's test of paired samples at 5 %, if both arms differ over seeds as `by_seed` does and
  independently; None for one seed.
  """
  mean, deviation = spread(by_seed)
  if not deviation:
    return None
  effect = relative * mean / (2**0.5 * deviation)
  return next(
    n
    for n in itertools.count(2)
    if stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, effect * n**0.5) >= power
  )


def comparisons(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Returns the paired differences of arms: entries of {"arm", "against", ...as `paired`}.

  Every arm against `random` and `bis` of its own fraction and against `full` in one pass, and every
  ablation also against the same strategy in the unmodified part ("recipe"). `random`, `bis` and `full`
  are those of its own part if it has them, else of the part that it is like, else the study's, but a
  part that is to have its own `full` waits for it.
  """
  compared = []
  for entry in entries:
    part, strategy, fraction = entry["part"], entry["strategy"], entry["fraction"]
    places = [part] if part in _WITH_FULL else [part, entry["like"], "full"]
    places = ["full"] if strategy == "full" else places
    others = {
      "full": _first(entries, places, "full", 1.0),
      "recipe": find(entries, entry["like"], strategy, fraction),
      # An ablation of the selection alone has none of its own: the selection does not affect it.
      "random": _first(entries, [part, entry["like"]], "random", fraction),
      "bis": _first(entries, [part, entry["like"]], "bis", fraction),
    }
    for against, other in others.items():
      if other is None or other is entry:
        continue
      difference = paired(headline(entry), headline(other))
      if difference:
        arm = {"part": part, "strategy": strategy, "fraction": fraction}
        compared.append(arm | {"against": against} | difference)
  return compared


def _first(
  entries: Sequence[Mapping[str, Any]], parts: Sequence[str], strategy: str, fraction: float
) -> Mapping[str, Any] | None:
  """Returns the entry of an arm in the first part that has it, or None."""
  found = (find(entries, part, strategy, fraction) for part in parts)
  return next((entry for entry in found if entry), None)
