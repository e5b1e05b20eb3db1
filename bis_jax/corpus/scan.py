"""Annotations -> numbers: a few columns a rollout, what was rejected, and where each line lies.

A block of lines that is right in every point takes the fast way: typed decoding (msgspec), checks
and statistics on arrays. A block with anything unusual in it is read again line by line by
`records`, which knows the reasons. Both ways give the same columns.
"""

import dataclasses
import gc
import hashlib
import itertools
import operator
import os
from collections.abc import Iterator

import msgspec
import numpy as np

from bis_jax.corpus import records
from bis_jax.corpus.processes import ProgressBar, Workers
from bis_jax.corpus.reading import AnnotationFile, annotation_files
from bis_jax.corpus.rejections import BadRecord, Rejected
from bis_jax.corpus.score_table import PAPER_OK, STRICT_OK, ScoreTable, mix64

_ABSENT = -(1 << 40)  # stands for a count that is not given
_SMALL = 8 << 20  # bytes; fewer are read in this process
_NONE = np.zeros(0, np.int64)


class _Step(msgspec.Struct, gc=False):
  step: str
  score: float
  num_mc_correct: int = _ABSENT
  num_mc_total: int = _ABSENT


class _Record(msgspec.Struct, gc=False):
  image: str | tuple[str, ...]
  steps_with_score: list[_Step]


_decode = msgspec.json.Decoder(_Record).decode
_IMAGE = operator.attrgetter("image")
_STEPS = operator.attrgetter("steps_with_score")


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
    image_set: int32[rows], index into the list of image sets, -1 where the record has no images.
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


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
  """All annotation files, read.

  Attributes:
    files: the sources, in file-name order.
    source: int16[rows], index into `files`.
    columns: the rows of all files.
    image_sets: tuples of image references as written; `columns.image_set` points here.
    rejections: what strict order rejects, in (file name, line) order.
    records: how many lines there were, blank ones included.
  """

  files: tuple[AnnotationFile, ...]
  source: np.ndarray
  columns: Columns
  image_sets: list[tuple[str, ...]]
  rejections: list[Rejected]
  records: int

  def table(
    self,
    *,
    tau: float = 0.0,
    unmeasured: str = "negative",
    rollout: np.ndarray | None = None,
    digest: str = "",
  ) -> ScoreTable:
    """Returns the score table of the rows; see `ScoreTable.from_steps` for the arguments."""
    c = self.columns
    return ScoreTable.from_steps(
      tuple(file.source for file in self.files),
      source=self.source,
      line=c.line,
      lengths=c.steps,
      scores=c.scores,
      measured=c.measured,
      flags=c.flags,
      rollout=rollout,
      offset=c.offset,
      length=c.length,
      tau=tau,
      unmeasured=unmeasured,
      digest=digest,
    )

  def reject(self, rows: np.ndarray, reasons: list[tuple[str, str]]) -> "Scan":
    """Returns the scan with STRICT_OK taken from `rows`, for a (reason, detail) each."""
    flags = self.columns.flags.copy()
    flags[rows] &= ~np.uint8(STRICT_OK)
    rejections = self.rejections + [
      Rejected(self.files[self.source[row]].source, int(self.columns.line[row]), *why)
      for row, why in zip(rows.tolist(), reasons, strict=True)
    ]
    order = {file.source: at for at, file in enumerate(self.files)}
    rejections.sort(key=lambda rejected: (order[rejected.source], rejected.line))
    return dataclasses.replace(
      self, columns=dataclasses.replace(self.columns, flags=flags), rejections=rejections
    )

  def read_lines(self, rows: np.ndarray) -> Iterator[bytes]:
    """Yields the raw lines of rising `rows`, without their ends."""
    for source, file in enumerate(self.files):
      chosen = rows[self.source[rows] == source]
      if chosen.size:
        offsets, lengths = self.columns.offset[chosen], self.columns.length[chosen]
        yield from file.read_lines(offsets.tolist(), lengths.tolist())


def scan(annotations: str | os.PathLike, *, whole_lines: bool = False, workers: int = 0) -> Scan:
  """Reads all annotations once and returns what selection needs of them.

  Image references are checked by name, not by file. Memory: the columns (about 100 bytes a
  rollout) and a block per process.

  Args:
    annotations: a folder of *.jsonl, *.jsonl.gz, *.jsonl.zst, or a zip of them, not extracted.
    whole_lines: whether fingerprints are to depend on every byte of a line (slower), not on samples.
    workers: processes; 0 for one a core.

  Raises:
    reading.AnnotationError: no annotations there, or a damaged file.
  """
  files = tuple(annotation_files(annotations))
  small = sum(file.size for file in files) < _SMALL
  with Workers(1 if small else workers) as pool:
    return scan_files(files, pool, whole_lines=whole_lines)


def scan_files(files: tuple[AnnotationFile, ...], workers: Workers, *, whole_lines: bool) -> Scan:
  """Returns the scan of `files`; see `scan`."""
  owner = [at for at, file in enumerate(files) for _ in file.spans()]
  tasks = [(file, *span, whole_lines) for file in files for span in file.spans()]
  total = sum(file.size for file in files)
  with ProgressBar("annotations", total, unit="B", unit_scale=True) as bar:
    spans = workers.map(_scan_span, tasks, lambda span: bar.update(span.size))
  return _join(files, owner, spans)


