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


def read(batch: Any, known_images: dict[ImageSet, int]) -> tuple[Rows, np.ndarray] | None:
  """Returns the good rows of a RecordBatch and their fingerprints uint64[rows].

  None if its columns are not of the known types.
  """
  import pyarrow
  import pyarrow.compute

  names = batch.schema.names
  column = {name: batch.column(name) for name in names}
  if {"question", "steps", "mc_scores"} <= column.keys():
    lists = [column["steps"], column["mc_scores"], *(column.get(name) for name in _COUNTS)]
    parts = [None if part is None else part.flatten() for part in lists]
    lengths = [pyarrow.compute.list_value_length(part) for part in lists if part is not None]
  elif "steps_with_score" in column and pyarrow.types.is_struct(_inner(column["steps_with_score"])):
    steps = column["steps_with_score"].flatten()
    fields = {field.name for field in steps.type}
    if steps.null_count or not {"step", "score"} <= fields:
      return None
    keys = ("step", "score", *_COUNTS)
    parts = [steps.field(key) if key in fields else None for key in keys]
    lengths = [pyarrow.compute.list_value_length(column["steps_with_score"])]
  else:
    return None
  texts, scores, *counts = parts
  images = _images(column)
  if images is None or any(
    length.null_count or not length.equals(lengths[0]) for length in lengths
  ):
    return None
  if not pyarrow.types.is_floating(scores.type) or scores.null_count or texts.null_count:
    return None
  if not pyarrow.types.is_string(texts.type) and not pyarrow.types.is_large_string(texts.type):
    return None
  numbers = [_numbers(count, len(texts)) for count in counts]
  if any(number is None for number in numbers):
    return None
  of_rows = lengths[0].to_numpy(zero_copy_only=False).astype(np.int64)
  starts, data = _text(texts)
  questions = [column[name].to_pylist() for name in ("question_orig", "question") if name in column]
  asked = [next((text for text in several if text), "") for several in zip(*questions, strict=True)]
  group = _groups(asked, images)
  score = scores.to_numpy(zero_copy_only=False).astype(np.float64)
  correct, total = numbers
  flags = np.full(len(of_rows), STRICT_OK | PAPER_OK)
  rows = Rows(np.arange(len(of_rows)), of_rows, score, total, flags, group, images)
  good = checked_rows(
    rows,
    correct,
    _is_blank(texts, starts, data),
    [at for at, text in enumerate(asked) if not images[at] and "<image" in text],
    known_images,
  )
  hashes = _fingerprints(of_rows, starts, data, score, total) + mix64(group)
  return good, hashes[good.line]


def _inner(array: Any) -> Any:
  return getattr(array.type, "value_type", array.type)


def _images(column: dict[str, Any]) -> list[ImageSet] | None:
  """Returns the references of each row; None if they are not paths."""
  found = [column[name] for name in ("images", "image") if name in column]
  if any(str(_inner(array)) not in ("string", "large_string", "null") for array in found):
    return None
  sets: list[ImageSet] = []
  rows = len(next(iter(column.values())))
  lists = [array.to_pylist() for array in found] or [[()] * rows]
  for values in zip(*lists, strict=True):
    value = next((value for value in values if value), ())
    if isinstance(value, list):
      if not all(value):
        return None
      value = value[0] if len(value) == 1 else tuple(value)
    sets.append(value)
  return sets


def _numbers(counts: Any, size: int) -> np.ndarray | None:
  if counts is None:
    return np.full(size, ABSENT)
  if str(counts.type) not in ("int64", "int32", "int16", "uint8"):
    return None
  return counts.cast("int64").fill_null(ABSENT).to_numpy(zero_copy_only=False)


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
  lengths: np.ndarray, starts: np.ndarray, data: memoryview, scores: np.ndarray, totals: np.ndarray
) -> np.ndarray:
  """Returns uint64[rows], equal for equal steps, scores and numbers of continuations."""
  ends = np.concatenate([[0], np.cumsum(lengths)])
  bounds = starts[ends].tolist()
  digests = (
    hashlib.blake2b(data[start:stop], digest_size=8).digest()
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
  )
  of_text = np.frombuffer(b"".join(digests), np.uint64)
  of_step = mix64(mix64(scores.view(np.uint64)) + totals.astype(np.uint64)) ^ np.diff(
    starts
  ).astype(np.uint64)
  place = np.arange(of_step.size) - np.repeat(ends[:-1], lengths)
  of_step = mix64(of_step + mix64(place.astype(np.uint64)))
  sums = np.zeros(lengths.size, np.uint64)
  np.add.at(sums, np.repeat(np.arange(lengths.size), lengths), of_step)
  return mix64(of_text + sums)
