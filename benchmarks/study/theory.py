"""Why BIS should work: closed forms against simulation, and the same signal on a real model.

  python -m benchmarks.study.theory --out=runs/theory [--workdir=RUN,RUN,...]

writes OUT/theory.json (every number), OUT/index.html and OUT/plots/*.png. Alone it compares
`bis_jax.theory` with its simulation, in seconds. With runs on the embedded corpus it measures, for
rollouts that none of them trained on, the reward head's gradient of each under its MC labels, and
how it lies to the gradient under the true labels. The first run should be what a selection meets
before training, and all should start from one backbone and see rollouts that BIS did not choose:

  for steps in 1 100 0; do python -m bis_jax.main --config=configs/qwen_random10.py:toy \\
    --workdir=runs/random10_$steps --config.train.steps=$steps; done   # 0: to the end
  # the first with --config.optim.learning_rate=1e-9: a student that is saved but has not moved

Last result (the runs above on the default corpus; 2.6 minutes of processor time):

  closed forms against simulation, 50 settings x 3   none beyond 3 standard errors, largest 2.28
  signal-to-noise of one rollout along the teacher:

  | student | all | mixed | all positive | none positive | top tenth by BIS | by p(1-p) | by R |
  |---|---|---|---|---|---|---|---|
  | before the first step | 0.03 | 0.42 | 0.02 | 0.09 | -0.06 | 0.13 | -0.35 |
  | the prior alone, same states | 0.12 | 0.62 | 0.12 | -0.46 | 0.26 | 0.47 | -0.12 |
  | step 100 | 0.06 | 0.37 | 0.25 | -0.75 | 0.00 | 0.30 | -0.22 |
  | step 945, the end | 0.10 | 0.74 | -0.35 | 0.34 | 0.51 | 0.55 | 0.13 |

Mixed rollouts (7 %) carry the signal, as the theory says. Reliability does not show here: labels of
this corpus are wrong at MC scores of 1/4 and less and hardly anywhere else (143 of 22,171 positive
steps), and ranking by R, with 1 for rollouts without a positive step, brings in 15 % of those.
"""

import json
import pathlib
import sys

import numpy as np
from absl import app, flags
from scipy import stats

from benchmarks.study import theory_on_model
from bis_jax import theory
from bis_jax import theory_simulation as simulation
from bis_jax.evaluation import theory_page
from bis_jax.theory_simulation import Setting
from bis_jax.workdir import WorkdirError

_OUT = flags.DEFINE_string("out", "runs/theory", "folder to write into")
_WORKDIR = flags.DEFINE_list(
  "workdir", [], "runs on one embedded corpus, the earliest student first"
)
_ROLLOUTS = flags.DEFINE_integer(
  "rollouts", 10_000, "measured; half as many more give the direction"
)
_DRAWS = flags.DEFINE_integer("draws", 200, "of the bootstrap", lower_bound=20)

# The rollouts of the curves: 8 steps, 16 continuations, as in the released corpus.
_STEPS, _N_MC, _PRIOR, _DISTANCE = 8, 16, 0.8, 2.0
_SKILL, _RECOVERY = (0.3, 0.6, 0.9, 0.97), (0.01, 0.03, 0.1, 0.2)


def compare(count: int = 50) -> dict:
  """Returns the closed forms beside the simulation at `count` settings."""
  settings = simulation.varied_settings(count)
  estimates = simulation.simulate(settings)
  deviations = simulation.deviations(settings, estimates)
  return {
    "settings": count,
    "beyond_3": {name: int((np.abs(z) > 3).sum()) for name, z in deviations.items()},
    "largest": {name: float(np.abs(z).max()) for name, z in deviations.items()},
    "sum_of_squares": {name: float((z**2).sum()) for name, z in deviations.items()},
    "table": [
      {
        "setting": setting._asdict(),
        "closed_form": {
          name: float(getattr(setting.closed_form(), name)) for name in ("square", "signal", "snr")
        },
        "simulation": estimate._asdict(),
        "z": {name: float(z[i]) for name, z in deviations.items()},
      }
      for i, (setting, estimate) in enumerate(zip(settings, estimates, strict=True))
    ],
  }