@dataclasses.dataclass(frozen=True, eq=False)
class _Span:
  """What one task read. Line numbers count from the span's first line."""

  columns: Columns
  image_sets: list[tuple[str, ...]]
  rejections: list[tuple[int, str, str]]
  lines: int
  size: int  # bytes


def _scan_span(task: tuple[AnnotationFile, int, int | None, bool]) -> _Span:
  file, start, stop, whole_lines = task
  fingerprints = _whole_fingerprints if whole_lines else _sampled_fingerprints
  parts, rejections, image_sets = [], [], ImageSets()
  lines = size = 0
  gc.disable()  # decoded records hold no cycles
  try:
    for offset, block in file.blocks(start, stop):
      raw, starts = _split(block)
      part = _fast(raw, image_sets)
      if part is None:
        part, bad = _slow(raw, image_sets, file.source)
        rejections += [(lines + line, reason, detail) for line, reason, detail in bad]
      at = starts[part.line]
      parts.append(
        dataclasses.replace(
          part,
          line=part.line + lines,
          offset=at + offset,
          fingerprint=fingerprints(block, at, part.length),
        )
      )
      lines += starts.size
      size += len(block)
  finally:
    gc.enable()
  return _Span(_concatenate(parts), list(image_sets.numbers), rejections, lines, size)


def _split(block: bytes) -> tuple[list[bytes], np.ndarray]:
  """Returns the lines of a block without their ends, and int64 where each starts."""
  raw = block.split(b"\n")
  if not raw[-1]:
    raw.pop()
  starts = np.zeros(len(raw) + 1, np.int64)
  np.cumsum(np.fromiter(map(len, raw), np.int64, len(raw)) + 1, out=starts[1:])
  if any(map(bytes.endswith, raw, itertools.repeat(b"\r"))):
    raw = [line.removesuffix(b"\r") for line in raw]
  return raw, starts[:-1]


class ImageSets:
  """Numbers the sets of image references in order of first use.

  Attributes:
    numbers: the number of each set.
  """

  def __init__(self) -> None:
    self.numbers: dict[tuple[str, ...], int] = {}
    self._plain: dict[str | tuple[str, ...], int] = {}  # as written, found plainly inside the root

  def number(self, names: tuple[str, ...]) -> int:
    """Returns the number of a set."""
    return self.numbers.setdefault(names, len(self.numbers))

  def plain_numbers(self, images: list[str | tuple[str, ...]]) -> np.ndarray | None:
    """Returns int32[images], or None if any is not plainly inside the image root."""
    found = list(map(self._plain.get, images))
    if None in found:
      for image in images:
        if image in self._plain:
          continue
        names = (image,) if type(image) is str else image
        if not names or not all(map(_is_plain, names)):
          return None
        self._plain[image] = self.number(names)
      found = map(self._plain.get, images)
    return np.fromiter(found, np.int32, len(images))


def _is_plain(name: str) -> bool:
  return not (not name or name[0] == "/" or ".." in name or "//" in name or "\0" in name)


def _fast(raw: list[bytes], image_sets: ImageSets) -> Columns | None:
  """Returns the columns of lines that are all right in every point, else None.

  Offsets and fingerprints are left to the caller.
  """
  try:
    for line in itertools.filterfalse(bytes.isascii, raw):
      line.decode()  # typed decoding checks only what it decodes
    found = list(map(_decode, raw))
    steps = list(map(_STEPS, found))
    lengths = np.fromiter(map(len, steps), np.int32, len(steps))
    steps = list(itertools.chain.from_iterable(steps))
    scores, correct, total = (
      np.fromiter(map(operator.attrgetter(name), steps), dtype, len(steps))
      for name, dtype in (
        ("score", np.float64),
        ("num_mc_correct", np.int64),
        ("num_mc_total", np.int64),
      )
    )
  except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError):
    return None
  texts = list(map(operator.attrgetter("step"), steps))
  image_set = image_sets.plain_numbers(list(map(_IMAGE, found)))
  right = (
    image_set is not None
    and lengths.all()
    and all(texts)
    and not any(map(str.isspace, texts))
    and ((scores >= 0) & (scores <= 1)).all()
    and _counts_agree(scores, correct, total)
  )
  if not right:
    return None
  return Columns(
    line=np.arange(len(raw), dtype=np.int32),
    offset=_NONE,
    length=np.fromiter(map(len, raw), np.int32, len(raw)),
    fingerprint=_NONE,
    steps=lengths,
    scores=scores,
    measured=total != 0,
    flags=np.full(len(raw), STRICT_OK | PAPER_OK, np.uint8),
    image_set=image_set,
  )


def _counts_agree(scores: np.ndarray, correct: np.ndarray, total: np.ndarray) -> bool:
  """Returns whether every score is correct / total, 0 where both are 0, or has no counts."""
  given = (correct >= 0) & (total > 0)
  with np.errstate(divide="ignore", invalid="ignore"):
    agree = given & (correct / total == scores)
  agree |= (correct == 0) & (total == 0) & (scores == 0)
  agree |= (correct == _ABSENT) & (total == _ABSENT)
  return bool(agree.all())


