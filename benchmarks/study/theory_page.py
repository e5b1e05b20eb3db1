"""Writes the page of the theory: closed forms, their simulation, and measurements on a model.

All numbers in its sentences are from theory.json.
"""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.study import theory_plots
from bis_jax.reports import page

# Bins of p(1-p): pure rollouts alone, then mixed ones.
MIXTURE_EDGES = (1e-9, 0.17, 0.23)
_MEASURES = {
  "square": "|g|\N{SUPERSCRIPT TWO}",
  "aligned": "along the teacher",
  "contrast": "its contrast part",
}


def write(out: pathlib.Path, results: Mapping[str, Any]) -> None:
  """Writes index.html and plots/*.png into the folder; `results` is the content of theory.json."""
  curves, measured = results["curves"], results.get("measured")
  figures = {
    "deviations": theory_plots.deviations(results["simulation"]),
    "over_mixture": theory_plots.over_mixture(curves["over_mixture"]),
    "over_flips": theory_plots.over_flips(curves["over_flips"]),
    "flip_rates": theory_plots.flip_rates(curves["flip_rates"], measured and measured["flips"]),
    "surface": theory_plots.surface(curves["surface"]),
  }
  tables = {}
  if measured:
    figures |= {
      "by_tenth": theory_plots.measured_by_tenth(measured["students"]),
      "correlations": theory_plots.measured_correlations(measured["students"]),
      "by_mixture": theory_plots.measured_by_mixture(measured["students"]),
    }
    tables = {
      "Signal-to-noise by labels": _kind_table(measured),
      "Signal-to-noise of the highest tenth by each score": _selection_table(measured),
      "Rank correlations": _correlation_table(measured),
    }
  page.write(
    out / "index.html",
    "theory.html",
    pathlib.Path(__file__).with_name("templates"),
    figures=figures,
    plots=out / "plots",
    title="Theory",
    settings=results["simulation"]["settings"],
    rollout=curves["rollout"],
    simulation=simulation_words(results["simulation"]),
    rank_correlation=curves["surface"]["rank_correlation"],
    measured=measured and measured_words(measured),
    tables=tables,
  )


def simulation_words(simulation: Mapping) -> str:
  """Returns a sentence on the agreement of closed forms and simulation."""
  beyond, largest = simulation["beyond_3"], simulation["largest"]
  comparisons = simulation["settings"] * len(beyond)
  return (
    f"Of {comparisons} comparisons of closed form and simulation (squared gradient, component along "
    f"the teacher and its signal-to-noise at {simulation['settings']} settings), "
    f"{sum(beyond.values())} are more than 3 standard errors apart; the largest deviation is "
    f"{max(largest.values()):.2f} standard errors. Of that many right forms "
    f"{0.0027 * comparisons:.1f} would be expected beyond 3."
  )


def measured_words(measured: Mapping) -> str:
  """Returns the paragraph on the measured model."""
  students = measured["students"]
  count = len(students)

  def top(student: Mapping, name: str) -> float:
    return _snr(student["by_tenth"][name][9])

  def better(name: str) -> int:
    return sum(top(student, "BIS") > top(student, name) for student in students)

  above = sum(_above(student["by_tenth"]["BIS"][9], student["all"]) for student in students)
  kinds = [student["by_kind"] for student in students]
  halves = [student["mixed_by_half"] for student in students]
  return (
    f"{measured['rollouts']:,} rollouts were measured, {measured['mixed']:.1%} of them mixed, at "
    f"{count} students. The squared gradient {_tally(students, 'rank_correlations', 'square')}; of "
    f"mixed rollouts it is {_span(s['square_of_mixed_over_pure'] for s in students)} times that of "
    "pure ones, and the contrast between a rollout's own steps makes "
    f"{_span(100 * s['contrast_share_of_square'] for s in students)} % of it. The component along the "
    "teacher "
    f"{_tally(students, 'rank_correlations', 'aligned')}; among mixed rollouts alone it "
    f"{_tally(students, 'rank_correlations_among_mixed', 'aligned')}, and its contrast part "
    f"{_tally(students, 'rank_correlations_among_mixed', 'contrast')}. The signal-to-noise of one "
    f"rollout is {_span(_snr(s['all']) for s in students)} over all rollouts, "
    f"{_span(_snr(k['mixed']) for k in kinds)} for mixed ones, "
    f"{_span(_snr(k['all positive']) for k in kinds)} where every step is positive and "
    f"{_span(_snr(k['none positive']) for k in kinds)} where none is; among mixed ones it is higher "
    f"in the upper half by R at {_higher(halves, 'R')} of {count} students, by BIS at "
    f"{_higher(halves, 'BIS')}. The tenth with the highest BIS has "
    f"{_span(top(s, 'BIS') for s in students)}: clearly more than all rollouts at {above} of {count} "
    f"students, more than the highest tenth by p(1-p) at {better('p(1-p)')}, by R at {better('R')}, "
    f"by average_stepwise at {better('average_stepwise')}. {_composition_words(measured)}"
  )


