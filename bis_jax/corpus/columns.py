"""Blocks of lines -> columns: what selection needs of a rollout, as arrays.

A block whose lines are right in every point takes the fast way: typed decoding (msgspec), then
checks on arrays. A block with anything unusual in it is split until the unusual lines are alone;
those are read one by one by `records`, which knows the reasons. Both ways give the same columns.
"""

import dataclasses
import hashlib
import itertools
import operator
from typing import Annotated

import msgspec
import numpy as np

from bis_jax.corpus import records
from bis_jax.corpus.rejections import BadRecord
from bis_jax.corpus.score_table import PAPER_OK, STRICT_OK, mix64

_FEW = 8  # lines that are read one by one, and parts of a block that is split
_ABSENT = -(1 << 40)  # stands for a count that is not given


@dataclasses.dataclass(frozen=True, eq=False)
class Columns:
  """The scorable rollouts (paper sense) of some lines, in file order.

  Attributes:
    line: int32[rows], 0-based line numbers.
    offset, length: int64[rows], int32[rows], bytes of the line without its end.
    fingerprint: uint64[rows], equal for equal lines.
    steps: int32[rows], steps with a numeric score.
    scores: float64[sum(steps)], their MC scores.
    measured: bool[sum(steps)], False where a step had no continuations.
    flags: uint8[rows], bits of `score_table`.
    image_set: int32[rows], index into a list of image sets, -1 where strict order looks at none.
  """

  line: np.ndarray
  offset: np.ndarray
  length: np.ndarray
  fingerprint: np.ndarray
  steps: np.ndarray
  scores: np.ndarray
  measured: np.ndarray
  flags: np.ndarray
  image_set: np.ndarray


_EMPTY = Columns(
  line=np.zeros(0, np.int32),
  offset=np.zeros(0, np.int64),
  length=np.zeros(0, np.int32),
  fingerprint=np.zeros(0, np.uint64),
  steps=np.zeros(0, np.int32),
  scores=np.zeros(0, np.float64),
  measured=np.zeros(0, np.bool_),
  flags=np.zeros(0, np.uint8),
  image_set=np.zeros(0, np.int32),
)


def concatenate(parts: list[Columns]) -> Columns:
  """Returns the rows of all parts, one part after the other."""
  return Columns(
    *(
      np.concatenate([getattr(part, field.name) for part in (_EMPTY, *parts)])
      for field in dataclasses.fields(Columns)
    )
  )


