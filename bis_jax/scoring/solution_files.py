"""Scores solutions from one file of JSON lines into another, line by line.

Input; `image` is a path or a list of paths below the image root, and may be absent:

    {"id": 7, "image": "cards.png", "question": "Add the cards.", "steps": ["...", "..."]}

Output, in the same order: the probability that each step is correct, or why there is none:

    {"id": 7, "scores": [0.98, 0.31]}
    {"id": 8, "error": "image 'gone.png' is not below the image root"}

OUTPUT.model.json beside it names the checkpoint.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Iterator

import jax

from bis_jax import files
from bis_jax.console import ProgressBar
from bis_jax.errors import UserError
from bis_jax.scoring import solutions, step_scorer
from bis_jax.scoring.solutions import Solution, SolutionError


class OutputError(UserError):
  """The output file belongs to another input or another checkpoint."""


def score_file(
  checkpoint: str, source: pathlib.Path, target: pathlib.Path, root: pathlib.Path, chunk: int
) -> tuple[int, int, int]:
  """Scores the lines of `source` that `target` does not have yet, `chunk` at a time.

  Returns (lines of the input, lines written now, errors among those). Raises OutputError.
  """
  total = sum(1 for _ in _raw_lines(source))
  done = _resume(source, target)
  if done == total:
    return total, 0, 0
  scorer = step_scorer.load(checkpoint)
  writes = jax.process_index() == 0
  if writes:
    _name_model(target, scorer.name, fresh=not done)
  errors = 0
  with (
    open(target if writes else os.devnull, "ab") as out,
    ProgressBar("score", total, initial=done, unit="solution") as bar,
  ):
    lines = (read_line(raw, root) for raw in itertools.islice(_raw_lines(source), done, None))
    while batch := list(itertools.islice(lines, chunk)):
      for record in _scored(scorer, batch):
        errors += "error" in record
        out.write(json.dumps(record).encode() + b"\n")
      out.flush()
      bar.update(len(batch))
  return total, total - done, errors


def _scored(
  scorer: step_scorer.Scorer, lines: list[tuple[object, Solution | SolutionError]]
) -> Iterator[dict]:
  whole = [solution for _, solution in lines if isinstance(solution, Solution)]
  scores = iter(solutions.score(scorer, whole) if whole else ())
  for identity, solution in lines:
    result = next(scores) if isinstance(solution, Solution) else solution
    if isinstance(result, SolutionError):
      yield {"id": identity, "error": str(result)}
    else:
      yield {"id": identity, "scores": [float(score) for score in result]}


def read_line(raw: bytes, root: pathlib.Path) -> tuple[object, Solution | SolutionError]:
  record = _record(raw)
  if isinstance(record, SolutionError):
    return None, record
  try:
    images = [_read_image(name, root) for name in _image_names(record)]
    solution = Solution.of(record.get("question"), record.get("steps"), images)
  except SolutionError as error:
    return record.get("id"), error
  return record.get("id"), solution


def _record(raw: bytes) -> dict | SolutionError:
  try:
    record = json.loads(raw)
  except (ValueError, RecursionError) as error:
    return SolutionError(f"not valid JSON: {error}")
  if isinstance(record, dict):
    return record
  return SolutionError(f"a JSON object is expected, found {type(record).__name__}")


def _image_names(record: dict) -> list[str]:
  names = record.get("image")
  names = [] if names is None else [names] if isinstance(names, str) else names
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise SolutionError("`image` must be a path or a list of paths")
  return names


def _read_image(name: str, root: pathlib.Path) -> bytes:
  try:
    path = (root / name).resolve()  # wherever links lead
    if path.is_relative_to(root.resolve()) and path.is_file():
      return path.read_bytes()
  except (OSError, ValueError) as error:
    raise SolutionError(f"image {name!r} can't be read: {error}") from error
  raise SolutionError(f"image {name!r} is not below the image root")


def _raw_lines(source: pathlib.Path) -> Iterator[bytes]:
  with open(source, "rb") as file:
    yield from file


def _resume(source: pathlib.Path, target: pathlib.Path) -> int:
  """Returns how many complete lines `target` has; cuts off an incomplete one, left by a kill."""
  if not target.exists():
    return 0
  whole = target.read_bytes()
  whole = whole[: whole.rfind(b"\n") + 1]
  written = whole.splitlines()
  expected = list(itertools.islice(_raw_lines(source), len(written)))
  if len(expected) < len(written):
    raise OutputError(f"{target} has more lines than {source}: name another --output")
  for number, (raw, line) in enumerate(zip(expected, written, strict=True), start=1):
    record = _record(raw)
    if json.loads(line)["id"] != (record.get("id") if isinstance(record, dict) else None):
      raise OutputError(
        f"{target} line {number} has another id than {source}: name another --output"
      )
  with open(target, "r+b") as file:
    file.truncate(len(whole))
  return len(written)


def _name_model(target: pathlib.Path, name: str, *, fresh: bool) -> None:
  note = target.with_name(target.name + ".model.json")
  if fresh:
    files.write_text(note, json.dumps({"checkpoint": name}) + "\n")
    return
  found = json.loads(note.read_text())["checkpoint"] if note.exists() else "no named checkpoint"
  if found != name:
    raise OutputError(f"{target} holds scores of {found}, not of {name}: name another --output")
