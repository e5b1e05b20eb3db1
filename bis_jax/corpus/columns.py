"""Blocks of lines -> columns: what selection needs of a rollout, as arrays.

Lines are decoded by type (msgspec) and checked on arrays. A line that fails is read again by
`records`, which knows the reasons. Both ways give the same columns.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import operator
import zlib
from collections.abc import Callable, Container, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np

from bis_jax.corpus import records
from bis_jax.corpus.reading import MAX_LINE
from bis_jax.corpus.rejections import BadRecord
from bis_jax.corpus.score_table import PAPER_OK, PAPER_SKIPS, STRICT_OK, as_counts, mix64

MOST_LISTED = 100_000  # rejected lines of a span or a compressed file; others are counted
ABSENT = -(1 << 40)  # a count that is not given
_IS_SPACE = np.isin(np.arange(256), list(b" \t\n\r\v\f\x1c\x1d\x1e\x1f"))


# One image as its reference, none or several as a tuple.
ImageSet = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Columns:
  """The scorable rollouts (paper sense) of some lines, in file order; steps are ragged."""

  line: np.ndarray  # int32[rows], 0-based line numbers
  offset: np.ndarray  # int64[rows], byte where the line starts
  length: np.ndarray  # int32[rows], bytes of the line without its line end; -1: see `containers`
  fingerprint: np.ndarray  # uint64[rows], equal for equal lines
  steps: np.ndarray  # int32[rows], steps with a numeric score
  correct: np.ndarray  # uint16[sum(steps)]; this and the next two are of `score_table.as_counts`
  total: np.ndarray  # uint16[sum(steps)]
  scores: np.ndarray  # float64, of the steps whose counts are unknown
  flags: np.ndarray  # uint8[rows], bits of `score_table`
  group: np.ndarray  # uint64[rows], equal for rollouts of the same images and question
  image_set: np.ndarray  # int32[rows], index into a list of image sets, -1 unless STRICT_OK


_DTYPES = (np.int32, np.int64, np.int32, np.uint64, np.int32, np.uint16, np.uint16, np.float64)
_DTYPES += (np.uint8, np.uint64, np.int32)
_EMPTY = Columns(*(np.zeros(0, dtype) for dtype in _DTYPES))


def concatenate(parts: list[Columns]) -> Columns:
  names = [field.name for field in dataclasses.fields(Columns)]
  return Columns(
    *(np.concatenate([getattr(part, name) for part in (_EMPTY, *parts)]) for name in names)
  )


class BlockReader:
  """Reads consecutive blocks of one source; lines are numbered from the first block on.

  `lines` counts blank ones too; `image_sets` numbers image references, as written, by their first
  use in a strict row; `rejections` are the (line, reason, detail) of strict order, `MOST_LISTED` at
  most, and `unlisted` the counts of the others by reason.
  """

  def __init__(self, source: str, *, whole_lines: bool):
    """With `whole_lines` fingerprints hash every byte of a line, not samples."""
    self.lines = 0
    self.image_sets: dict[ImageSet, int] = {}
    self.rejections: list[tuple[int, str, str]] = []
    self.unlisted: collections.Counter[str] = collections.Counter()
    self._source, self._whole_lines = source, whole_lines
    self._parts: list[Columns] = []

  def columns(self) -> Columns:
    return concatenate(self._parts)

  def read(
    self, offset: int, block: bytes, *, marked: bool = False, numbered: bool = False
  ) -> None:
    """Reads whole lines that begin at byte `offset`, after a byte order mark if `marked`.

    If they are `numbered`, `offset` is the number of the first, and lengths are -1.
    """
    starts, ends = _line_bounds(block)
    rows = _read_typed(block, starts, ends, self.image_sets)
    if rows.line.size < starts.size:
      is_blank, is_other = _are_blank(block, starts), np.ones(starts.size, bool)
      is_other[rows.line] = False
      blank = np.flatnonzero(is_blank)
      others = np.flatnonzero(is_other & ~is_blank).tolist()
      listed = blank[: MOST_LISTED - len(self.rejections)].tolist()
      for line in listed:
        self._reject(line, "blank_line", f"{ends[line] - starts[line]} bytes of white space")
      self.unlisted["blank_line"] += blank.size - len(listed)
      rows = _merge(
        rows, self._read_one_by_one({at: block[starts[at] : ends[at]] for at in others})
      )
    if marked:
      rows.flags[rows.line == 0] |= PAPER_SKIPS
    start, length = starts[rows.line], (ends - starts)[rows.line]
    mark = (_hashes if self._whole_lines else _samples)(block, start, length)
    if numbered:
      start, length = rows.line, np.full(rows.line.size, -1)
    self._add(rows, offset + start, length, mark)
    self.lines += starts.size

  def read_table(self, offset: int, batch: Any, line_of: Callable[[int], bytes]) -> bool:
    """Reads a RecordBatch whose first row has the number `offset`; False if its types are others.

    `line_of` converts a row to a raw line, without its end.
    """
    from bis_jax.corpus import tables  # imports this module

    found = tables.read(batch, self.image_sets, whole_lines=self._whole_lines)
    if found is None:
      return False
    rows, good = found
    others = np.setdiff1d(np.arange(batch.num_rows), rows.line).tolist()
    marks = np.zeros(batch.num_rows, np.uint64)
    marks[rows.line] = good
    if others:
      lines = {at: line_of(at) for at in others}
      one = np.array([0]), np.array([0])
      for at, line in lines.items():
        one[1][0] = len(line)
        marks[at] = _hashes(line, *one)[0]
      rows = _merge(rows, self._read_one_by_one(lines))
    self._add(rows, offset + rows.line, np.full(rows.line.size, -1), marks[rows.line])
    self.lines += batch.num_rows
    return True

  def _add(self, rows: "Rows", offset: np.ndarray, length: np.ndarray, mark: np.ndarray) -> None:
    correct, total, scores = as_counts(rows.scores, rows.totals)
    self._parts.append(
      Columns(
        line=(rows.line + self.lines).astype(np.int32),
        offset=offset,
        length=length.astype(np.int32),
        fingerprint=mark,
        steps=rows.steps.astype(np.int32),
        correct=correct,
        total=total,
        scores=scores,
        flags=rows.flags.astype(np.uint8),
        group=rows.group,
        image_set=self._numbers(rows.images),
      )
    )

  def _reject(self, line: int, reason: str, detail: str) -> None:
    if len(self.rejections) < MOST_LISTED:
      self.rejections.append((self.lines + line, reason, detail))
    else:
      self.unlisted[reason] += 1

  def _numbers(self, images: list[ImageSet | None]) -> np.ndarray:
    new = [key for key in dict.fromkeys(images) if key is not None and key not in self.image_sets]
    self.image_sets.update(zip(new, itertools.count(len(self.image_sets))))
    return np.array([-1 if key is None else self.image_sets[key] for key in images], np.int32)

  def _read_one_by_one(self, lines: dict[int, bytes]) -> "Rows":
    """Returns the scorable rows among some lines; collects rejections of strict order."""
    rows, scores, totals, groups, images = [], [], [], [], []
    for line, raw in lines.items():
      flags, image_set, record = 0, None, {}
      try:
        record = records.load_object(raw)
        references = records.parse_rollout(record, self._source, line).images
        image_set = references[0] if len(references) == 1 else references
        flags = STRICT_OK
      except BadRecord as error:
        self._reject(line, error.reason, error.detail)
        if error.reason == "not_json":
          with contextlib.suppress(BadRecord):
            record = records.load_object(raw, order="paper")
      row_scores, row_totals = records.paper_scores(record)
      if row_scores:
        flags |= PAPER_OK if records.paper_writes(record) else 0
        rows.append((line, len(row_scores), flags))
        scores += row_scores
        totals += row_totals
        groups.append(_group(raw, image_set or ""))
        images.append(image_set)
    line, steps, flags = np.array(rows, np.int64).reshape(-1, 3).T
    group = np.array(groups, np.uint64)
    scores, totals = np.array(scores, np.float64), np.array(totals, np.int64)
    return Rows(line, steps, scores, totals, flags, group, images)


class Rows(NamedTuple):
  """Rows of a block; `line` is an index into its lines, `images` None unless STRICT_OK."""

  line: np.ndarray
  steps: np.ndarray
  scores: np.ndarray
  totals: np.ndarray  # int64[sum(steps)], continuations; negative: unknown
  flags: np.ndarray
  group: np.ndarray
  images: list[ImageSet | None]


_NULL = msgspec.Raw(b"null")


class _Step(msgspec.Struct, gc=False):
  step: Annotated[str, msgspec.Meta(min_length=1)]
  score: float
  # Negative or huge counts are read one by one, so that no count equals ABSENT.
  num_mc_correct: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)] = ABSENT
  num_mc_total: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)] = ABSENT


class _Question(msgspec.Struct, gc=False):
  question: msgspec.Raw = _NULL
  question_orig: msgspec.Raw = _NULL


class _Record(msgspec.Struct, gc=False):
  steps_with_score: Annotated[list[_Step], msgspec.Meta(min_length=1)]
  image: str | tuple[str, ...] | None = None
  question: msgspec.Raw = _NULL
  question_orig: msgspec.Raw = _NULL


_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_DECODER = msgspec.json.Decoder(_Record)
_QUESTION = msgspec.json.Decoder(_Question)
_IMAGE = operator.attrgetter("image")
_TEXTS = operator.attrgetter("question_orig"), operator.attrgetter("question")
_NO_TEXT = [zlib.crc32(text) for text in (b"null", b'""')]
_STEPS = operator.attrgetter("steps_with_score")
_TEXT = operator.attrgetter("step")
_NUMBERS = (
  (operator.attrgetter("score"), np.float64),
  (operator.attrgetter("num_mc_correct"), np.int64),
  (operator.attrgetter("num_mc_total"), np.int64),
)


def _line_bounds(block: bytes) -> tuple[np.ndarray, np.ndarray]:
  """Returns int64[lines] starts and ends of the lines, without CR LF or LF."""
  data = np.frombuffer(block, np.uint8)
  ends = np.flatnonzero(data == ord("\n"))
  if not block.endswith(b"\n"):
    ends = np.append(ends, len(block))
  starts = np.concatenate(([0], ends[:-1] + 1))
  has_cr = data[ends - 1] == ord("\r")
  return starts, ends - (has_cr & (ends > starts))


def _are_blank(block: bytes, starts: np.ndarray) -> np.ndarray:
  """Returns whether each line is nothing but ASCII white space."""
  return np.logical_and.reduceat(_IS_SPACE[np.frombuffer(block, np.uint8)], starts)


def _decode_block(block: bytes, starts: np.ndarray, ends: np.ndarray) -> list[_Record] | None:
  """Returns the records of all lines, None if any of them is invalid."""
  data = np.frombuffer(block, np.uint8)
  # A record over two lines would be split between a } and a {, which is not JSON.
  if (data[starts] != ord("{")).any() or (data[ends - 1] != ord("}")).any():
    return None
  if (ends - starts).max() >= MAX_LINE:
    return None
  try:
    if not block.isascii():  # the decoder checks the encoding of what it keeps only
      for line in np.flatnonzero(np.maximum.reduceat(data, starts) > 127).tolist():
        block[starts[line] : ends[line]].decode()
    found = _DECODER.decode_lines(block)
  except _UNDECODABLE:
    return None
  return found if len(found) == starts.size else None


def _decode_line(line: bytes) -> _Record | None:
  if len(line) >= MAX_LINE:
    return None
  try:
    line.decode()
    return _DECODER.decode(line)
  except _UNDECODABLE:
    return None


def _read_typed(
  block: bytes, starts: np.ndarray, ends: np.ndarray, known_images: Container[ImageSet]
) -> Rows:
  found = _decode_block(block, starts, ends)
  line = np.arange(starts.size)
  if found is None:
    likely = np.flatnonzero(np.frombuffer(block, np.uint8)[starts] == ord("{")).tolist()
    decoded = {at: _decode_line(block[starts[at] : ends[at]]) for at in likely}
    line = np.array([at for at in likely if decoded[at] is not None], np.int64)
    found = [record for record in decoded.values() if record is not None]
  rollouts = list(map(_STEPS, found))
  steps = list(itertools.chain.from_iterable(rollouts))
  scores, correct, total = (
    np.fromiter(map(get, steps), dtype, len(steps)) for get, dtype in _NUMBERS
  )
  lengths = np.fromiter(map(len, rollouts), np.int64, len(rollouts))
  images, wanting = list(map(_IMAGE, found)), []
  if not all(images):
    images = [image or () for image in images]
    absent = [at for at, image in enumerate(images) if not image]
    wanting = [at for at in absent if any(b"<image" in bytes(get(found[at])) for get in _TEXTS)]
  blank = np.zeros(len(steps), bool)
  if any(map(str.isspace, map(_TEXT, steps))):
    blank = np.fromiter(map(str.isspace, map(_TEXT, steps)), bool, len(steps))
  flags = np.full(line.size, STRICT_OK | PAPER_OK)
  rows = Rows(line, lengths, scores, total, flags, _groups(found, images), images)
  return checked_rows(rows, correct, blank, wanting, known_images)


def checked_rows(
  rows: Rows,
  correct: np.ndarray,
  blank: np.ndarray,
  wanting: list[int],
  known_images: Container[ImageSet],
) -> Rows:
  """Returns the rows that are valid in every respect; those without images are not PAPER_OK.

  Args:
    rows: whose flags are changed.
    correct: int64[sum(steps)], continuations that reach the right answer, or ABSENT.
    blank: bool[sum(steps)], steps of white space alone.
    wanting: indices of rows that have no image, and ask for one.
    known_images: sets that were found to be good before.
  """
  right = (rows.scores >= 0) & (rows.scores <= 1) & ~blank
  right &= _counts_agree(rows.scores, correct, rows.totals)
  images = rows.images
  if not all(images):
    rows.flags[[at for at, image in enumerate(images) if not image]] = STRICT_OK
  new = [key for key in dict.fromkeys(images) if key and key not in known_images]
  odd_images = _odd_images(new)
  if right.all() and not odd_images and not wanting:
    return rows
  wrong = np.append(np.repeat(rows.line, rows.steps)[~right], rows.line[wanting])
  is_odd = np.array([key in odd_images for key in images], bool)
  return _take(rows, np.flatnonzero(~is_odd & ~np.isin(rows.line, wrong)))


def _merge(a: Rows, b: Rows) -> Rows:
  line, steps, scores, totals, flags, group = map(np.concatenate, zip(a[:-1], b[:-1], strict=True))
  both = Rows(line, steps, scores, totals, flags, group, a.images + b.images)
  return _take(both, np.argsort(both.line))


def _take(rows: Rows, index: np.ndarray) -> Rows:
  first, steps = (np.cumsum(rows.steps) - rows.steps)[index], rows.steps[index]
  of_rows = [np.arange(start, start + n) for start, n in zip(first, steps, strict=True)]
  at = np.concatenate([np.zeros(0, np.int64), *of_rows])
  images = [rows.images[row] for row in index.tolist()]
  of_steps, of_rows = (rows.scores[at], rows.totals[at]), (rows.flags[index], rows.group[index])
  return Rows(rows.line[index], steps, *of_steps, *of_rows, images)


def _groups(found: Sequence["_Record | _Question"], images: list[ImageSet]) -> np.ndarray:
  """Returns 64 bits that are equal for the same images and question as written: uint64[records]."""
  of_text = np.fromiter(map(zlib.crc32, map(_TEXTS[0], found)), np.uint64, len(found))
  for row in np.flatnonzero((of_text == _NO_TEXT[0]) | (of_text == _NO_TEXT[1])).tolist():
    of_text[row] = zlib.crc32(found[row].question)
  names = [image if type(image) is str else "\n".join(image) for image in images]
  of_image = np.fromiter(map(zlib.crc32, map(str.encode, names)), np.uint64, len(found))
  return of_image << np.uint64(32) | of_text


def _group(line: bytes, image_set: ImageSet) -> int:
  try:
    return int(_groups([_QUESTION.decode(line)], [image_set])[0])
  except _UNDECODABLE:
    return 0


def _odd_images(image_sets: list[ImageSet]) -> set[ImageSet]:
  """Returns the sets that are empty or have a reference that may be outside the image root."""
  if _are_plain(image_sets):
    return set()
  return {key for key in image_sets if not _are_plain([key])}


def _are_plain(image_sets: list[ImageSet]) -> bool:
  names = [name for key in image_sets for name in ((key,) if isinstance(key, str) else key)]
  joined = "".join(f"\n{name}" for name in names) + "\n"
  return () not in image_sets and not any(
    map(joined.__contains__, ("..", "//", "\0", "\n/", "\n\n"))
  )


def _counts_agree(scores: np.ndarray, correct: np.ndarray, total: np.ndarray) -> np.ndarray:
  """Returns whether each score is correct / total, 0 if both are 0, or has no counts."""
  with np.errstate(divide="ignore", invalid="ignore"):
    agree = (total > 0) & (correct / total == scores)
  if not agree.all():
    agree |= (correct == 0) & (total == 0) & (scores == 0)
    agree |= (correct == ABSENT) & (total == ABSENT)
  return agree


def _samples(block: bytes, offset: np.ndarray, length: np.ndarray) -> np.ndarray:
  # Hashes each line's length and three samples of 8 bytes.
  if not offset.size:
    return _EMPTY.fingerprint
  data = np.frombuffer(block, np.uint8)
  state = length.astype(np.uint64)
  for quarter in (1, 2, 3):
    start = np.minimum(offset + length // 4 * quarter, data.size - 8)  # scorable lines are longer
    state = mix64(state + data[start[:, None] + np.arange(8)].view(np.uint64)[:, 0])
  return state


def _hashes(block: bytes, offset: np.ndarray, length: np.ndarray) -> np.ndarray:
  lines = (block[at : at + size] for at, size in zip(offset.tolist(), length.tolist(), strict=True))
  digests = [hashlib.blake2b(line, digest_size=8).digest() for line in lines]
  return np.frombuffer(b"".join(digests), np.uint64)