class BlockReader:
  """Reads blocks of one source that follow each other; lines count from the first block on.

  Attributes:
    lines: how many lines were read, blank ones included.
    image_sets: {image references as written: number}, in order of first appearance.
    rejections: (line, reason, detail) of what strict order rejects.
  """

  def __init__(self, source: str, *, whole_lines: bool):
    """Starts at line 0. `whole_lines`: fingerprints see every byte of a line, not samples."""
    self.lines = 0
    self.image_sets: dict[str | tuple[str, ...], int] = {}
    self.rejections: list[tuple[int, str, str]] = []
    self._source, self._whole_lines = source, whole_lines
    self._parts: list[Columns] = []

  def columns(self) -> Columns:
    """Returns all rows read so far."""
    return concatenate(self._parts)

  def read(self, offset: int, block: bytes) -> None:
    """Reads whole lines that begin at byte `offset` of the file."""
    ends = _line_ends(block)
    starts = np.concatenate(([0], ends[:-1] + 1))
    part = self._read_typed(block, starts, ends)
    if part is None and ends.size > _FEW:
      cuts = [*starts[:: -(-ends.size // _FEW)].tolist(), len(block)]
      for start, stop in itertools.pairwise(cuts):
        self.read(offset + start, block[start:stop])
      return
    if part is None:
      part = self._read_one_by_one(block, starts, ends)
    if self._whole_lines:
      mark = _hashes(block, part.offset, part.length)
    else:
      mark = _samples(block, part.offset, part.length)
    self._parts.append(
      dataclasses.replace(
        part, line=part.line + np.int32(self.lines), offset=part.offset + offset, fingerprint=mark
      )
    )
    self.lines += ends.size

  def _read_typed(self, block: bytes, starts: np.ndarray, ends: np.ndarray) -> Columns | None:
    """Returns the rows of a block whose lines are all right in every point, else None."""
    data = np.frombuffer(block, np.uint8)
    if not ends[0]:
      return None
    ends = ends - (data[ends - 1] == ord("\r"))
    # Each line is one value: none can go on over a } at a line's end and a { at the next one's start.
    if (data[starts] != ord("{")).any() or (data[ends - 1] != ord("}")).any():
      return None
    try:
      if not block.isascii():  # typed decoding checks the encoding of what it decodes only
        for line in np.flatnonzero(np.maximum.reduceat(data, starts) > 127).tolist():
          block[starts[line] : ends[line]].decode()
      found = _DECODER.decode_lines(block)
      rollouts = list(map(_STEPS, found))
      steps = list(itertools.chain.from_iterable(rollouts))
      scores, correct, total = (
        np.fromiter(map(get, steps), dtype, len(steps)) for get, dtype in _NUMBERS
      )
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError):
      return None
    lengths = np.fromiter(map(len, rollouts), np.int32, len(rollouts))
    image_set = self._image_set_numbers(list(map(_IMAGE, found)))
    if not (
      len(found) == ends.size
      and image_set is not None
      and lengths.all()
      and not any(map(str.isspace, map(_TEXT, steps)))
      and ((scores >= 0) & (scores <= 1)).all()
      and _counts_agree(scores, correct, total)
    ):
      return None
    return Columns(
      line=np.arange(ends.size, dtype=np.int32),
      offset=starts,
      length=(ends - starts).astype(np.int32),
      fingerprint=_EMPTY.fingerprint,
      steps=lengths,
      scores=scores,
      measured=total != 0,
      flags=np.full(ends.size, STRICT_OK | PAPER_OK, np.uint8),
      image_set=image_set,
    )

  def _image_set_numbers(self, images: list[str | tuple[str, ...]]) -> np.ndarray | None:
    """Returns int32[lines], or None if any reference is not plainly inside the image root."""
    new = [image for image in dict.fromkeys(images) if image not in self.image_sets]
    names = [name for image in new for name in ((image,) if type(image) is str else image)]
    joined = "".join(f"\n{name}" for name in names) + "\n"
    if () in new or any(map(joined.__contains__, ("..", "//", "\0", "\n/", "\n\n"))):
      return None
    self.image_sets.update(zip(new, itertools.count(len(self.image_sets))))
    return np.fromiter(map(self.image_sets.__getitem__, images), np.int32, len(images))

  def _read_one_by_one(self, block: bytes, starts: np.ndarray, ends: np.ndarray) -> Columns:
    """Returns the rows of any block and notes what strict order rejects."""
    rows, scores, measured = [], [], []
    for line, start in enumerate(starts.tolist()):
      raw = block[start : ends[line]].removesuffix(b"\r")
      flags, image_set, record = 0, -1, {}
      try:
        record = records.load_object(raw)
        images = records.parse_rollout(record, self._source, line).images
        flags = STRICT_OK
        image_set = self.image_sets.setdefault(_key(images), len(self.image_sets))
      except BadRecord as error:
        self.rejections.append((self.lines + line, error.reason, error.detail))
      row_scores, row_measured = records.paper_scores(record)
      if row_scores:
        flags |= PAPER_OK if records.paper_writes(record) else 0
        rows.append((line, start, len(raw), len(row_scores), flags, image_set))
        scores += row_scores
        measured += row_measured
    line, offset, length, steps, flags, image_set = np.array(rows, np.int64).reshape(-1, 6).T
    return Columns(
      line=line.astype(np.int32),
      offset=offset,
      length=length.astype(np.int32),
      fingerprint=_EMPTY.fingerprint,
      steps=steps.astype(np.int32),
      scores=np.array(scores, np.float64),
      measured=np.array(measured, np.bool_),
      flags=flags.astype(np.uint8),
      image_set=image_set.astype(np.int32),
    )


class _Step(msgspec.Struct, gc=False):
  step: Annotated[str, msgspec.Meta(min_length=1)]
  score: float
  num_mc_correct: int = _ABSENT
  num_mc_total: int = _ABSENT


class _Record(msgspec.Struct, gc=False):
  image: str | tuple[str, ...]
  steps_with_score: list[_Step]


_DECODER = msgspec.json.Decoder(_Record)
_IMAGE = operator.attrgetter("image")
_STEPS = operator.attrgetter("steps_with_score")
_TEXT = operator.attrgetter("step")
_NUMBERS = (
  (operator.attrgetter("score"), np.float64),
  (operator.attrgetter("num_mc_correct"), np.int64),
  (operator.attrgetter("num_mc_total"), np.int64),
)


def _line_ends(block: bytes) -> np.ndarray:
  """Returns int64[lines], where the line ends are; the last line may have none."""
  ends, find = [], block.find
  at = find(b"\n")
  while at >= 0:
    ends.append(at)
    at = find(b"\n", at + 1)
  if not block.endswith(b"\n"):
    ends.append(len(block))
  return np.array(ends)


def _counts_agree(scores: np.ndarray, correct: np.ndarray, total: np.ndarray) -> bool:
  """Returns whether every score is correct / total, 0 where both are 0, or has no counts."""
  with np.errstate(divide="ignore", invalid="ignore"):
    agree = (total > 0) & (correct / total == scores)
  if agree.all():
    return True
  agree |= (correct == 0) & (total == 0) & (scores == 0)
  agree |= (correct == _ABSENT) & (total == _ABSENT)
  return bool(agree.all())


def _key(images: tuple[str, ...]) -> str | tuple[str, ...]:
  """Returns how a set of images stands in `BlockReader.image_sets`: a lone image as a str."""
  return images[0] if len(images) == 1 else images


def _samples(block: bytes, offset: np.ndarray, length: np.ndarray) -> np.ndarray:
  """Returns uint64[rows] from each line's length and three samples of 8 bytes."""
  if not offset.size:
    return _EMPTY.fingerprint
  data = np.frombuffer(block, np.uint8)
  state = length.astype(np.uint64)
  for quarter in (1, 2, 3):
    start = np.minimum(offset + length // 4 * quarter, data.size - 8)  # scorable lines are longer
    state = mix64(state + data[start[:, None] + np.arange(8)].view(np.uint64)[:, 0])
  return state


def _hashes(block: bytes, offset: np.ndarray, length: np.ndarray) -> np.ndarray:
  """Returns uint64[rows], a hash of each line's bytes."""
  lines = (block[at : at + size] for at, size in zip(offset.tolist(), length.tolist(), strict=True))
  digests = [hashlib.blake2b(line, digest_size=8).digest() for line in lines]
  return np.frombuffer(b"".join(digests), np.uint64)
