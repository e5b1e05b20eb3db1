"""Columns of Parquet and Arrow tables -> columns of selection, without an object per step.

For tables in the formats `dataset` and `raw` whose columns have the plain types that `select` and
most writers give them. What is checked is what `columns` checks; a row that fails, and any other
table, is converted and read record by record.
"""

import hashlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from bis_jax.corpus.columns import ABSENT, ImageSet, Rows, checked_rows
from bis_jax.corpus.score_table import PAPER_OK, STRICT_OK, mix64

_COUNTS = ("num_mc_correct", "num_mc_total")
_TEXTS, _WHOLE = ("string", "large_string"), ("int64", "int32", "int16", "uint8")


def read(
  batch: Any, known_images: dict[ImageSet, int], *, whole_lines: bool
) -> tuple[Rows, np.ndarray] | None:
  """Returns the good rows of a RecordBatch and their fingerprints uint64[rows].

  None if its columns are not of the known types. With `whole_lines` unequal steps have unequal
  fingerprints; otherwise a few may share one.
  """
  column = {name: batch.column(name) for name in batch.schema.names}
  parts, images = _parts(column), _images(column)
  if parts is None or images is None:
    return None
  lengths, texts, scores, correct, total = parts
  starts, data = _text(texts)
  questions = [column[name].to_pylist() for name in ("question_orig", "question") if name in column]
  asked = [next((text for text in several if text), "") for several in zip(*questions, strict=True)]
  group, flags = _groups(asked, images), np.full(lengths.size, STRICT_OK | PAPER_OK)
  sets: list[ImageSet | None] = list(images)
  rows = Rows(np.arange(lengths.size), lengths, scores, total, flags, group, sets)
  wanting = [at for at, text in enumerate(asked) if not images[at] and "<image" in text]
  good = checked_rows(rows, correct, _is_blank(texts, starts, data), wanting, known_images)
  hashes = _fingerprints(lengths, starts, data, scores, total, whole_lines) + mix64(group)
  return good, hashes[good.line]


def _parts(
  column: dict[str, Any],
) -> tuple[np.ndarray, Any, np.ndarray, np.ndarray, np.ndarray] | None:
  """Returns the steps of each row, and of each step text, score and numbers of continuations."""
  texts: Any
  scores: Any
  if {"question", "steps", "mc_scores"} <= column.keys():
    lists = [column["steps"], column["mc_scores"], *(column[k] for k in _COUNTS if k in column)]
    texts, scores = lists[0].flatten(), lists[1].flatten()
    counts = {name: column[name].flatten() for name in _COUNTS if name in column}
  elif "steps_with_score" in column and str(_inner(column["steps_with_score"])).startswith(
    "struct"
  ):
    lists = [column["steps_with_score"]]
    steps = lists[0].flatten()
    fields = {field.name: steps.field(field.name) for field in steps.type}
    if steps.null_count or not {"step", "score"} <= fields.keys():
      return None
    texts, scores = fields["step"], fields["score"]
    counts = {name: fields[name] for name in _COUNTS if name in fields}
  else:
    return None
  sizes = [part.value_lengths() for part in lists]
  if any(size.null_count or not size.equals(sizes[0]) for size in sizes):
    return None
  if str(texts.type) not in _TEXTS or str(scores.type) not in ("double", "float"):
    return None
  if (
    texts.null_count or scores.null_count or any(str(c.type) not in _WHOLE for c in counts.values())
  ):
    return None
  correct, total = (
    counts[name].cast("int64").fill_null(ABSENT).to_numpy(zero_copy_only=False)
    if name in counts
    else np.full(len(texts), ABSENT)
    for name in _COUNTS
  )
  lengths = sizes[0].to_numpy(zero_copy_only=False).astype(np.int64)
  return lengths, texts, scores.to_numpy(zero_copy_only=False).astype(np.float64), correct, total


def _inner(array: Any) -> Any:
  return getattr(array.type, "value_type", array.type)


def _images(column: dict[str, Any]) -> list[ImageSet] | None:
  """Returns the references of each row; None if they are not paths."""
  found = [column[name] for name in ("images", "image") if name in column]
  if any(str(_inner(array)) not in (*_TEXTS, "null") for array in found):
    return None
  sets: list[ImageSet] = []
  rows = len(next(iter(column.values())))
  lists = [_values(array) for array in found] or [[()] * rows]
  for values in zip(*lists, strict=True):
    value = next((value for value in values if value), ())
    if isinstance(value, list):
      if not all(value):
        return None
      value = value[0] if len(value) == 1 else tuple(value)
    sets.append(value)
  return sets


def _values(array: Any) -> list[Any]:
  """Returns the values of a column, a list of one as its only value."""
  if str(array.type).startswith(("list", "large_list")) and not array.null_count:
    flat = array.flatten()
    if len(flat) == len(array) and (array.value_lengths().to_numpy() == 1).all():
      values = flat.to_pylist()
      if all(values):
        return values
  return array.to_pylist()


def _text(texts: Any) -> tuple[np.ndarray, memoryview]:
  """Returns int64[n + 1], where each text starts and the last ends, and the bytes of all."""
  large = texts.cast("large_string")
  _, offsets, data = large.buffers()
  starts = np.frombuffer(offsets, np.int64)[large.offset : large.offset + len(large) + 1]
  return starts, memoryview(data if data is not None else b"")


def _is_blank(texts: Any, starts: np.ndarray, data: memoryview) -> np.ndarray:
  """Returns bool[n]: which texts are nothing but white space."""
  raw = np.frombuffer(data, np.uint8)
  empty = starts[:-1] == starts[1:]
  first = raw[np.minimum(starts[:-1], max(0, raw.size - 1))] if raw.size else np.zeros(0, np.uint8)
  plain = ~empty & (first > 32) & (first < 127) if raw.size else ~empty
  blank = empty.copy()
  for at in np.flatnonzero(~plain & ~empty).tolist():
    blank[at] = not texts[at].as_py().strip()
  return blank


def _groups(questions: Sequence[str], images: Sequence[ImageSet]) -> np.ndarray:
  names = [image if isinstance(image, str) else "\n".join(image) for image in images]
  crc = [
    np.fromiter((zlib.crc32(text.encode()) for text in t), np.uint64, len(t))
    for t in (questions, names)
  ]
  return crc[1] << np.uint64(32) | crc[0]


def _fingerprints(
  lengths: np.ndarray,
  starts: np.ndarray,
  data: memoryview,
  scores: np.ndarray,
  totals: np.ndarray,
  whole_lines: bool,
) -> np.ndarray:
  """Returns uint64[rows], equal for equal steps, scores and numbers of continuations."""
  ends = np.concatenate([[0], np.cumsum(lengths)])
  bounds = starts[ends].tolist()
  texts = map(data.__getitem__, map(slice, bounds[:-1], bounds[1:]))
  if whole_lines:
    digests = [hashlib.blake2b(text, digest_size=8).digest() for text in texts]
    of_text = np.frombuffer(b"".join(digests), np.uint64)
  else:
    of_text = np.fromiter(map(zlib.crc32, texts), np.uint64, lengths.size)
  of_step = mix64(mix64(scores.view(np.uint64)) + totals.astype(np.uint64)) ^ np.diff(
    starts
  ).astype(np.uint64)
  place = np.arange(of_step.size) - np.repeat(ends[:-1], lengths)
  of_step = mix64(of_step + mix64(place.astype(np.uint64)))
  sums = np.zeros(lengths.size, np.uint64)
  np.add.at(sums, np.repeat(np.arange(lengths.size), lengths), of_step)
  return mix64(of_text + sums)
