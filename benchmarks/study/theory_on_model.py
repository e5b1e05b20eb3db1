"""Measures the signal of single rollouts on the reward head's gradients of trained runs.

Array names end in their dims: S steps of all rollouts, concatenated, M rollouts, D width,
C = n_mc + 1 counts.
"""

import pathlib

import numpy as np

from benchmarks.study import head_gradients, signal_statistics, theory_page
from benchmarks.study.head_gradients import Steps
from bis_jax.corpus.corpus import Corpus
from bis_jax.corpus.score_table import positive_and_counted
from bis_jax.evaluation.step_metrics import roc_auc, tied_counts
from bis_jax.scoring import restore
from bis_jax.selection import bis
from bis_jax.selection.manifest import Manifest
from bis_jax.settings import locations
from bis_jax.settings.workdir import WorkdirError
from bis_jax.toy import drawing
from bis_jax.training.examples import RolloutExamples

ALPHA = 0.2  # of BIS for a tenth of the corpus


def measure(workdirs: list[str], rollouts: int, draws: int) -> dict:
  """Returns the measurements of the runs' students, content of theory.json.

  Args:
    workdirs: runs on one toy corpus, the earliest student first. On its states a student that knows
      only the label prior is measured too.
    rollouts: number of measured rollouts, which no run trained on; half as many more give the
      teacher's direction.
    draws: number of bootstrap draws.

  Raises:
    WorkdirError: a run is not on the toy corpus, its corpus is missing, or the corpora differ.
  """
  runs = [restore.load_run(workdir) for workdir in workdirs]
  where = locations.locate(runs[0].config)
  if not where.toy or not (where.toy / "truth.jsonl").exists():
    raise WorkdirError(
      f"{workdirs[0]}: no truth.jsonl in {where.toy}: measure a run on the toy corpus, drawn "
      "by this version of the code"
    )
  corpus = Corpus.open(where.prepared)
  manifests = [Manifest.load(f"{workdir}/manifest.json") for workdir in workdirs]
  for workdir, manifest in zip(workdirs, manifests, strict=True):
    if manifest.corpus_digest != manifests[0].corpus_digest:
      raise WorkdirError(
        f"{workdir} trained on another corpus than {workdirs[0]}: name runs on one"
      )
  kept = [manifest.rollout_indices(corpus) for manifest in manifests]
  parts, groups = _draw(corpus, np.concatenate(kept), (rollouts, rollouts // 2))
  truth = drawing.read_truth(where.toy)
  steps, others = (_read_steps(corpus, part, truth, runs[0].config.corpus.tau) for part in parts)
  flip = _measured_flips(others, runs[0].config.corpus.toy.n_mc)
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
    "kinds": _shares(_kinds(steps)),
    "highest_tenth": {
      name: _shares(_kinds(steps)[signal_statistics.tenths(score) == 9])
      for name, score in predictors.items()
    },
    "flips": flip,
    "students": students,
  }


def _draw(
  corpus: Corpus, kept: np.ndarray, counts: tuple[int, int]
) -> tuple[list[np.ndarray], np.ndarray]:
  """Returns two samples of rollouts that are not kept and share no picture, int64[counts] each.

  Also int64[counts[0]], the group (pictures) of each rollout of the first.
  """
  group = np.array([corpus.image_ids(i)[0] for i in range(len(corpus))])
  place = np.random.default_rng(0).permutation(group.max() + 1)[group]
  left = np.setdiff1d(np.arange(len(corpus)), kept)
  left = left[np.argsort(place[left], kind="stable")]
  first = left[: counts[0]]
  second = left[counts[0] :]
  second = second[~np.isin(group[second], group[first])][: counts[1]]
  return [first, second], group[first]


def _read_steps(corpus: Corpus, indices: np.ndarray, truth: dict, tau: float) -> Steps:
  """Returns the steps with hard labels; unmeasured steps are negative, as in the paper."""
  rollouts = [corpus.rollout(int(i)) for i in indices]
  score_S = np.concatenate([rollout.scores for rollout in rollouts])
  measured_S = np.concatenate([rollout.measured for rollout in rollouts])
  positive_S, _ = positive_and_counted(score_S, measured_S, tau, "negative")
  truths = [truth[rollout.source, rollout.line] for rollout in rollouts]
  return Steps(
    rollout_S=np.repeat(np.arange(len(rollouts)), [len(r.scores) for r in rollouts]),
    label_S=positive_S.astype(float),
    truth_S=np.concatenate(truths).astype(float),
    score_S=score_S,
  )


def _measured_flips(steps: Steps, n_mc: int) -> dict[str, list]:
  """Returns the share of wrong labels at every MC score c / n_mc, None if it does not occur."""
  count_S = np.rint(steps.score_S * n_mc).astype(int)
  wrong_S = steps.label_S != steps.truth_S
  found = np.bincount(count_S, minlength=n_mc + 1)
  wrong = np.bincount(count_S, wrong_S, n_mc + 1)
  rates = [float(w / f) if f else None for w, f in zip(wrong, found, strict=True)]
  return {"n_mc": n_mc, "steps": found.tolist(), "rate": rates}


def _predictors(steps: Steps, flip: dict) -> dict[str, np.ndarray]:
  """Returns scores by which a selection could rank rollouts, float64[M] each.

  `closed form` is the contrast's signal 1/n sum (y - p) P(right), with flip rates measured on the
  other sample: the best that a selection could know.
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
    "BIS": bis.bis_scores(n, n_pos, score_sum, ALPHA),
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
  """Returns the measurements of one student."""
  (steps, others), (state_SD, others_SD) = parts, states
  with_prior = head_gradients.true_direction(others, probabilities[1], others_SD)
  teacher = head_gradients.without_prior(with_prior, others_SD)
  fitted = head_gradients.fitted_direction(others, others_SD)
  found, along_with_prior, along_fitted = (
    head_gradients.rollout_gradients(steps, probabilities[0], state_SD, direction)
    for direction in (teacher, with_prior, fitted)
  )
  measures = {
    "square": found.square,
    "aligned": found.aligned,
    "contrast_square": found.contrast_square,
    "contrast": found.contrast,
    "aligned_with_prior": along_with_prior.aligned,
    "aligned_fitted": along_fitted.aligned,
    "contrast_fitted": along_fitted.contrast,
  }
  mixed = predictors["p(1-p)"] > 0
  return {
    "name": name,
    "roc_auc": float(roc_auc(*tied_counts(steps.truth_S, probabilities[0]))),
    "cosine": {
      "fitted": float(teacher @ fitted),
      "with_prior": float(teacher @ with_prior),
    },
    "contrast_share_of_square": float(found.contrast_square.mean() / found.square.mean()),
    "square_of_mixed_over_pure": float(found.square[mixed].mean() / found.square[~mixed].mean()),
    "true_labels": {
      "aligned": float(found.true_aligned.mean()),
      "aligned_of_mc_labels": float(found.aligned.mean()),
    },
    "rank_correlations": signal_statistics.rank_correlations(measures, predictors, groups, draws),
    "rank_correlations_among_mixed": signal_statistics.rank_correlations(
      {key: value[mixed] for key, value in measures.items()},
      {key: value[mixed] for key, value in predictors.items()},
      groups[mixed],
      draws,
    ),
    "all": _signal(found.aligned, None, groups, draws),
    "by_kind": _by_kind(found.aligned, steps, groups, draws),
    "mixed_by_half": {
      key: signal_statistics.signal_to_noise(
        found.aligned[mixed], signal_statistics.tenths(score[mixed]) // 5, 2, groups[mixed], draws
      )
      for key, score in predictors.items()
    },
    "by_tenth": {
      key: _signal(found.aligned, score, groups, draws) for key, score in predictors.items()
    },
    "with_prior": {
      "all": _signal(along_with_prior.aligned, None, groups, draws),
      "by_tenth_of_bis": _signal(along_with_prior.aligned, predictors["BIS"], groups, draws),
    },
    "contrast_by_tenth_of_bis": _signal(found.contrast, predictors["BIS"], groups, draws),
    "by_mixture": _by_mixture(measures, predictors["p(1-p)"]),
  }


def _signal(aligned: np.ndarray, score: np.ndarray | None, groups: np.ndarray, draws: int):
  """Returns signal-to-noise of every tenth by a score, or of all rollouts without a score."""
  if score is None:
    everyone = np.zeros(len(aligned), np.int64)
    return signal_statistics.signal_to_noise(aligned, everyone, 1, groups, draws)[0]
  tenth = signal_statistics.tenths(score)
  return signal_statistics.signal_to_noise(aligned, tenth, 10, groups, draws)


_KINDS = ("all positive", "none positive", "mixed")


def _kinds(steps: Steps) -> np.ndarray:
  """Returns int[M], an index into `_KINDS` by the labels of every rollout."""
  p = steps.mean(steps.label_S)
  return np.select([p == 1, p == 0], [0, 1], 2)


def _shares(kind: np.ndarray) -> dict[str, float]:
  return {name: float((kind == i).mean()) for i, name in enumerate(_KINDS)}


def _by_kind(aligned: np.ndarray, steps: Steps, groups: np.ndarray, draws: int) -> dict[str, dict]:
  """Returns signal-to-noise per kind of rollout."""
  blocks = signal_statistics.signal_to_noise(aligned, _kinds(steps), 3, groups, draws)
  return dict(zip(_KINDS, blocks, strict=True))


def _by_mixture(measures: dict[str, np.ndarray], mixture: np.ndarray) -> list[dict]:
  """Returns the means of the measures per bin of the mixture."""
  bins = np.digitize(mixture, theory_page.MIXTURE_EDGES)
  return [
    {"mixture": float(mixture[bins == g].mean()), "rollouts": int((bins == g).sum())}
    | {key: float(value[bins == g].mean()) for key, value in measures.items()}
    for g in np.unique(bins)
  ]
