"""The closed forms and their simulation as numbers for theory.json."""

import numpy as np
from scipy import stats

from benchmarks.study import closed_forms, simulation
from benchmarks.study.simulation import Setting
from benchmarks.study.theory_on_model import ALPHA

# The rollouts of the curves: 8 steps, 16 continuations, as in the released corpus.
_STEPS, _N_MC, _PRIOR, _DISTANCE = 8, 16, 0.8, 2.0
_SKILL, _RECOVERY = (0.3, 0.6, 0.9, 0.97), (0.01, 0.03, 0.1, 0.2)


def compare(count: int = 50) -> dict:
  """Returns closed forms and simulation at `count` settings."""
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
  """Returns closed form and simulation of settings along a curve; `x` is the varied quantity."""
  return {
    "x": x,
    "closed_form": [
      {name: float(getattr(s.closed_form(), name)) for name in ("square", "signal", "snr")}
      for s in settings
    ],
    "simulation": [estimate._asdict() for estimate in simulation.simulate(settings)],
  }


def curves() -> dict:
  """Returns closed forms over mixture, flips and MC score, with simulated points."""
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
    flips = [closed_forms.flips(setting.table())[0] for setting in settings]
    over_flips[f"p = {share:g}"] = _line(settings, flips)
  flip_rates = {
    f"recovery {np.mean(rates):.3f}": closed_forms.flip_rate(_N_MC, _PRIOR, _SKILL, rates).tolist()
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
  flip = closed_forms.flip_rate(_N_MC, _PRIOR, _SKILL, _RECOVERY)
  grid_p, grid_flip = np.meshgrid(p, flip[counts])
  value = closed_forms.information(grid_p, _STEPS, grid_flip, flip[0], distance=_DISTANCE)
  snr = np.sign(1 - grid_flip - flip[0]) * np.sqrt(value)
  score = (grid_p * (1 - grid_p) + ALPHA) * (counts[:, None] / _N_MC)
  correlation = stats.spearmanr(snr.ravel(), score.ravel()).statistic
  return {
    "p": p.tolist(),
    "reliability": (counts / _N_MC).tolist(),
    "snr": snr.tolist(),
    "bis": score.tolist(),
    "alpha": ALPHA,
    "rank_correlation": float(correlation),
  }
