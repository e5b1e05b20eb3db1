"""Writes the page of the theory: closed forms, their simulation, and what a real model showed.

Every sentence with a number in it is made from theory.json.
"""

import html
import pathlib
from collections.abc import Mapping

from bis_jax.evaluation import page_style, theory_plots

# Between the bins of p(1-p): pure rollouts alone, then four of mixed ones.
MIXTURE_EDGES = (1e-9, 0.12, 0.17, 0.21)
_MEASURES = {
  "square": "|g|\N{SUPERSCRIPT TWO}",
  "aligned": "along the teacher",
  "contrast": "its contrast part",
}


def write(out: pathlib.Path, results: Mapping) -> None:
  """Writes index.html and plots/*.png into the folder; `results` is the content of theory.json."""
  figures = _figures(results)
  (out / "plots").mkdir(parents=True, exist_ok=True)
  for name, (png, _) in figures.items():
    (out / "plots" / f"{name}.png").write_bytes(png)
  body = [
    "<h1>Why a balanced, reliable rollout should teach more</h1>",
    f"<p>{html.escape(simulation_words(results['simulation']))}</p>",
    _FORMS,
    _shown(figures, "over_mixture"),
    _shown(figures, "over_flips", "deviations"),
    "<h2>MC scores, flips and BIS</h2>",
    f"<p>{html.escape(_surface_words(results['curves']['surface']))}</p>",
    _shown(figures, "flip_rates", "surface"),
  ]
  if measured := results.get("measured"):
    body += [
      "<h2>Measured on a model: the reward head's gradient, rollout by rollout</h2>",
      f'<p class="quiet">{html.escape(_METHOD)}</p>',
      f"<p>{html.escape(measured_words(measured))}</p>",
      *(_shown(figures, name) for name in ("by_tenth", "correlations", "by_mixture")),
      _selection_table(measured),
      _correlation_table(measured),
    ]
  page = page_style.document("Theory", "\n".join(body))
  (out / "index.html").write_text(page, encoding="utf-8")


_FORMS = """<h2>The closed forms</h2>
<p>Steps with Gaussian features around their truth, at distance &delta; along the teacher, labels
that are wrong with rates f<sub>+</sub> (positives) and f<sub>&minus;</sub> (negatives), a student
that gives every step the probability s, a rollout of n steps of which a share p is labelled
positive and &zeta; is expected to be right, features centred at c. Exactly:</p>
<div class="card"><p>component along the teacher = &delta; (p &minus; s)(&zeta; &minus; c) +
&delta; p(1 &minus; p)(1 &minus; f<sub>+</sub> &minus; f<sub>&minus;</sub>)</p>
<p>and at s = p, with V = (1 &minus; p) f<sub>+</sub>(1 &minus; f<sub>+</sub>) +
p f<sub>&minus;</sub>(1 &minus; f<sub>&minus;</sub>), its variance = p(1 &minus; p)(1 +
&delta;<sup>2</sup>V)/n, and E |g|<sup>2</sup> = p(1 &minus; p)(d + &delta;<sup>2</sup>V)/n +
component<sup>2</sup>.</p></div>
<p>The first term compares the rollout with what the student expects of any (the prior); the second
is the contrast between its own steps, of which a pure rollout has none. Derivations and
assumptions: <code>bis_jax/theory.py</code>.</p>"""

_METHOD = (
  "g is the gradient of a rollout's mean loss in the reward head, under its noisy MC labels, for "
  "rollouts that no run trained on. The teacher is the direction along which the loss under the true "
  "labels falls fastest, at the same student, taken from other rollouts about other pictures. The "
  "contrast part is what is left of g when every step's residual is taken relative to the rollout's "
  "mean. Intervals of 95 % are from a bootstrap over pictures."
)


def _shown(figures: Mapping[str, tuple[bytes, str]], *names: str) -> str:
  shown = "".join(page_style.figure(*figures[name]) for name in names)
  return f'<div class="figures">{shown}</div>'


def _figures(results: Mapping) -> dict[str, tuple[bytes, str]]:
  curves, measured = results["curves"], results.get("measured")
  rollout = curves["rollout"]
  about = (
    f"{rollout['steps']} steps, N = {rollout['n_mc']}, distance {rollout['distance']:g}, offset 1. Lines: closed forms; points: simulation, bars 3 "
    "standard errors."
  )
  figures = {
    "deviations": (
      theory_plots.deviations(results["simulation"]),
      f"Simulation against closed form at {results['simulation']['settings']} varied settings.",
    ),
    "over_mixture": (
      theory_plots.over_mixture(curves["over_mixture"]),
      f"Over the mixture, for three students; {rollout['prior']:.0%} of all steps are right. {about}",
    ),
    "over_flips": (
      theory_plots.over_flips(curves["over_flips"]),
      f"Over the share of pseudo-positives, for a student at p; half of all steps are right. {about}",
    ),
    "flip_rates": (
      theory_plots.flip_rates(curves["flip_rates"], measured and measured["flips"]),
      "Pseudo-positives are the positives with low MC scores.",
    ),
    "surface": (
      theory_plots.surface(curves["surface"]),
      "Exact signal-to-noise of a rollout whose positives all have MC score R, student at p, beside "
      "BIS.",
    ),
  }
  if measured:
    students = measured["students"]
    figures |= {
      "by_tenth": (
        theory_plots.measured_by_tenth(students),
        "Signal-to-noise of single rollouts, by tenths; ties fall into tenths at random.",
      ),
      "correlations": (
        theory_plots.measured_correlations(students),
        "What goes with the gradient's size and with its component along the teacher. Closed form: "
        "the contrast's signal with the corpus's true flip rates.",
      ),
      "by_mixture": (
        theory_plots.measured_by_mixture(students),
        "Size of the gradient over the mixture. The theory's student at s = p has the dashed line.",
      ),
    }
  return figures


