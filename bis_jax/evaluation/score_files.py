"""Reads and writes step scores as JSON lines, the form in which anyone's model can be evaluated.

scores of a benchmark     {"index": 0, "scores": [0.93, 0.12]}          a line an item, any order
scores of held-out steps  {"scores": [0.9], "labels": [1], "data_source": "x"}    a line a rollout
"""

import json
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from bis_jax.evaluation import step_metrics
from bis_jax.evaluation.step_metrics import ScoredSteps


def read_scores(path: str, items: Sequence) -> list[np.ndarray]:
  """Returns one float64 array of scores an item, in the order of `items` (`BenchmarkItem`s).

  Raises ValueError naming the line where a line is no such object, or its index is unknown or
  was there before, and naming the items where a score is missing or one too many.
  """
  found = {}
  for line_number, record in _objects(path):
    index = record.get("index")
    if type(index) is not int or not 0 <= index < len(items):
      raise ValueError(
        f"{path} line {line_number}: `index` is {index!r}; it must be an item's, 0 to "
        f"{len(items) - 1}"
      )
    if index in found:
      raise ValueError(f"{path} line {line_number}: item {index} was scored before")
    found[index] = _probabilities(record, path, line_number)
    if len(found[index]) != len(items[index].steps):
      raise ValueError(
        f"{path} line {line_number}: item {index} has {len(items[index].steps)} steps but "
        f"{len(found[index])} scores"
      )
  missing = [i for i in range(len(items)) if i not in found]
  if missing:
    named = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
    raise ValueError(f"{path} has no scores for {len(missing)} of {len(items)} items: {named}")
  return [found[i] for i in range(len(items))]


def write_scores(path: str, scores: Sequence[np.ndarray]) -> None:
  """Writes scores so that `read_scores` gives the same floats back."""
  lines = [
    json.dumps({"index": i, "scores": np.asarray(item_scores, np.float64).tolist()})
    for i, item_scores in enumerate(scores)
  ]
  epath.Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_held_out(path: str) -> ScoredSteps:
  """Returns the scored steps of held-out rollouts, on which `tuned_on_dev` is tuned.

  Raises ValueError naming the line where labels are not 1, 0 or -1, or don't match the scores.
  """
  labels, scores, sources = [], [], []
  for line_number, record in _objects(path):
    scores.append(_probabilities(record, path, line_number))
    rollout_labels, source = record.get("labels"), record.get("data_source")
    if not isinstance(rollout_labels, list) or not all(
      type(label) is int and label in (-1, 0, 1) for label in rollout_labels
    ):
      raise ValueError(f"{path} line {line_number}: `labels` must be a list of 1, 0 and -1")
    if len(rollout_labels) != len(scores[-1]):
      raise ValueError(
        f"{path} line {line_number}: {len(rollout_labels)} labels but {len(scores[-1])} scores"
      )
    if not isinstance(source, str):
      raise ValueError(f"{path} line {line_number}: `data_source` must be a string")
    labels.append(rollout_labels)
    sources.append(source)
  if not labels:
    raise ValueError(f"{path} holds no rollout: a threshold can't be tuned on it")
  return step_metrics.scored_steps(labels, scores, sources)


def _objects(path: str) -> Iterator[tuple[int, dict]]:
  """Yields (line number from 1, object) of a JSON lines file, blank lines passed over."""
  for line_number, line in enumerate(epath.Path(path).read_bytes().split(b"\n"), start=1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except ValueError as error:
      raise ValueError(f"{path} line {line_number} is no JSON: {error}") from error
    if not isinstance(record, dict):
      raise ValueError(f"{path} line {line_number}: an object is wanted, found {record!r:.60}")
    yield line_number, record


def _probabilities(record: dict, path: str, line_number: int) -> np.ndarray:
  scores = record.get("scores")
  if not isinstance(scores, list) or not all(
    type(score) in (int, float) and 0 <= score <= 1 for score in scores
  ):
    raise ValueError(
      f"{path} line {line_number}: `scores` must be a list of probabilities in [0, 1], "
      f"found {scores!r:.80}"
    )
  return np.array(scores, np.float64)
