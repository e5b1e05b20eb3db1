"""One raw annotation line -> a rollout, or the reason why it is rejected.

The line is a JSON object in the layout of VisualPRM400K-v1.1-Raw:

    {"image": "VisualPRM400K-v1.1-Raw/Geometry3K/1.png", "question_orig": "...", "answer": "52",
     "steps_with_score": [{"step": "...", "score": 0.125, "num_mc_correct": 2, "num_mc_total": 16}]}

The strict reading (`parse_rollout`) accepts a record or names what is wrong with it. The paper's
(`paper_scores`, `paper_writes`) is that of the released subset builder, which checks no image file,
Monte Carlo count or value range.

Sources: the VisualPRM400K-v1.1-Raw release; `scripts/build_bis_subset.py` of the code released with
arXiv 2602.04145.
"""

import dataclasses
import json
import math
import re
from typing import Any

from bis_jax.corpus.image_root import candidates
from bis_jax.corpus.reading import MAX_LINE
from bis_jax.corpus.rejections import BadRecord

REJECTED = "\0rejected"  # key of [reason, detail]: a record that could not be converted
LONG_STEP = 32_768  # characters; at about 4 per token no training sample holds a longer step

NOTES = {
  "special_token_text": "a text spells a special token; it is encoded as plain text",
  "long_step": f"a step of more than {LONG_STEP} characters; no sample holds it",
  "no_question": "no question text",
}

# Spellings of the backbones' special tokens and of others made like them.
_SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|</?(?:prm|image|img|IMG_CONTEXT|quad|ref|box|s)>")


@dataclasses.dataclass(frozen=True, slots=True)
class Rollout:
  """One solution of one question about images, split into steps with MC scores."""

  source: str  # stem of the annotation file
  line: int  # 0-based line number in that file
  images: tuple[str, ...]  # references; names relative to the image root once located
  question: str  # without image placeholders, stripped
  steps: tuple[str, ...]  # stripped, none empty
  scores: tuple[float, ...]  # in [0, 1], exactly as in the file
  measured: tuple[bool, ...]  # False for a step without continuations (0 of 0); its score is 0
  answer: str  # the reference answer, "" if there is none

  @property
  def id(self) -> str:
    return f"{self.source}:{self.line}"


def load_object(raw: bytes, *, order: str = "strict") -> dict[str, Any]:
  """Returns the JSON object of a line; NaN and Infinity are numbers, as in Python's json.

  In `paper` order white space of any kind may surround it. Raises BadRecord: too_long, blank_line,
  invalid_utf8, not_json or not_an_object.
  """
  if len(raw) >= MAX_LINE:
    raise BadRecord("too_long", f"more than {MAX_LINE:,} bytes")
  try:
    text = raw.decode()
  except UnicodeDecodeError as error:
    raise BadRecord("invalid_utf8", f"byte {error.start} of the line: {error.reason}") from None
  if not text.strip():
    raise BadRecord("blank_line", f"{len(raw)} bytes of white space")
  try:
    record = json.loads(text.strip() if order == "paper" else text, parse_int=_integer)
  except (ValueError, RecursionError) as error:
    raise BadRecord("not_json", str(error)) from None
  if not isinstance(record, dict):
    raise BadRecord("not_an_object", f"a JSON {type(record).__name__}")
  return record


def _integer(digits: str) -> int | float:
  return int(digits) if len(digits) < 1000 else float(digits)  # Python refuses longer ones


def parse_rollout(record: dict[str, Any], source: str, line: int) -> Rollout:
  """Returns the rollout of a record that is valid in every respect; images are checked by name.

  Raises BadRecord: no_steps, empty_step, missing_score, score_not_a_number, score_not_finite,
  score_out_of_range, count_mismatch, no_image, image_outside_root, invalid_utf8 for an escaped half
  of a surrogate pair, or what `formats` found.
  """
  if REJECTED in record:
    raise BadRecord(*record[REJECTED])
  steps = record.get("steps_with_score")
  if not isinstance(steps, list) or not steps:
    raise BadRecord("no_steps", f"steps_with_score is {_shown(steps)}")
  texts = tuple(_step_text(step, at) for at, step in enumerate(steps))
  scores = tuple(_score(step, at) for at, step in enumerate(steps))
  measured = tuple(_measured(step, scores[at], at) for at, step in enumerate(steps))
  images = image_references(record)
  for reference in images:
    candidates(reference)
  rollout = Rollout(
    source=source,
    line=line,
    images=images,
    question=question_of(record),
    steps=texts,
    scores=scores,
    measured=measured,
    answer=_text(record.get("answer")),
  )
  for text in (*images, rollout.question, *texts, rollout.answer):
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise BadRecord("invalid_utf8", f"half of a surrogate pair: {error.reason}") from None
  return rollout


