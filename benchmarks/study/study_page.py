"""Writes the study's page, its numbers and its Markdown table from the workdirs."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.study import results, study_plots
from benchmarks.study.arms import FRESH, SECOND, SELECTIONS, WEAK_BACKBONE, Part
from bis_jax import files
from bis_jax.reports import page, plots
from bis_jax.reports.run_table import Row, Run

_WORDS = "overall_source_weighted x 100, tuned on test"
_CURVES = ("full", "random", "mixed", "bis")  # drawn over fractions, and tenths over steps
# Parts with arms of their own for random, BIS and the newer strategies.
_TENTHS = {
  "grid": "",
  FRESH: "with fresh seeds",
  SECOND: "on the second corpus",
  "weak": "from the weak backbone",
}
_AGAINST = {
  "random": "against its random",
  "bis": "against its BIS",
  "full": "against full",
  "recipe": "against recipe's",
}
_PAPER_GAIN = 0.041  # BIS over random at a tenth, relative (arXiv 2602.04145, abstract)
_LABELS = {"grid": "hard", "soft": "soft", "beta": "Beta-Binomial"}

Entry = Mapping[str, Any]


def write(folder: pathlib.Path, parts: Sequence[Part]) -> str:
  """Writes results.json, table.md, plots/*.png and index.html; returns the plain summary."""
  entries = results.read(folder, parts)
  if not entries:
    raise SystemExit(f"study: no arm in {folder} is done")
  compared = results.comparisons(entries)
  timings = folder / "timings.jsonl"
  content = {
    "arms": entries,
    "comparisons": compared,
    "timings": [line for _, line in files.read_jsonl(timings)] if timings.exists() else [],
  }
  (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
  (folder / "table.md").write_text(readme_table(entries), encoding="utf-8")
  words = "\n".join([*_backbones(folder), summary(entries, compared)])
  positions, caught = folder / "positions.json", folder / "caught.json"
  predicted = json.loads(positions.read_text()) if positions.exists() else {}
  main = [entry for entry in entries if entry["part"] in ("full", "grid")]
  page.write(
    folder / "index.html",
    "study.html",
    pathlib.Path(__file__).with_name("templates"),
    figures=_figures(entries, compared) | _mixed_figure(entries, predicted),
    plots=folder / "plots",
    title="Does a tenth do?",
    summary=words.splitlines(),
    cost=_cost(entries, content),
    grid=_arm_table(main, compared),
    ablations=_arm_table([entry for entry in entries if entry not in main], compared),
    measures=_measure_table(entries),
    positions=predicted and _positions_table(predicted),
    caught=caught.exists() and _caught_table(json.loads(caught.read_text())),
    has_theory=(folder / "theory" / "index.html").exists(),
  )
  return f"{words}\nsee {folder / 'index.html'}"


def _backbones(folder: pathlib.Path) -> list[str]:
  """Returns what the backbones reach on their own kinds, where this study trained them."""
  lines = []
  for name, place in (("The backbone", folder), ("The weak backbone", folder / WEAK_BACKBONE)):
    path = place / "settle" / "evaluation.json"
    if path.exists():
      threshold, measure = results.HEADLINE
      own = json.loads(path.read_text())["thresholds"][threshold][measure]
      lines.append(f"{name} reaches {100 * own:.1f} on its own kinds of question.")
  return lines


def _arm(entry: Entry) -> str:
  """Returns an arm's name."""
  return f"{_strategy(entry)} {_setting(entry)}"


def _strategy(entry: Entry) -> str:
  """Returns a strategy's name, without the module if it is one of the study's own."""
  return entry["strategy"].rpartition(":")[2]


def _setting(entry: Entry) -> str:
  return f"{100 * entry['fraction']:g} %" + (f", {entry['words']}" if entry["words"] else "")


def _value(by_seed: results.BySeed) -> str:
  mean, deviation = results.spread(by_seed)
  return f"{100 * mean:.2f}" + (f" ± {100 * deviation:.2f}" if deviation is not None else "")


def _relative(one: Entry) -> str:
  gain, interval = _gain(one)
  return f"{gain} ({interval})" if interval else gain


def _gain(one: Entry) -> tuple[str, str]:
  """Returns a relative difference and its interval, "" for one seed."""
  ends = one["relative_interval"]
  interval = "{:+.1f} to {:+.1f}".format(*(100 * end for end in ends)) if ends else ""
  return f"{100 * one['relative']:+.1f} %", interval


def _difference(compared: Sequence[Entry], entry: Entry, against: str) -> Entry | None:
  key = entry["part"], entry["strategy"], entry["fraction"], against
  return next(
    (c for c in compared if (c["part"], c["strategy"], c["fraction"], c["against"]) == key), None
  )


def summary(entries: Sequence[Entry], compared: Sequence[Entry]) -> str:
  """Returns the findings as text, one per line."""
  lines = []
  full = results.find(entries, "full", "full", 1.0)
  if full:
    lines.append(
      f"On {_WORDS}, training on all rollouts ({full['steps']:,} steps) reaches "
      f"{_value(results.headline(full))}."
    )
  for part, words in _TENTHS.items():
    bis, random = (results.find(entries, part, name, 0.1) for name in ("bis", "random"))
    if not bis or not random:
      continue
    gain, loss = (_difference(compared, bis, against) for against in ("random", "full"))
    lines.append(
      f"{f'BIS 10 % {words}'.rstrip()} ({bis['steps']:,} steps) reaches {_value(results.headline(bis))} and "
      f"random 10 % {_value(results.headline(random))}: a relative gain of {_relative(gain)} over "
      + (f"{gain['seeds']} paired seeds" if gain["seeds"] > 1 else "one seed")
      + (f"; against all, {_relative(loss)}" if loss else "")
      + "."
    )
    if own := results.find(entries, "full" if part == "grid" else part, "full", 1.0):
      lines[-1] += _on_the_way(own, bis["steps"])
    lines[-1] += _best_other(entries, compared, part)
  lines.append(
    f"In brackets 95 % intervals. The paper has {100 * _PAPER_GAIN:+.1f} % over random, and no loss "
    "against all."
  )
  lines += [_saturation(entries, compared), *_power(entries), *_labels(entries)]
  lines += _by_setting(entries, compared)
  return "\n".join(line for line in lines if line)


def _best_other(entries: Sequence[Entry], compared: Sequence[Entry], part: str) -> str:
  """Returns the highest mean of a part at a tenth besides random and BIS, "" without any."""
  others = [e for e in entries if e["part"] == part and e["fraction"] == 0.1]
  others = [e for e in others if e["strategy"] not in ("random", "bis")]
  if not others:
    return ""
  best = max(others, key=lambda entry: fmean(results.headline(entry).values()))
  gains = [
    f"{_relative(one)} against {name}"
    for name in ("random", "bis")
    if (one := _difference(compared, best, name))
  ]
  return f" Best of the others is {_strategy(best)}: {', '.join([_value(results.headline(best)), *gains])}."


def _saturation(entries: Sequence[Entry], compared: Sequence[Entry]) -> str:
  """Returns how far a random quarter is from all, and all from true labels."""
  quarter = results.find(entries, "grid", "random", 0.25)
  truth = results.find(entries, "truth", "full", 1.0)
  words = []
  if quarter and (one := _difference(compared, quarter, "full")):
    words.append(f"A random quarter is {_points(one)} points from all rollouts")
  if truth and (one := _difference(compared, truth, "recipe")):
    words.append(f"true labels of all rollouts add {_points(one)} points")
  return "; ".join(words) + "." if words else ""


def _points(one: Entry) -> str:
  words = f"{100 * one['difference']:+.2f}"
  if one["interval"]:
    words += " ({:+.2f} to {:+.2f})".format(*(100 * end for end in one["interval"]))
  return words


def _power(entries: Sequence[Entry]) -> list[str]:
  """Returns how many seeds it takes to see the paper's difference at a tenth."""
  lines = []
  for name in ("random", "bis"):
    arm = results.find(entries, "grid", name, 0.1)
    if arm and (seeds := results.seeds_needed(results.headline(arm), 0.04)):
      lines.append(
        f"With the deviation of {name} 10 %, {seeds} paired seeds show a relative difference of 4 % "
        "with a probability of 80 %."
      )
  return lines


def _labels(entries: Sequence[Entry]) -> list[str]:
  """Returns how much of the gap between hard and true labels the other labels close at a tenth."""
  lines = []
  for strategy in ("random", "bis"):
    parts = {"true": "truth", **{words: part for part, words in _LABELS.items()}}
    arms = {words: results.find(entries, part, strategy, 0.1) for words, part in parts.items()}
    values = {words: results.headline(arm) for words, arm in arms.items() if arm}
    seeds = set.intersection(*map(set, values.values())) if values else set()
    if not {"true", "hard"} <= values.keys() or not seeds:
      continue
    means = {words: fmean(by_seed[seed] for seed in seeds) for words, by_seed in values.items()}
    hard = means.pop("hard")
    gap = means.pop("true") - hard
    closed = [
      f"{words} {100 * (mean - hard):+.2f}"
      + (f" ({100 * (mean - hard) / gap:.0f} %)" if gap else "")
      for words, mean in means.items()
    ]
    lines.append(
      f"True labels add {100 * gap:+.2f} points to {strategy} 10 % with hard labels"
      + (f"; of this gap close: {', '.join(closed)}." if closed else ".")
    )
  return lines


def _on_the_way(entry: Entry, step: int) -> str:
  """Returns the mean of the learning curves of all rollouts at a step, "" if they begin later."""
  before = [[value for at, value in curve if at <= step] for curve in entry["curves"].values()]
  if not all(before):
    return ""
  at = max(at for curve in entry["curves"].values() for at, _ in curve if at <= step)
  mean = sum(values[-1] for values in before) / len(before)
  return f" All rollouts after {at:,} steps, on a part of the benchmark: {100 * mean:.1f}."


def _by_setting(entries: Sequence[Entry], compared: Sequence[Entry]) -> list[str]:
  """Returns in which settings BIS is above random, on average and beyond the seeds' noise."""
  against = _against_random(entries, compared)
  above = sum(one["difference"] > 0 for _, one in against)
  words = [f"The mean of BIS is above random's in {above} of {len(against)} settings."]
  return words + [_significant(against, sign) for sign in (1, 0, -1)]


def _against_random(
  entries: Sequence[Entry], compared: Sequence[Entry]
) -> list[tuple[Entry, Entry]]:
  """Returns the arms of BIS with their difference from random, if it has an interval."""
  found = [(e, _difference(compared, e, "random")) for e in entries if e["strategy"] == "bis"]
  return [(entry, one) for entry, one in found if one and one["relative_interval"]]


def _significant(against: Sequence[tuple[Entry, Entry]], sign: int) -> str:
  """Returns the settings with BIS significantly better (1) or worse (-1) than random, or neither (0)."""
  found = []
  for entry, one in against:
    low, high = one["relative_interval"]
    if (low > 0) - (high < 0) == sign:
      found.append(f"{_setting(entry)}: {_relative(one)}")
  if not found:
    return ""
  words = {
    1: "BIS is better than random beyond the seeds' noise at",
    0: "The seeds do not tell BIS from random at",
    -1: "BIS is worse than random beyond the seeds' noise at",
  }
  return f"{words[sign]} {'; '.join(found)}."


def _cost(entries: Sequence[Entry], content: Mapping[str, Any]) -> str:
  seconds = sum(line["seconds"] for line in content["timings"])
  runs = sum(len(results.headline(entry)) for entry in entries)
  words = f"{len(entries)} arms, {runs} runs"
  if seconds:
    words += f", {seconds / 3600:.1f} core hours with the backbone"
  return words + "."


def readme_table(entries: Sequence[Entry]) -> str:
  """Returns the Markdown table of strategies by fractions.

  Cells are empty if no seed has run, and name the number of seeds if some have not.
  """
  main = [entry for entry in entries if entry["part"] in ("full", *_TENTHS)]
  fractions = sorted({e["fraction"] for e in main if e["part"] == "grid"})
  columns = [("grid", fraction, f"{100 * fraction:g} %") for fraction in fractions]
  columns += [
    (part, 0.1, f"10 %, {_TENTHS[part]}")
    for part in _TENTHS
    if part != "grid" and any(entry["part"] == part for entry in main)
  ]
  columns.append(("full", 1.0, "all"))
  strategies = list(dict.fromkeys(e["strategy"] for e in main if e["strategy"] != "full"))
  most = max(len(results.headline(entry)) for entry in main)
  lines = ["| | " + " | ".join(words for _, _, words in columns) + " |"]
  lines.append("|---|" + "---|" * len(columns))
  for strategy in [*strategies, "full"]:
    found = [
      results.find(entries, part, strategy, fraction) or results.find(entries, part, strategy, 1.0)
      for part, fraction, _ in columns
    ]
    cells = [_cell(results.headline(entry), most) if entry else "" for entry in found]
    if any(cells):
      lines.append(f"| {strategy.rpartition(':')[2]} | " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def _cell(by_seed: results.BySeed, most: int) -> str:
  seeds = len(by_seed)
  return _value(by_seed) + (f" ({seeds} seed{'s' * (seeds > 1)})" if seeds < most else "")


def _arm_table(entries: Sequence[Entry], compared: Sequence[Entry]) -> page.Table:
  rows = []
  for entry in entries:
    others = [_difference(compared, entry, against) for against in _AGAINST]
    relative = [_gain(one) if one else "" for one in others]
    lost = [share for share in entry["errors_lost"].values() if share is not None]
    needed = f"{100 * fmean(lost):.0f} %" if lost else ""
    value = _value(results.headline(entry))
    rows.append([_arm(entry), f"{entry['steps']:,}", value, *relative, needed])
  head = [
    "arm",
    "steps",
    "overall x 100",
    *_AGAINST.values(),
    "lost with grey",
  ]
  used = [i for i in range(len(head)) if any(row[i] for row in rows)]
  return page.Table([head[i] for i in used], [[row[i] for i in used] for row in rows])


def _positions_table(predicted: Mapping[str, Sequence[float]]) -> page.Table:
  rows = [
    [name, f"{kept:,}", f"{100 * mixed:.1f} %", f"{100 * share:.1f} %"]
    for name, (kept, mixed, share) in predicted.items()
  ]
  return page.Table(["run", "rollouts kept", "mixed", "of the labels' entropy"], rows)


def _caught_table(caught: Sequence[Entry]) -> page.Table:
  shares = ("wrong_known", "wrong_new", "right_known", "right_new")
  rows = [
    [_arm(entry), *(f"{100 * entry[name]:.1f} %" for name in shares), f"{entry['not_learned']:.1f}"]
    for entry in caught
  ]
  words = [
    f"{which} notes rejected, {kinds} kinds"
    for which in ("wrong", "right")
    for kinds in ("known", "new")
  ]
  return page.Table(["arm", *words, "kinds not learned"], rows)


def _measure_table(entries: Sequence[Entry]) -> page.Table:
  rows = [
    [_arm(entry), threshold, *(_value(measures[name]) for name in results.MEASURES)]
    for entry in entries
    for threshold, measures in entry["values"].items()
  ]
  return page.Table(["arm", "threshold", *results.MEASURES], rows)


def _figures(entries: Sequence[Entry], compared: Sequence[Entry]) -> dict[str, bytes]:
  tenths = {
    _strategy(e): list(results.headline(e).values())
    for e in entries
    if (e["part"], e["fraction"]) in (("grid", 0.1), ("full", 1.0))
  }
  against = _against_random(entries, compared)
  gains = [(_setting(e), one["relative"], *one["relative_interval"]) for e, one in against]
  main = [entry for entry in entries if entry["part"] in ("full", "grid")]
  main = [entry for entry in main if entry["strategy"] in _CURVES]
  rows = [Row(_strategy(e), e["fraction"], dict(results.headline(e))) for e in main]
  figures = {}
  if rows:
    figures["overall_against_fraction"] = plots.against_fraction(rows, _WORDS)
  if tenths:
    figures["tenths_by_seed"] = study_plots.seeds(tenths, _WORDS)
  if gains:
    label = "BIS over random, relative, %"
    figures["gain_over_random"] = study_plots.gains(gains, label, marked=_PAPER_GAIN)
  if runs := _runs(entries):
    figures["overall_against_step"] = plots.against_step(runs, _WORDS)
  return figures


def _mixed_figure(
  entries: Sequence[Entry], predicted: Mapping[str, Sequence[float]]
) -> dict[str, bytes]:
  """Returns the figure of tenths over their share of mixed rollouts, by `predicted` of seed 0."""
  points = {}
  for entry in entries:
    found = predicted.get(f"{entry['part']}/{entry['strategy']}_0.1_seed0")
    if found and entry["fraction"] == 0.1 and entry["part"] in SELECTIONS:
      name = ", ".join(filter(None, (_strategy(entry), entry["words"])))
      points[name] = found[1], fmean(results.headline(entry).values())
  return {"overall_against_mixed": study_plots.against_mixed(points, _WORDS)} if points else {}


def _runs(entries: Sequence[Entry]) -> list[Run]:
  """Returns the learning curves of tenths and of training on all rollouts."""
  return [
    Run("", entry["strategy"], entry["fraction"], seed, 0.0, tuple(map(tuple, curve)))
    for entry in entries
    if (entry["part"], entry["fraction"]) in (("full", 1.0), ("grid", 0.1))
    if entry["strategy"] in _CURVES
    for seed, curve in entry["curves"].items()
  ]
