"""Reads and writes step scores as JSON lines, the form in which any model can be evaluated.

scores of a benchmark     {"index": 0, "scores": [0.93, 0.12]}    one line per item, in any order
scores of held-out steps  {"scores": [0.9], "labels": [1], "data_source": "x"}    one per rollout
"""

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from etils import epath

from bis_jax import files
from bis_jax.evaluation import json_records, step_metrics
from bis_jax.evaluation.json_records import EvaluationError, Probability
from bis_jax.evaluation.step_metrics import ScoredSteps
from bis_jax.evaluation.visual_process_bench import Label


class _ItemScores(msgspec.Struct, forbid_unknown_fields=True):
  index: int
  scores: list[Probability]
  id: Any = None  # not used


class _HeldOutScores(msgspec.Struct, forbid_unknown_fields=True):
  scores: list[Probability]
  labels: list[Label]
  data_source: str
  id: Any = None  # not used, as those below, which a run writes
  rollout: Any = None
  mc_scores: Any = None


def read_scores(path: str, items: Sequence) -> list[np.ndarray]:
  """Returns float64 scores per item, in the order of `items` (`BenchmarkItem`s).

  The EvaluationError names the line that is invalid or repeats an index, or the items without
  scores.
  """
  found = {}
  for where, record in json_records.read(path, _ItemScores):
    index, scores = record.index, record.scores
    if not 0 <= index < len(items):
      raise EvaluationError(
        f"{where}: `index` is {index}; it must be an item's, 0 to {len(items) - 1}"
      )
    if index in found:
      raise EvaluationError(f"{where}: item {index} was scored before")
    if len(scores) != len(items[index].steps):
      steps = len(items[index].steps)
      raise EvaluationError(f"{where}: item {index} has {steps} steps but {len(scores)} scores")
    found[index] = np.array(scores, np.float64)
  missing = [i for i in range(len(items)) if i not in found]
  if missing:
    named = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
    raise EvaluationError(f"{path} has no scores for {len(missing)} of {len(items)} items: {named}")
  return [found[i] for i in range(len(items))]


def write_scores(path: epath.PathLike, scores: Sequence[np.ndarray]) -> None:
  """Writes scores so that `read_scores` returns the same floats."""
  lines = [
    json.dumps({"index": i, "scores": np.asarray(item_scores, np.float64).tolist()}) + "\n"
    for i, item_scores in enumerate(scores)
  ]
  files.write_text(path, "".join(lines))


def read_held_out(path: str) -> ScoredSteps:
  """Returns the scored steps of held-out rollouts, on which `tuned_on_dev` is tuned."""
  rollouts = []
  for where, rollout in json_records.read(path, _HeldOutScores):
    if len(rollout.labels) != len(rollout.scores):
      raise EvaluationError(
        f"{where}: {len(rollout.labels)} labels but {len(rollout.scores)} scores"
      )
    rollouts.append(rollout)
  if not rollouts:
    raise EvaluationError(f"{path} holds no rollout, so no threshold can be tuned on it")
  return step_metrics.scored_steps(
    [rollout.labels for rollout in rollouts],
    [np.array(rollout.scores, np.float64) for rollout in rollouts],
    [rollout.data_source for rollout in rollouts],
  )