def simulation_words(simulation: Mapping) -> str:
  """Returns a sentence on how closed forms and simulation agree."""
  beyond, largest = simulation["beyond_3"], simulation["largest"]
  comparisons = simulation["settings"] * len(beyond)
  return (
    f"Of {comparisons} comparisons of closed form and simulation (squared gradient, component along "
    f"the teacher and its signal-to-noise at {simulation['settings']} settings), "
    f"{sum(beyond.values())} are more than 3 standard errors apart; the largest deviation is "
    f"{max(largest.values()):.2f} standard errors. Of that many right forms "
    f"{0.0027 * comparisons:.1f} would be expected beyond 3."
  )


def _surface_words(surface: Mapping) -> str:
  return (
    "BIS is the signal itself where MC scores are calibrated probabilities, no right step is missed "
    "and alpha is 0. Elsewhere it departs from the exact signal-to-noise: it knows nothing of n, "
    "grows in proportion to R where flips vanish after a few successes, and keeps pure rollouts by "
    f"alpha. Over the plane below the rank correlation of the two is "
    f"{surface['rank_correlation']:.2f}."
  )


def measured_words(measured: Mapping) -> str:
  """Returns the paragraph on the real model, made from the numbers alone."""
  sentences = [
    f"{measured['rollouts']:,} rollouts were measured, {measured['mixed']:.0%} of them mixed."
  ]
  for student in measured["students"]:
    correlations = student["rank_correlations"]
    square = ", ".join(
      f"{name} {_value(correlations['square'][name])}" for name in ("p(1-p)", "R", "BIS")
    )
    aligned = ", ".join(
      f"{name} {_value(correlations['aligned'][name])}" for name in ("p(1-p)", "R", "BIS")
    )
    tenths, everyone = student["by_tenth"], student["all"]
    best = max(tenths, key=lambda name: _snr(tenths[name][9]))
    sentences.append(
      f"Student {student['name']}: |g|^2 ranks with {square}; the component along the teacher with "
      f"{aligned}. Signal-to-noise of a rollout: all {_snr(everyone):.2f}, lowest tenth by BIS "
      f"{_snr(tenths['BIS'][0]):.2f}, highest {_snr(tenths['BIS'][9]):.2f} "
      f"({_compared(tenths['BIS'][9], everyone)}), highest by p(1-p) "
      f"{_snr(tenths['p(1-p)'][9]):.2f} and by R {_snr(tenths['R'][9]):.2f}; best of the highest "
      f"tenths: that by {best}. The contrast between steps makes "
      f"{student['contrast_share_of_square']:.0%} of |g|^2. Label noise leaves "
      f"{student['shrinkage']:.0%} of the component that true labels give."
    )
  return " ".join(sentences)


def _snr(block: Mapping) -> float:
  return float("-inf") if block["snr"] is None else block["snr"]


def _value(found: Mapping) -> str:
  low, high = found["interval"]
  return f"{found['value']:+.2f} [{low:+.2f}, {high:+.2f}]"


def _compared(block: Mapping, other: Mapping) -> str:
  """Returns whether a block's signal-to-noise is above another's: their intervals decide."""
  if block["snr"] is None or other["snr"] is None:
    return "without an interval"
  if block["interval"][0] > other["interval"][1]:
    return "more than all rollouts"
  if block["interval"][1] < other["interval"][0]:
    return "less than all rollouts"
  return "not told apart from all rollouts"


def _selection_table(measured: Mapping) -> str:
  """Returns the table of signal-to-noise in the highest tenth by every predictor."""
  predictors = list(measured["students"][0]["by_tenth"])
  rows = []
  for student in measured["students"]:
    blocks = [student["all"], *(student["by_tenth"][name][9] for name in predictors)]
    cells = "".join(f"<td>{_block(block)}</td>" for block in blocks)
    rows.append(f"<tr><td>{html.escape(student['name'])}</td>{cells}</tr>")
  heading = "<h2>Signal-to-noise of the tenth that each would keep</h2>"
  return heading + page_style.table(["student", "all (random)", *predictors], rows)


def _block(block: Mapping) -> str:
  if block["snr"] is None:
    return "\N{EN DASH}"
  low, high = block["interval"]
  return f"{block['snr']:.3f}<small>{low:.3f} to {high:.3f}</small>"


def _correlation_table(measured: Mapping) -> str:
  predictors = list(measured["students"][0]["by_tenth"])
  rows = []
  for student in measured["students"]:
    for measure, words in _MEASURES.items():
      found = student["rank_correlations"][measure]
      cells = "".join(
        f"<td>{found[name]['value']:+.3f}<small>{found[name]['interval'][0]:+.3f} to "
        f"{found[name]['interval'][1]:+.3f}</small></td>"
        for name in predictors
      )
      rows.append(f"<tr><td>{html.escape(student['name'])}<small>{words}</small></td>{cells}</tr>")
  return "<h2>Rank correlations</h2>" + page_style.table(["student", *predictors], rows)
