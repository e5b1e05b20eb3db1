"""What share of the wrong notes a run catches, and of the right ones it rejects, by kind of tile.

  python -m benchmarks.study.caught RUN [RUN ...]

A step of the toy benchmark notes the score of one panel, whose tiles are of one kind. Counted are the
notes of every item up to its first error; a note is rejected if its step scores below the run's
threshold tuned on test. Printed are means over the kinds that the backbone knows and over the new
ones, and how many kinds are not learned: a fifth or more of their right notes are rejected.
Results: docs/study.md.
"""

import collections
import functools
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from benchmarks.study import recipe, results
from benchmarks.study.arms import Part
from bis_jax import files
from bis_jax.settings import locations
from bis_jax.toy import drawing
from bis_jax.toy.records import Knobs, scene_and_question

_NOT_LEARNED = 0.2
_NOTE = re.compile(r"\b[Tt]he (.+?) scores ")


class Note(NamedTuple):
  """A step of item `item` that notes the score of a panel with tiles of `kind`."""

  item: int
  step: int
  kind: int
  right: bool


class Caught(NamedTuple):
  """Shares of rejected notes, in [0, 1]: means over kinds, NaN without any."""

  wrong_known: float
  wrong_new: float
  right_known: float
  right_new: float
  not_learned: float  # kinds


@functools.cache
def notes(benchmark: epath.Path, knobs: Knobs) -> list[Note]:
  """Returns the notes of a drawn benchmark, of every item up to its first error."""
  questions = [
    scene_and_question(task, group)[1]
    for task in drawing.benchmark_groups(knobs, pathlib.Path())
    for group in range(task.first, task.first + task.rollouts)
  ]
  found = []
  items = files.read_jsonl(benchmark / "test.jsonl")
  for i, (question, (_, item)) in enumerate(zip(questions, items, strict=True)):
    kinds = {panel.name: panel.kind for panel in question.panels}
    response = item["response"]
    labels = response["process_correctness"]
    for at, (text, label) in enumerate(zip(response["steps"], labels, strict=True)):
      if label and (note := _NOTE.search(text)):
        found.append(Note(i, at, kinds[note[1]], label > 0))
      if label < 0:
        break
  return found


def of_run(workdir: pathlib.Path) -> Caught:
  """Returns what a run rejects."""
  config = ConfigDict(json.loads((workdir / "config.json").read_text()))
  evaluation = json.loads((workdir / "evaluation.json").read_text())
  threshold = evaluation["thresholds"][results.HEADLINE[0]]["threshold"]
  scores = {item["index"]: item["scores"] for _, item in files.read_jsonl(workdir / "scores.jsonl")}
  rejected = collections.defaultdict(list)
  for note in notes(locations.locate(config).benchmark, Knobs(**config.corpus.toy.to_dict())):
    rejected[note.right, note.kind].append(scores[note.item][note.step] < threshold)
  share = {key: float(np.mean(values)) for key, values in rejected.items()}

  def mean(right: bool, known: bool) -> float:
    own = [share[key] for key in share if key[0] == right and (key[1] in recipe.KNOWN) == known]
    return float(np.mean(own)) if own else float("nan")

  return Caught(
    wrong_known=mean(right=False, known=True),
    wrong_new=mean(right=False, known=False),
    right_known=mean(right=True, known=True),
    right_new=mean(right=True, known=False),
    not_learned=sum(right and value >= _NOT_LEARNED for (right, _), value in share.items()),
  )


def write(folder: pathlib.Path, parts: Sequence[Part]) -> None:
  """Writes folder/caught.json: `Caught` of every arm that has a finished seed, means over seeds."""
  arms = [
    arm | dict(zip(Caught._fields, np.mean(list(map(of_run, workdirs)), axis=0), strict=True))
    for arm, workdirs in results.finished(folder, parts)
  ]
  (folder / "caught.json").write_text(json.dumps(arms, indent=1) + "\n", encoding="utf-8")


def main(*workdirs: str) -> None:
  """Prints a line per run."""
  print(f"{'run':40}{'wrong notes rejected':>26}{'right notes rejected':>26}{'not learned':>14}")
  for workdir in map(pathlib.Path, workdirs):
    *shares, not_learned = of_run(workdir)
    words = "".join(f"{100 * share:11.1f} %" for share in shares)
    print(f"{f'{workdir.parent.name}/{workdir.name}':40}{words}{not_learned:>14}")


if __name__ == "__main__":
  main(*sys.argv[1:])
