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
"""

import json
import pathlib
import sys

import numpy as np
from absl import app, flags
from scipy import stats

from bis_jax import head_gradients, locations, restored, theory
from bis_jax import theory_simulation as simulation
from bis_jax.corpus.corpus import Corpus
from bis_jax.evaluation import signal_statistics, theory_page
from bis_jax.examples import RolloutExamples
from bis_jax.head_gradients import Steps
from bis_jax.selection import bis
from bis_jax.selection.manifest import Manifest
from bis_jax.theory_simulation import Setting
from bis_jax.workdir import WorkdirError

_OUT = flags.DEFINE_string("out", "runs/theory", "folder to write into")
_WORKDIR = flags.DEFINE_list(
  "workdir", [], "runs on one embedded corpus, the earliest student first"
)
_ROLLOUTS = flags.DEFINE_integer("rollouts", 8000, "measured; half as many more give the direction")
_DRAWS = flags.DEFINE_integer("draws", 200, "of the bootstrap", lower_bound=20)

# The rollouts of the curves: 8 steps, 16 continuations, as in the released corpus.
_STEPS, _N_MC, _PRIOR, _DISTANCE = 8, 16, 0.8, 2.0
_SKILL, _RECOVERY = (0.3, 0.6, 0.9, 0.97), (0.01, 0.03, 0.1, 0.2)
_ALPHA = 0.2  # of BIS, as for a tenth of the corpus


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
    "the rollout's own mixture": [_setting(k, k / _STEPS) for k in mixed],
    "undecided, 1/2": [_setting(k, 0.5) for k in range(_STEPS + 1)],
    f"the corpus's prior, {_PRIOR:g}": [_setting(k, _PRIOR) for k in range(_STEPS + 1)],
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
  value = theory.information(
    grid_p[:, 1:-1], _STEPS, grid_flip[:, 1:-1], flip[0], distance=_DISTANCE
  )
  snr = np.zeros(grid_p.shape)  # a pure rollout has no contrast: 0, the limit
  kappa = 1 - grid_flip[:, 1:-1] - flip[0]
  snr[:, 1:-1] = np.sign(kappa) * np.sqrt(value)
  score = (grid_p * (1 - grid_p) + _ALPHA) * (counts[:, None] / _N_MC)
  correlation = stats.spearmanr(snr.ravel(), score.ravel()).statistic
  return {
    "p": p.tolist(),
    "reliability": (counts / _N_MC).tolist(),
    "snr": snr.tolist(),
    "bis": score.tolist(),
    "alpha": _ALPHA,
    "rank_correlation": float(correlation),
  }


def measure(workdirs: list[str], rollouts: int, draws: int) -> dict:
  """Returns what the head gradients of the runs' students are.

  Raises:
    WorkdirError: a run is not on the embedded corpus, or its corpus is gone.
  """
  runs = [restored.restore(workdir) for workdir in workdirs]
  where = locations.locate(runs[0].config)
  if not where.toy or not (where.toy / "truth.jsonl").exists():
    raise WorkdirError(
      f"{workdirs[0]}: no truth.jsonl in {where.toy}: measure a run on the embedded corpus, drawn "
      "by this version of the code"
    )
  corpus = Corpus.open(where.prepared)
  kept = [Manifest.load(f"{workdir}/manifest.json").rollout_indices(corpus) for workdir in workdirs]
  parts, groups = _draw(corpus, np.concatenate(kept), (rollouts, rollouts // 2))
  truth = _read_truth(where.toy / "truth.jsonl")
  steps, others = (_read_steps(corpus, part, truth, runs[0].config.corpus.tau) for part in parts)
  flip = _measured_flips(others, runs[0].config.corpus.toy.get("n_mc", _N_MC))
  predictors = _predictors(steps, flip)
  students = []
  for workdir, run in zip(workdirs, runs, strict=True):
    name = f"{pathlib.Path(workdir).name}, step {run.step}"
    states = [
      head_gradients.marker_states(run, RolloutExamples(corpus, part, run.config)) for part in parts
    ]
    own = [head_gradients.probabilities(run.params, state_SD) for state_SD in states]
    students.append(_student(name, (steps, others), states, own, predictors, groups, draws))
    if run is runs[0]:
      prior = float(others.label_S.mean())
      same = [np.full(len(state_SD), prior) for state_SD in states]
      name = f"prior alone ({prior:.2f}) on the states of {name}"
      students.append(_student(name, (steps, others), states, same, predictors, groups, draws))
  return {
    "workdirs": [pathlib.Path(workdir).name for workdir in workdirs],
    "rollouts": len(parts[0]),
    "rollouts_for_direction": len(parts[1]),
    "mixed": float((predictors["p(1-p)"] > 0).mean()),
    "flips": flip,
    "students": students,
  }


def _draw(
  corpus: Corpus, kept: np.ndarray, counts: tuple[int, int]
) -> tuple[list[np.ndarray], np.ndarray]:
  """Returns two samples of rollouts that are not kept and share no picture, int64[counts] each.

  Also the group of each rollout of the first: int64, those about the same pictures have one.
  """
  group = np.array([corpus.image_ids(i)[0] for i in range(len(corpus))])
  place = np.random.default_rng(0).permutation(group.max() + 1)[group]
  left = np.setdiff1d(np.arange(len(corpus)), kept)
  left = left[np.argsort(place[left], kind="stable")]
  first = left[: counts[0]]
  second = left[counts[0] :]
  second = second[~np.isin(group[second], group[first])][: counts[1]]
  return [first, second], group[first]


def _read_truth(path: pathlib.Path) -> dict[tuple[str, int], list[int]]:
  with open(path, encoding="utf-8") as lines:
    records = [json.loads(line) for line in lines]
  return {(r["file"].removesuffix(".jsonl"), r["line"]): r["truth"] for r in records}


def _read_steps(corpus: Corpus, indices: np.ndarray, truth: dict, tau: float) -> Steps:
  rollouts = [corpus.rollout(int(i)) for i in indices]
  score_S = np.concatenate([rollout.scores for rollout in rollouts])
  truths = [truth[rollout.source, rollout.line] for rollout in rollouts]
  return Steps(
    rollout_S=np.repeat(np.arange(len(rollouts)), [len(r.scores) for r in rollouts]),
    label_S=(score_S > tau).astype(float),
    truth_S=np.concatenate(truths).astype(float),
    score_S=score_S,
  )


def _measured_flips(steps: Steps, n_mc: int) -> dict[str, list]:
  """Returns the share of wrong labels at every MC score c / n_mc, None where there is no step."""
  count_S = np.rint(steps.score_S * n_mc).astype(int)
  wrong_S = steps.label_S != steps.truth_S
  found = np.bincount(count_S, minlength=n_mc + 1)
  wrong = np.bincount(count_S, wrong_S, n_mc + 1)
  rates = [float(w / f) if f else None for w, f in zip(wrong, found, strict=True)]
  return {"n_mc": n_mc, "steps": found.tolist(), "rate": rates}


def _predictors(steps: Steps, flip: dict) -> dict[str, np.ndarray]:
  """Returns what a selection could rank rollouts by, float64[M] each.

  `closed form` is the contrast's signal: 1/n sum (y - p) P(right), with the flip rates measured on
  the other sample: what a selection could know at best.
  """
  p = steps.mean(steps.label_S)
  n = np.bincount(steps.rollout_S)
  n_pos = np.rint(p * n).astype(int)
  score_sum = np.bincount(steps.rollout_S, steps.score_S * (steps.label_S > 0))
  rate_C = np.array([0.0 if rate is None else rate for rate in flip["rate"]])
  flip_S = rate_C[np.rint(steps.score_S * flip["n_mc"]).astype(int)]
  right_S = np.where(steps.label_S > 0, 1 - flip_S, flip_S)
  return {
    "p(1-p)": bis.mixture(n, n_pos),
    "R": bis.reliability(n_pos, score_sum),
    "BIS": bis.bis_scores(n, n_pos, score_sum, _ALPHA),
    "average_stepwise": steps.mean(steps.score_S * (1 - steps.score_S)),
    "closed form": steps.mean((steps.label_S - p[steps.rollout_S]) * right_S),
  }


def _student(
  name: str,
  parts: tuple[Steps, Steps],
  states: list[np.ndarray],
  probabilities: list[np.ndarray],
  predictors: dict[str, np.ndarray],
  groups: np.ndarray,
  draws: int,
) -> dict:
  """Returns everything that is measured of one student."""
  steps, others = parts
  direction = head_gradients.true_direction(others, probabilities[1], states[1])
  fitted = head_gradients.fitted_direction(others, states[1])
  found = head_gradients.rollout_gradients(steps, probabilities[0], states[0], direction)
  along_fitted = head_gradients.rollout_gradients(steps, probabilities[0], states[0], fitted)
  mean_state = states[1].mean(axis=0) / np.linalg.norm(states[1].mean(axis=0))
  measures = {
    "square": found.square,
    "aligned": found.aligned,
    "contrast_square": found.contrast_square,
    "contrast": found.contrast,
    "aligned_fitted": along_fitted.aligned,
    "contrast_fitted": along_fitted.contrast,
  }
  everyone = np.zeros(len(groups), np.int64)
  one = {"group_M": groups, "draws": draws}
  by_tenth = {
    name: signal_statistics.signal_to_noise(
      found.aligned, signal_statistics.tenths(score), 10, **one
    )
    for name, score in predictors.items()
  }
  mixture = np.digitize(predictors["p(1-p)"], theory_page.MIXTURE_EDGES)
  return {
    "name": name,
    "cosine": {
      "fitted_direction": float(direction @ fitted),
      "mean_state": float(direction @ mean_state),
    },
    "contrast_share_of_square": float(found.contrast_square.mean() / found.square.mean()),
    "shrinkage": float(found.aligned.mean() / found.true_aligned.mean()),
    "rank_correlations": signal_statistics.rank_correlations(measures, predictors, groups, draws),
    "all": signal_statistics.signal_to_noise(found.aligned, everyone, 1, **one)[0],
    "by_tenth": by_tenth,
    "contrast_by_tenth_of_bis": signal_statistics.signal_to_noise(
      found.contrast, signal_statistics.tenths(predictors["BIS"]), 10, **one
    ),
    "by_mixture": [
      {
        "mixture": float(predictors["p(1-p)"][mixture == g].mean()),
        "rollouts": int((mixture == g).sum()),
        **{key: float(value[mixture == g].mean()) for key, value in measures.items()},
      }
      for g in range(len(theory_page.MIXTURE_EDGES) + 1)
      if (mixture == g).any()
    ],
  }


def main(argv: list[str]) -> None:
  """Writes theory.json, the plots and the page."""
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  results = {"simulation": compare(), "curves": curves()}
  if _WORKDIR.value:
    try:
      results["measured"] = measure(_WORKDIR.value, _ROLLOUTS.value, _DRAWS.value)
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