def image_references(record: dict[str, Any]) -> tuple[str, ...]:
  """Returns the record's image references as written; () for a rollout of text alone.

  Raises BadRecord (no_image) for anything else, and if the question asks for an image.
  """
  image = record.get("image")
  if image in (None, "", []) and not asks_for_image(record):
    return ()
  references = image if isinstance(image, list) else [image]
  if not references or not all(isinstance(name, str) and name for name in references):
    raise BadRecord("no_image", f"image is {_shown(image)}")
  return tuple(references)


def asks_for_image(record: dict[str, Any]) -> bool:
  """Returns whether the question or its original has an image placeholder."""
  texts = (_text(record.get(key)) for key in ("question", "question_orig"))
  return any("<image" in text for text in texts)


def paper_scores(record: dict[str, Any]) -> tuple[list[float], list[int]]:
  """Returns the scores that the released builder ranks by, and their numbers of continuations.

  Anything that `float` accepts is a score, also numbers in strings; steps without one are skipped. The
  number is 0 for a step that was not measured, -1 if it is not stated.
  The record is scorable if any remains.
  """
  scores, totals = [], []
  for step in _paper_steps(record):
    score = _as_number(step.get("score"))
    if score is not None:
      scores.append(score)
      total = step.get("num_mc_total")
      stated = isinstance(total, int | float) and (0 < total < 1 << 40 or total == score == 0)
      totals.append(int(total) if stated else -1)
  return scores, totals


def paper_writes(record: dict[str, Any]) -> bool:
  """Returns whether the released builder writes the record once it is ranked high enough."""
  steps = _paper_steps(record)
  return bool(record.get("image") and steps) and all(
    isinstance(step.get("step"), str)
    and step["step"].strip()
    and _as_number(step.get("score")) is not None
    for step in steps
  )


def notes(rollout: Rollout) -> list[tuple[str, str]]:
  """Returns (name in `NOTES`, detail) of what is allowed in a record, but unusual."""
  found = []
  for name, text in (("question", rollout.question), *_numbered(rollout.steps)):
    token = _SPECIAL_TOKEN.search(text)
    if token:
      found.append(("special_token_text", f"{name} holds {token[0]!r}"))
      break
  for name, text in _numbered(rollout.steps):
    if len(text) > LONG_STEP:
      found.append(("long_step", f"{name} has {len(text)} characters"))
      break
  if not rollout.question:
    found.append(("no_question", "question_orig and question are empty"))
  return found


def _numbered(steps: tuple[str, ...]) -> list[tuple[str, str]]:
  return [(f"step {at}", text) for at, text in enumerate(steps)]


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else text[:77] + "..."


def _text(value: Any) -> str:
  return "" if value is None else str(value).strip()


def question_of(record: dict[str, Any]) -> str:
  """Returns `question_orig`, or else `question` without image placeholders, stripped."""
  original = _text(record.get("question_orig"))
  return original or _text(record.get("question")).replace("<image>", "").strip()


def paper_question(record: dict[str, Any]) -> str:
  """Returns the question as the released builder writes it: `question` keeps its placeholders."""
  return str(record.get("question_orig") or record.get("question") or "").strip()


def _step_text(step: Any, at: int) -> str:
  text = step.get("step") if isinstance(step, dict) else None
  if not isinstance(text, str) or not text.strip():
    raise BadRecord("empty_step", f"step {at}: text is {_shown(text)}")
  return text.strip()


def _score(step: dict[str, Any], at: int) -> float:
  value = step.get("score")
  if value is None:
    raise BadRecord("missing_score", f"step {at}: {_shown(step)}")
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise BadRecord("score_not_a_number", f"step {at}: {_shown(value)}")
  if isinstance(value, float) and not math.isfinite(value):
    raise BadRecord("score_not_finite", f"step {at}: {value}")
  if not 0 <= value <= 1:
    raise BadRecord("score_out_of_range", f"step {at}: {_shown(value)}")
  return float(value)


def _measured(step: dict[str, Any], score: float, at: int) -> bool:
  """Returns whether the step had continuations; assumed for a step without counts."""
  # The score must equal correct / total in float64, both being whole numbers.
  correct, total = step.get("num_mc_correct"), step.get("num_mc_total")
  if total is None:
    return True
  counts = (total,) if correct is None else (correct, total)
  agree = all(isinstance(count, int) and not isinstance(count, bool) for count in counts)
  if agree and total == 0:
    agree = score == 0 and correct in (None, 0)
  elif agree:
    agree = total > 0 and (correct is None or (0 <= correct <= total and score == correct / total))
  if not agree:
    detail = f"step {at}: score {score}, but {_shown(correct)} of {_shown(total)} continuations"
    raise BadRecord("count_mismatch", detail)
  return total != 0


def _paper_steps(record: dict[str, Any]) -> list[dict[str, Any]]:
  steps = record.get("steps_with_score")
  return [s if isinstance(s, dict) else {} for s in steps] if isinstance(steps, list) else []


def _as_number(value: Any) -> float | None:
  try:
    return float(value)
  except (TypeError, ValueError, OverflowError):
    return None