def _setting(positives: int, share: float, recovery=_RECOVERY, prior: float = _PRIOR) -> Setting:
  return Setting(
    steps=_STEPS,
    positives=positives,
    by_truth=False,
    n_mc=_N_MC,
    prior=prior,
    skill=_SKILL,
    recovery=tuple(recovery),
    bias=float(np.log(share / (1 - share))),
    scale=0.0,
    centre=prior,
    distance=_DISTANCE,
    offset=1.0,
  )


def _line(settings: list[Setting], x: list[float]) -> dict:
  """Returns closed form and simulation of settings along a curve; `x` is what they differ in."""
  return {
    "x": x,
    "closed_form": [
      {name: float(getattr(s.closed_form(), name)) for name in ("square", "signal", "snr")}
      for s in settings
    ],
    "simulation": [estimate._asdict() for estimate in simulation.simulate(settings)],
  }


def curves() -> dict:
  """Returns what the theory says over mixture, flips and MC score, with simulated points."""
  mixed = range(1, _STEPS)
  students = {
    "the rollout's own p": [_setting(k, k / _STEPS) for k in mixed],
    "1/2 (undecided)": [_setting(k, 0.5) for k in range(_STEPS + 1)],
    f"{_PRIOR:g} (the corpus's prior)": [_setting(k, _PRIOR) for k in range(_STEPS + 1)],
  }
  over_mixture = {
    name: _line(settings, [s.positives / _STEPS for s in settings])
    for name, settings in students.items()
  }
  over_flips = {}
  for share in (0.25, 0.5, 0.75):
    positives = int(share * _STEPS)
    recoveries = [
      [factor * rate for rate in _RECOVERY] for factor in (0.0, 0.2, 0.5, 1.0, 2.0, 4.5)
    ]
    settings = [_setting(positives, share, rates, prior=0.5) for rates in recoveries]
    flips = [theory.flips(setting.table())[0] for setting in settings]
    over_flips[f"p = {share:g}"] = _line(settings, flips)
  flip_rates = {
    f"recovery {np.mean(rates):.3f}": theory.flip_rate(_N_MC, _PRIOR, _SKILL, rates).tolist()
    for rates in ([factor * rate for rate in _RECOVERY] for factor in (0.2, 1.0, 1.5))
  }
  return {
    "rollout": {"steps": _STEPS, "n_mc": _N_MC, "prior": _PRIOR, "distance": _DISTANCE}
    | {"skill": _SKILL, "recovery": _RECOVERY, "width": simulation.WIDTH},
    "over_mixture": over_mixture,
    "over_flips": over_flips,
    "flip_rates": flip_rates,
    "surface": surface(),
  }


def surface() -> dict:
  """Returns signal-to-noise (student at p) and BIS over p and R, all positives with MC score R."""
  counts = np.arange(1, _N_MC + 1)
  p = np.linspace(0, 1, 33)
  flip = theory.flip_rate(_N_MC, _PRIOR, _SKILL, _RECOVERY)
  grid_p, grid_flip = np.meshgrid(p, flip[counts])
  value = theory.information(grid_p, _STEPS, grid_flip, flip[0], distance=_DISTANCE)
  snr = np.sign(1 - grid_flip - flip[0]) * np.sqrt(value)
  score = (grid_p * (1 - grid_p) + theory_on_model.ALPHA) * (counts[:, None] / _N_MC)
  correlation = stats.spearmanr(snr.ravel(), score.ravel()).statistic
  return {
    "p": p.tolist(),
    "reliability": (counts / _N_MC).tolist(),
    "snr": snr.tolist(),
    "bis": score.tolist(),
    "alpha": theory_on_model.ALPHA,
    "rank_correlation": float(correlation),
  }


def main(argv: list[str]) -> None:
  """Writes theory.json, the plots and the page."""
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  results = {"simulation": compare(), "curves": curves()}
  if _WORKDIR.value:
    try:
      results["measured"] = theory_on_model.measure(_WORKDIR.value, _ROLLOUTS.value, _DRAWS.value)
    except (WorkdirError, OSError) as error:
      sys.exit(f"theory: {error}")
  (out / "theory.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
  theory_page.write(out, results)
  print(theory_page.simulation_words(results["simulation"]))
  if "measured" in results:
    print(theory_page.measured_words(results["measured"]))
  print(f"wrote {out / 'index.html'}")


if __name__ == "__main__":
  app.run(main)
