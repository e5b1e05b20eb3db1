"""Scores solutions from one file of JSON lines into another, line by line.

Input; `image` or `images` is a path or a list of paths below the image root, and may be absent:

    {"id": 7, "image": "cards.png", "question": "Add the cards.", "steps": ["...", "..."]}

Output, in the same order: the probability that each step is correct, or why there is none:

    {"id": 7, "scores": [0.98, 0.31]}
    {"id": 8, "error": "image 'gone.png' is not below the image root"}

OUTPUT.model.json beside it names the checkpoint.
"""

import functools
import itertools
import json
import os
from collections.abc import Iterator

import jax
from etils import epath

from bis_jax import files
from bis_jax.console import progress_bar
from bis_jax.corpus.image_root import MAX_BYTES
from bis_jax.errors import UserError
from bis_jax.scoring import solutions, step_scorer
from bis_jax.scoring.solutions import Record, Solution, SolutionError, identity


class OutputError(UserError):
  """The output file belongs to another input or another checkpoint."""


def score_file(
  checkpoint: str,
  source: epath.Path,
  target: epath.Path,
  root: epath.Path,
  chunk: int,
  base: str | None = None,
  **inputs: int,
) -> tuple[int, int, int]:
  """Scores the lines of `source` that `target` does not have yet, `chunk` at a time.

  Returns (lines of the input, lines written now, errors among those). `base` and `inputs` as in
  `step_scorer.load`. Raises OutputError.
  """
  total = sum(1 for _ in files.read_lines(source))
  done, size = _resume(source, target)
  if done == total:
    return total, 0, 0
  scorer = step_scorer.load(checkpoint, base=base, adapt_rows=True, **inputs)
  writes = jax.process_index() == 0
  if writes:
    _name_model(target, scorer.name, fresh=not done)
  errors = 0
  with (
    files.GrowingFile(target, size) if writes else open(os.devnull, "wb") as out,
    progress_bar("score", total, initial=done, unit="solution") as bar,
  ):
    rest = itertools.islice(files.read_lines(source), done, None)
    lines = (read_line(raw, root) for _, raw in rest)
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
  for name, solution in lines:
    result = next(scores) if isinstance(solution, Solution) else solution
    if isinstance(result, SolutionError):
      yield {"id": name, "error": str(result)}
    else:
      yield {"id": name, "scores": [float(score) for score in result]}


def read_line(raw: bytes, root: epath.Path) -> tuple[object, Solution | SolutionError]:
  try:
    value = files.parse_json(raw)
  except ValueError as error:
    return None, SolutionError(f"not valid JSON: {error}")
  try:
    solution = Record.of(value).solution(functools.partial(read_image, root))
    return identity(value), solution.check_images()
  except SolutionError as error:
    return identity(value), error


def read_image(root: epath.Path, name: str) -> bytes:
  """Returns an image file below `root`; raises SolutionError."""
  try:
    path = files.real_path(root / name)
    if path.is_relative_to(files.real_path(root)) and path.is_file():
      if files.size_of(path) > MAX_BYTES:
        raise SolutionError(f"image {name!r} has more than {MAX_BYTES:,} bytes")
      return path.read_bytes()
  except (OSError, ValueError) as error:
    raise SolutionError(f"image {name!r} can't be read: {error}") from error
  raise SolutionError(f"image {name!r} is not below the image root")


def _read_identity(raw: bytes) -> object:
  try:
    return identity(files.parse_json(raw))
  except ValueError:
    return None


def _resume(source: epath.Path, target: epath.Path) -> tuple[int, int]:
  """Returns how many complete lines `target` has, and their bytes; a kill may leave more.

  Raises OutputError, and changes nothing, if `target` is not an output for `source`.
  """
  content = target.read_bytes() if target.exists() else b""
  if not content:
    return 0, 0
  whole = content[: content.rfind(b"\n") + 1]
  written = whole.split(b"\n")[:-1]
  torn = content[len(whole) :]
  head = b'{"id": '
  if not (_note(target).exists() and torn[: len(head)] == head[: len(torn)]):
    raise OutputError(f"{target} exists and was not written by this command: name another --output")
  expected = [raw for _, raw in itertools.islice(files.read_lines(source), len(written))]
  if len(expected) < len(written):
    raise OutputError(f"{target} has more lines than {source}: name another --output")
  for number, (raw, line) in enumerate(zip(expected, written, strict=True), start=1):
    if _own_id(target, number, line) != _read_identity(raw):
      raise OutputError(
        f"{target} line {number} has another id than {source}: name another --output"
      )
  return len(written), len(whole)


def _own_id(target: epath.Path, number: int, line: bytes) -> object:
  try:
    record = files.parse_json(line)
  except ValueError:
    record = None
  if isinstance(record, dict) and record.keys() in ({"id", "scores"}, {"id", "error"}):
    return record["id"]
  raise OutputError(
    f"{target} line {number} was not written by this command: name another --output"
  )


def _note(target: epath.Path) -> epath.Path:
  return target.with_name(target.name + ".model.json")


def _name_model(target: epath.Path, name: str, *, fresh: bool) -> None:
  note = _note(target)
  if fresh:
    files.write_text(note, json.dumps({"checkpoint": name}) + "\n")
    return
  remedy = "name another --output"
  held = files.read_json(note, remedy, error=OutputError) if note.exists() else {}
  found = held.get("checkpoint", "no named checkpoint")
  if found != name:
    raise OutputError(f"{target} holds scores of {found}, not of {name}: name another --output")
