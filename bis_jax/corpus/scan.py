"""All annotation files, read by several processes: columns, rejections and line positions."""

import collections
import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from bis_jax.console import progress_bar, without_collector
from bis_jax.corpus.columns import BlockReader, Columns, concatenate
from bis_jax.corpus.containers import ConvertedFile, sources
from bis_jax.corpus.formats import AUTO
from bis_jax.corpus.image_root import EMBEDDED, ImageRoot
from bis_jax.corpus.reading import BOM, AnnotationError, AnnotationFile
from bis_jax.corpus.rejections import BadRecord, Rejected
from bis_jax.corpus.score_table import STRICT_OK, ScoreTable
from bis_jax.corpus.workers import Workers

_MOST_LISTED = 1_000_000  # rejected lines of all files
_MOST_LINES = (1 << 31) - 1  # of a file: line numbers are int32
_SMALL = 8 << 20  # bytes; fewer are read in this process


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
  files: tuple[AnnotationFile, ...]  # the sources, sorted by name
  source: np.ndarray  # int16[rows], index into `files`
  columns: Columns  # the rows of all files
  image_sets: list[tuple[str, ...]]  # image references as written; sets may repeat
  rejections: list[Rejected]  # of strict order, in (file name, line) order
  unlisted: collections.Counter[str]  # counts by reason of those that are too many to list
  records: int  # number of lines, including blank ones

  @property
  def strict(self) -> np.ndarray:
    """bool[rows], the rows that strict order ranks."""
    return self.columns.flags & STRICT_OK != 0

  def counts_by_reason(self) -> dict[str, int]:
    """Returns how many lines were rejected for each reason, most frequent first."""
    counts = self.unlisted + collections.Counter(bad.reason for bad in self.rejections)
    return dict(counts.most_common())

  def used_image_sets(self) -> list[int]:
    return np.unique(self.columns.image_set[self.strict]).tolist()

  def reject_missing_images(self, root: ImageRoot) -> "Scan":
    """Returns the scan without the strict rows whose image files do not exist; none is decoded."""
    bad = {}
    for at in self.used_image_sets():
      try:
        for reference in self.image_sets[at]:
          if not reference.startswith(EMBEDDED):
            root.locate(reference)
      except BadRecord as error:
        bad[at] = error
    return self.reject_image_sets(bad)

  def reject_image_sets(self, bad: dict[int, BadRecord]) -> "Scan":
    image_set = self.columns.image_set
    rows = np.flatnonzero(self.strict & np.isin(image_set, list(bad)))
    reasons = [bad[at] for at in image_set[rows].tolist()]
    return self.reject(rows, [(error.reason, error.detail) for error in reasons])

  def table(self, **options: Any) -> ScoreTable:
    """Returns the score table of the rows; options are those of `ScoreTable.from_counts`."""
    c = self.columns
    return ScoreTable.from_counts(
      tuple(file.source for file in self.files),
      c.steps,
      (c.correct, c.total, c.scores),
      source=self.source,
      line=c.line,
      flags=c.flags,
      group=c.group,
      offset=c.offset,
      length=c.length,
      **options,
    )

  def reject(self, rows: np.ndarray, reasons: list[tuple[str, str]]) -> "Scan":
    """Returns the scan with STRICT_OK taken from `rows`, with a (reason, detail) per row."""
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
    """Yields the raw lines of increasing `rows`, without line ends."""
    for source, file in enumerate(self.files):
      chosen = rows[self.source[rows] == source]
      if chosen.size:
        offsets, lengths = self.columns.offset[chosen], self.columns.length[chosen]
        yield from file.read_lines(offsets.tolist(), lengths.tolist())


def scan(
  annotations: str | os.PathLike,
  *,
  format: str = AUTO,
  agreement: str = "",
  whole_lines: bool = False,
  workers: int = 0,
) -> Scan:
  """Reads all annotations once and returns what selection needs of them.

  Image references are checked by name, not by file. Uses about 100 bytes of memory per rollout and
  a block per process. Raises AnnotationError if there are no annotations or a file is damaged.

  Args:
    annotations: see `containers.sources`; a zip is not extracted.
    format: of the records, see `formats`.
    agreement: see `formats.agreeing`.
    whole_lines: whether fingerprints hash every byte of a line (slower), not samples.
    workers: processes; 0 for one per core.
  """
  files = tuple(sources(annotations, format, agreement))
  small = sum(file.size for file in files) < _SMALL
  with Workers(1 if small else workers) as pool:
    return scan_files(files, pool, whole_lines=whole_lines)


