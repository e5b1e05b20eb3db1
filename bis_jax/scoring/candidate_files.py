"""Scores Best-of-N candidates, whose lines `bis_jax.evaluation.best_of_n` defines."""

import functools
import json
from typing import Any

from etils import epath

from bis_jax import files
from bis_jax.evaluation.json_records import EvaluationError
from bis_jax.scoring import solutions, step_scorer
from bis_jax.scoring.solution_files import read_image
from bis_jax.scoring.solutions import Record, Solution, SolutionError


def score_file(checkpoint: str, source: epath.Path, target: epath.Path) -> None:
  """Writes the lines of `source` with step scores at the candidates that have only steps.

  Images are below the folder of `source`. Raises EvaluationError for a candidate that can't be
  scored.
  """
  lines = list(files.read_jsonl(source, EvaluationError))
  wanted: list[tuple[int, dict[str, Any], Solution]] = []
  for number, record in lines:
    shared = record if isinstance(record, dict) else {}
    for one in shared.get("candidates") or ():
      if isinstance(one, dict) and one.get("steps") and not one.get("scores"):
        wanted.append((number, one, _solution(source, number, shared, one)))
  scorer = step_scorer.load(checkpoint)
  found = solutions.score(scorer, [solution for *_, solution in wanted])
  for (number, one, _), scores in zip(wanted, found, strict=True):
    if isinstance(scores, SolutionError):
      raise EvaluationError(f"{source} line {number}: {scores}")
    one["scores"] = scores.tolist()
  files.write_text(target, "".join(json.dumps(record) + "\n" for _, record in lines))


def _solution(
  source: epath.Path, number: int, record: dict[str, Any], candidate: dict[str, Any]
) -> Solution:
  shared = {key: record[key] for key in ("question", "image", "images") if key in record}
  try:
    asked = Record.of(shared | {"steps": candidate["steps"]})
    return asked.solution(functools.partial(read_image, source.parent)).check_images()
  except SolutionError as error:
    raise EvaluationError(f"{source} line {number}: {error}") from error
