"""Scores solutions from a file of JSON lines into another, line for line.

In; `image` is a path or a list of paths below the image root, and may be absent:

    {"id": 7, "image": "cards.png", "question": "Add the cards.", "steps": ["...", "..."]}

Out, in the same order, the probability that each step is correct, or why there is none:

    {"id": 7, "scores": [0.98, 0.31]}
    {"id": 8, "error": "image 'gone.png' is not below the image root"}

Beside the output, OUTPUT.model.json says which checkpoint it is of.
"""

import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator

import jax
from tqdm import tqdm

from bis_jax.scoring import solutions, step_scorer
from bis_jax.scoring.solutions import Solution, SolutionError


@dataclasses.dataclass(frozen=True)
class Line:
  """One line of the input: its id (None if there is none), and a solution or why it is none."""

  id: object
  solution: Solution | SolutionError


def score_file(
  checkpoint: str, source: pathlib.Path, target: pathlib.Path, root: pathlib.Path, chunk: int
) -> None:
  """Scores the lines of `source` that `target` does not have yet, `chunk` at a time.

  Raises:
    ValueError: `target` is of another input or another checkpoint.
  """
  total = sum(1 for _ in _raw_lines(source))
  done = _resume(source, target)
  if done == total:
    print(f"{target} has all {total} lines already")
    return
  scorer = step_scorer.load(checkpoint)
  writes = jax.process_index() == 0
  if writes:
    _name_model(target, scorer.name, fresh=not done)
  errors = 0
  with (
    open(target if writes else "/dev/null", "ab") as out,
    tqdm(total=total, initial=done, unit="solution", disable=not sys.stderr.isatty()) as bar,
  ):
    lines = (read_line(raw, root) for raw in itertools.islice(_raw_lines(source), done, None))
    while batch := list(itertools.islice(lines, chunk)):
      for record in _answers(scorer, batch):
        errors += "error" in record
        out.write(json.dumps(record).encode() + b"\n")
      out.flush()
      bar.update(len(batch))
  print(f"wrote {total - done} of {total} lines to {target}, {errors} of them errors")


def read_line(raw: bytes, root: pathlib.Path) -> Line:
  """Returns what a line of the input asks for; a bad line is a line with an error."""
  identity = None
  try:
    try:
      record = json.loads(raw)
    except (ValueError, RecursionError) as error:
      raise SolutionError(f"no JSON: {error}") from error
    if not isinstance(record, dict):
      raise SolutionError(f"a JSON object is wanted, found {type(record).__name__}")
    identity = record.get("id")
    images = [_read_image(name, root) for name in _image_names(record)]
    return Line(identity, Solution.of(record.get("question"), record.get("steps"), images))
  except SolutionError as error:
    return Line(identity, error)


def _answers(scorer: step_scorer.Scorer, lines: list[Line]) -> Iterator[dict]:
  """Yields the output object of every line, in order."""
  whole = [line.solution for line in lines if isinstance(line.solution, Solution)]
  scores = iter(solutions.score(scorer, whole) if whole else ())
  for line in lines:
    result = next(scores) if isinstance(line.solution, Solution) else line.solution
    if isinstance(result, SolutionError):
      yield {"id": line.id, "error": str(result)}
    else:
      yield {"id": line.id, "scores": [float(score) for score in result]}


def _image_names(record: dict) -> list[str]:
  names = record.get("image")
  names = [] if names is None else [names] if isinstance(names, str) else names
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise SolutionError("`image` must be a path or a list of paths")
  return names


def _read_image(name: str, root: pathlib.Path) -> bytes:
  """Returns the bytes of the file `name` below `root`, wherever links lead."""
  try:
    path = (root / name).resolve()
    if path.is_relative_to(root.resolve()) and path.is_file():
      return path.read_bytes()
  except (OSError, ValueError) as error:
    raise SolutionError(f"image {name!r} can't be read: {error}") from error
  raise SolutionError(f"image {name!r} is not below the image root")


def _raw_lines(source: pathlib.Path) -> Iterator[bytes]:
  with open(source, "rb") as file:
    yield from file


def _resume(source: pathlib.Path, target: pathlib.Path) -> int:
  """Returns how many whole lines `target` has, and cuts off a half one that a kill left behind.

  Raises ValueError where the ids there are not those of `source`'s first lines.
  """
  if not target.exists():
    return 0
  whole = target.read_bytes()
  whole = whole[: whole.rfind(b"\n") + 1]
  written = whole.splitlines()
  expected = list(itertools.islice(_raw_lines(source), len(written)))
  if len(expected) < len(written):
    raise ValueError(f"{target} has more lines than {source}: name another --output")
  for number, (raw, line) in enumerate(zip(expected, written, strict=True), start=1):
    if json.loads(line)["id"] != _identity(raw):
      raise ValueError(
        f"{target} line {number} has another id than {source}: name another --output"
      )
  with open(target, "r+b") as file:
    file.truncate(len(whole))
  return len(written)


def _name_model(target: pathlib.Path, name: str, *, fresh: bool) -> None:
  """Writes which model `target` is of, or raises ValueError where it is another's."""
  note = target.with_name(target.name + ".model.json")
  if fresh:
    target.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"checkpoint": name}) + "\n")
    return
  found = json.loads(note.read_text())["checkpoint"] if note.exists() else "no named checkpoint"
  if found != name:
    raise ValueError(f"{target} holds scores of {found}, not of {name}: name another --output")


def _identity(raw: bytes) -> object:
  try:
    record = json.loads(raw)
  except (ValueError, RecursionError):
    return None
  return record.get("id") if isinstance(record, dict) else None
