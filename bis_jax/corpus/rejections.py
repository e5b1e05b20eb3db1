"""Why records are rejected; `rejections.jsonl` has one `Rejected` per line."""

import dataclasses
import json
from collections.abc import Iterable

from etils import epath

from bis_jax import files
from bis_jax.errors import UserError

REASONS = {
  "invalid_utf8": "bytes that are not UTF-8, or half of a surrogate pair",
  "too_long": "a line of more than 16 MiB",
  "blank_line": "nothing but white space",
  "not_json": "not JSON",
  "not_an_object": "JSON, but not an object",
  "other_format": "a record that lacks the keys of its file's format",
  "not_text": "a question that is not a string",
  "no_steps": "steps are missing, none or not a list",
  "wrong_label_count": "another number of labels or counts than of steps",
  "empty_step": "a step without text",
  "missing_score": "a step without a score",
  "score_not_a_number": "a score that is not a JSON number",
  "score_not_finite": "a score that is NaN or infinite",
  "score_out_of_range": "a score outside [0, 1]",
  "count_mismatch": "a score that is not num_mc_correct / num_mc_total",
  "no_image": "no image, though the question has a placeholder for one",
  "image_outside_root": "an image path that leaves the image root",
  "missing_image": "no such image file",
  "unreadable_image": "an image file that does not decode",
  "duplicate_line": "the same bytes as an earlier line of the file",
}


class CorpusError(UserError):
  """Inputs that cannot be prepared, or a folder that is not a prepared corpus."""


class BadRecord(ValueError):
  """An invalid record: a reason of `REASONS` and what was found."""

  def __init__(self, reason: str, detail: str):
    super().__init__(f"{reason}: {detail}")
    self.reason, self.detail = reason, detail

  def __reduce__(self):
    return BadRecord, (self.reason, self.detail)


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Rejected:
  """A rejected record, or (with a name of `records.NOTES`) a noted one."""

  source: str  # stem of the annotation file
  line: int  # 0-based
  reason: str  # a name of REASONS
  detail: str  # what was found

  @property
  def id(self) -> str:
    return f"{self.source}:{self.line}"


def write_jsonl(rejections: Iterable[Rejected], path: epath.PathLike) -> None:
  """Writes one JSON object per line: source, line, reason, detail."""
  with files.replacing(path) as file:
    for rejected in rejections:
      file.write(json.dumps(dataclasses.asdict(rejected)).encode() + b"\n")