def _composition_words(measured: Mapping) -> str:
  """Returns the kinds of rollouts in the highest tenth by BIS and in all."""
  highest, everyone = measured["highest_tenth"]["BIS"], measured["kinds"]
  parts = [f"{share:.0%} {kind} (of all {everyone[kind]:.0%})" for kind, share in highest.items()]
  return f"By labels that tenth is {', '.join(parts)}."


def _tally(students: Sequence[Mapping], table: str, measure: str) -> str:
  """Returns for how many students a measure grows or shrinks with each score, by its interval."""
  words = []
  for name in ("p(1-p)", "R", "BIS"):
    intervals = [student[table][measure][name]["interval"] for student in students]
    rises, falls = sum(low > 0 for low, _ in intervals), sum(high < 0 for _, high in intervals)
    words.append(f"rises with {name} at {rises} and falls at {falls}")
  return ", ".join(words)


def _span(values: Iterable[float]) -> str:
  values = list(values)
  return f"{min(values):.2f} to {max(values):.2f}"


def _higher(halves: Sequence[Mapping], name: str) -> int:
  return sum(_snr(half[name][1]) > _snr(half[name][0]) for half in halves)


def _snr(block: Mapping) -> float:
  return float("-inf") if block["snr"] is None else block["snr"]


def _above(block: Mapping, other: Mapping) -> bool:
  """Returns whether a block's signal-to-noise is above another's, intervals apart."""
  if block["snr"] is None or other["snr"] is None:
    return False
  return block["interval"][0] > other["interval"][1]


def _selection_table(measured: Mapping) -> page.Table:
  """Returns the table of signal-to-noise in the highest tenth by every predictor."""
  predictors = list(measured["students"][0]["by_tenth"])
  rows = []
  for student in measured["students"]:
    blocks = [student["all"], *(student["by_tenth"][name][9] for name in predictors)]
    rows.append([_about(student), *map(_block, blocks)])
  return page.Table(["student", "all (random)", *predictors], rows)


def _kind_table(measured: Mapping) -> page.Table:
  """Returns the table of signal-to-noise by labels: pure, mixed, and halves of the mixed."""
  kinds = list(measured["students"][0]["by_kind"])
  headings = [*kinds, "mixed, lower half by R", "upper", "lower half by BIS", "upper"]
  rows = []
  for student in measured["students"]:
    halves = [block for name in ("R", "BIS") for block in student["mixed_by_half"][name]]
    blocks = [*(student["by_kind"][kind] for kind in kinds), *halves]
    rows.append([_about(student), *map(_block, blocks)])
  return page.Table(["student", *headings], rows)


def _correlation_table(measured: Mapping) -> page.Table:
  """Returns the table of rank correlations over all rollouts and among mixed ones."""
  predictors = list(measured["students"][0]["by_tenth"])
  rows = []
  for student in measured["students"]:
    for table, among in (("rank_correlations", ""), ("rank_correlations_among_mixed", ", mixed")):
      for measure, words in _MEASURES.items():
        found = [student[table][measure][name] for name in predictors]
        cells = [
          (f"{one['value']:+.3f}", "{:+.3f} to {:+.3f}".format(*one["interval"])) for one in found
        ]
        rows.append([(student["name"], words + among), *cells])
  return page.Table(["student", *predictors], rows)


def _block(block: Mapping) -> tuple[str, str]:
  if block["snr"] is None:
    return "\N{EN DASH}", ""
  return f"{block['snr']:.3f}", "{:.3f} to {:.3f}".format(*block["interval"])


def _about(student: Mapping) -> tuple[str, str]:
  return student["name"], f"ROC-AUC of its answers {student['roc_auc']:.2f}"