def _slow(
  raw: list[bytes], image_sets: ImageSets, source: str
) -> tuple[Columns, list[tuple[int, str, str]]]:
  """Returns the columns of any lines, and (line, reason, detail) of what strict order rejects."""
  rows, scores, measured, bad = [], [], [], []
  for line, text in enumerate(raw):
    flags, image_set = 0, -1
    try:
      record = records.load_object(text)
    except BadRecord as error:
      bad.append((line, error.reason, error.detail))
      continue
    try:
      rollout = records.parse_rollout(record, source, line)
    except BadRecord as error:
      bad.append((line, error.reason, error.detail))
    else:
      flags = STRICT_OK
      image_set = image_sets.number(rollout.images)
    row_scores, row_measured = records.paper_scores(record)
    if row_scores:
      flags |= PAPER_OK if records.paper_writes(record) else 0
      rows.append((line, len(text), len(row_scores), flags, image_set))
      scores += row_scores
      measured += row_measured
  line, length, steps, flags, image_set = np.array(rows, np.int64).reshape(-1, 5).T
  return Columns(
    line=line.astype(np.int32),
    offset=_NONE,
    length=length.astype(np.int32),
    fingerprint=_NONE,
    steps=steps.astype(np.int32),
    scores=np.array(scores, np.float64),
    measured=np.array(measured, np.bool_),
    flags=flags.astype(np.uint8),
    image_set=image_set.astype(np.int32),
  ), bad


def _sampled_fingerprints(block: bytes, start: np.ndarray, length: np.ndarray) -> np.ndarray:
  """Returns uint64[rows] from each line's length and the 8 bytes at its middle."""
  data = np.frombuffer(block.ljust(8), np.uint8)
  at = np.minimum(start + length // 2, data.size - 8)
  middle = np.ascontiguousarray(data[at[:, None] + np.arange(8)]).view(np.uint64)[:, 0]
  return mix64(mix64(middle) + length.astype(np.uint64))


def _whole_fingerprints(block: bytes, start: np.ndarray, length: np.ndarray) -> np.ndarray:
  """Returns uint64[rows], a hash of each line's bytes."""
  bounds = zip(start.tolist(), length.tolist(), strict=True)
  digests = [hashlib.blake2b(block[at : at + size], digest_size=8).digest() for at, size in bounds]
  return np.frombuffer(b"".join(digests), np.uint64)


def _concatenate(parts: list[Columns]) -> Columns:
  if not parts:
    empty = np.zeros(0, np.int64)
    parts = [Columns(**dict.fromkeys((f.name for f in dataclasses.fields(Columns)), empty))]
  return Columns(
    *(
      np.concatenate([getattr(part, field.name) for part in parts])
      for field in dataclasses.fields(Columns)
    )
  )


def _join(files: tuple[AnnotationFile, ...], owner: list[int], spans: list[_Span]) -> Scan:
  """Returns the scan of all files: line numbers within the file, one list of image sets."""
  image_sets: dict[tuple[str, ...], int] = {}
  parts, rejections, source = [], [], []
  first = dict.fromkeys(owner, 0)
  for at, span in zip(owner, spans, strict=True):
    known = np.array([image_sets.setdefault(s, len(image_sets)) for s in span.image_sets] + [-1])
    parts.append(
      dataclasses.replace(
        span.columns,
        line=span.columns.line + np.int32(first[at]),
        image_set=known[span.columns.image_set].astype(np.int32),
      )
    )
    rejections += [Rejected(files[at].source, first[at] + n, *why) for n, *why in span.rejections]
    source.append(np.full(span.columns.line.size, at, np.int16))
    first[at] += span.lines
  found = Scan(
    files=files,
    source=np.concatenate([np.zeros(0, np.int16), *source]),
    columns=_concatenate(parts),
    image_sets=list(image_sets),
    rejections=rejections,
    records=sum(first.values()),
  )
  return _reject_duplicates(found)


def _reject_duplicates(found: Scan) -> Scan:
  """Takes STRICT_OK from lines whose bytes stand earlier in the same file."""
  c = found.columns
  strict = np.flatnonzero(c.flags & STRICT_OK)
  key = c.fingerprint[strict] + found.source[strict].astype(np.uint64)
  order = np.argsort(key, kind="stable")
  alike = key[order[1:]] == key[order[:-1]]
  suspects = np.unique(order[np.flatnonzero(alike)[:, None] + np.arange(2)])
  rows = strict[suspects]
  if not rows.size:
    return found
  seen: dict[tuple[int, bytes], int] = {}
  copies, reasons = [], []
  for row, raw in zip(rows.tolist(), found.read_lines(rows), strict=True):
    earlier = seen.setdefault((found.source[row], raw), row)
    if earlier != row:
      copies.append(row)
      reasons.append(("duplicate_line", f"the same as line {c.line[earlier]}"))
  return found.reject(np.array(copies, np.int64), reasons)