def scan_files(files: tuple[AnnotationFile, ...], workers: Workers, *, whole_lines: bool) -> Scan:
  owner = [at for at, file in enumerate(files) for _ in file.spans()]
  tasks = [(file, *span, whole_lines) for file in files for span in file.spans()]
  total = sum(file.size for file in files)
  listed = 0
  with progress_bar("annotations", total, unit="B", unit_scale=True) as bar:

    def done(span: _Span) -> None:
      nonlocal listed
      bar.update(span.size)
      room = max(0, _MOST_LISTED - listed)
      span.unlisted.update(reason for _, reason, _ in span.rejections[room:])
      del span.rejections[room:]
      listed += len(span.rejections)

    spans = workers.map(_scan_span, tasks, done)
  return _join(files, owner, spans, whole_lines)


@dataclasses.dataclass(frozen=True, eq=False)
class _Span:
  """What one task read; line numbers count from the span's first line."""

  columns: Columns
  image_sets: list[tuple[str, ...]]
  rejections: list[tuple[int, str, str]]
  unlisted: collections.Counter[str]
  lines: int
  size: int  # bytes


def _scan_span(task: tuple[AnnotationFile, int, int | None, bool]) -> _Span:
  file, start, stop, whole_lines = task
  reader, size = BlockReader(file.source, whole_lines=whole_lines), 0
  with without_collector():
    if isinstance(file, ConvertedFile) and file.is_table:
      size = file.size // file.groups()
      _scan_group(file, file.group_of(start), reader)
      start = stop = 0
    for offset, block in file.blocks(start, stop):
      marked = start == 0 and not reader.lines and offset == len(BOM)
      reader.read(offset, block, marked=marked)
      size += len(block)
  image_sets = [(images,) if isinstance(images, str) else images for images in reader.image_sets]
  rejections = sorted(reader.rejections)
  return _Span(reader.columns(), image_sets, rejections, reader.unlisted, reader.lines, size)


def _scan_group(file: ConvertedFile, group: int, reader: BlockReader) -> None:
  for offset, batch in file.batches(group):
    line_of = functools.partial(_line_of, file, batch)
    if not (file.in_columns and reader.read_table(offset, batch, line_of)):
      reader.read(offset, file.lines_of(batch), numbered=True)


def _line_of(file: ConvertedFile, batch: Any, row: int) -> bytes:
  return file.lines_of(batch.slice(row, 1)).removesuffix(b"\n")


def _join(
  files: tuple[AnnotationFile, ...], owner: list[int], spans: list[_Span], whole_lines: bool
) -> Scan:
  # `owner` names the file of each span.
  image_sets: list[tuple[str, ...]] = []
  parts, rejections, source = [], [], []
  unlisted: collections.Counter[str] = collections.Counter()
  first = dict.fromkeys(owner, 0)
  for at, span in zip(owner, spans, strict=True):
    c = span.columns
    c.line[:] += np.int32(first[at])
    c.image_set[c.image_set >= 0] += np.int32(len(image_sets))
    parts.append(c)
    image_sets += span.image_sets
    rejections += [Rejected(files[at].source, first[at] + n, *why) for n, *why in span.rejections]
    source.append(np.full(c.line.size, at, np.int16))
    unlisted += span.unlisted
    first[at] += span.lines
    if first[at] > _MOST_LINES:
      raise AnnotationError(f"{files[at].path} has more than {_MOST_LINES:,} lines: split it")
  found = Scan(
    files=files,
    source=np.concatenate([np.zeros(0, np.int16), *source]),
    columns=concatenate(parts),
    image_sets=image_sets,
    rejections=rejections,
    unlisted=unlisted,
    records=sum(first.values()),
  )
  return _reject_duplicates(found, whole_lines)


def _reject_duplicates(found: Scan, whole_lines: bool) -> Scan:
  """Takes STRICT_OK from lines whose bytes are those of an earlier line of the same file."""
  c = found.columns
  strict = np.flatnonzero(found.strict)
  key = c.fingerprint[strict] + found.source[strict].astype(np.uint64)
  ordered = np.sort(key)
  rows = strict[np.isin(key, ordered[1:][ordered[1:] == ordered[:-1]])]
  if not rows.size:
    return found
  # Lines with equal samples are read and compared; hashes of whole lines tell them apart.
  contents = c.fingerprint[rows].tolist() if whole_lines else found.read_lines(rows)
  first: dict[tuple[int, int | bytes], int] = {}
  copies, reasons = [], []
  for row, content in zip(rows.tolist(), contents, strict=True):
    earlier = first.setdefault((found.source[row], content), row)
    if earlier != row:
      copies.append(row)
      reasons.append(("duplicate_line", f"the same as line {c.line[earlier]}"))
  return found.reject(np.array(copies, np.int64), reasons)
