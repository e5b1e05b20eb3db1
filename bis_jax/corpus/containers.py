"""Annotation files of any format, in JSON lines, JSON, Parquet or Arrow files, as raw JSON lines.

A file of raw JSON lines is read as it is. Of others, each record becomes a line in that layout, in
their order; a record that can't be is a line that says why. Groups of records are converted alone:
the row groups of a Parquet file, the batches of an Arrow file (as `save_to_disk` of the library
`datasets` writes), and all records of other files. The offset of a line is its byte among the
group's lines, or in a table the number of its row, and the number of the group in the bits above
`_GROUP`.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from bis_jax.console import log
from bis_jax.corpus import formats, records
from bis_jax.corpus.image_root import EMBEDDED
from bis_jax.corpus.reading import (
  BLOCK,
  BOM,
  MAX_LINE,
  SUFFIXES,
  AnnotationError,
  AnnotationFile,
  annotation_files,
)
from bis_jax.corpus.rejections import BadRecord
from bis_jax.files import absolute
from bis_jax.storage import hub_datasets

_DOWNLOADED = (*SUFFIXES, "annotations.zip")
_GROUP = 40  # bits
_ROWS = 8192  # of a table that are worked on at a time
_SNIFFED = 20  # lines of which one must be of a known format
_HEAD = 4 << 20  # bytes of a JSON list that its first record is looked for in
_COLUMNAR = (".parquet", ".arrow")


def sources(
  path: str | os.PathLike, format: str = formats.AUTO, agreement: str = ""
) -> list[AnnotationFile]:
  """Returns the annotation files at a path, each with its format; see `annotation_files`.

  A format other than "auto" is taken for all files. `agreement` is the key of a second MC score,
  see `formats.agreeing`. Raises AnnotationError for a file of no known format.
  """
  found = []
  files = annotation_files(_local(path))
  for file in files:
    name = format if format != formats.AUTO else _recognized(file, alone=len(files) == 1)
    if name is None:
      continue
    if name != formats.RAW or not file.is_jsonl or agreement:
      log.info("%s: %s records", file.name, name)
      file = ConvertedFile(file.name, file.path, file.member, file.size, name, agreement)
    found.append(file)
  if not found:
    raise AnnotationError(f"{path} holds no annotations: no *.json there is a list of records")
  return found


def _local(path: str | os.PathLike) -> str | os.PathLike:
  """Returns a path as it is, and the folder of the annotations of a dataset id of the hub."""
  if not hub_datasets.is_hub_id(str(path)):
    return path
  missing = f"no annotations at {absolute(path)}"
  folder = hub_datasets.download(str(path), missing, [f"*{suffix}" for suffix in _DOWNLOADED])
  if (folder / "annotations.zip").exists():
    return folder / "annotations.zip"
  places = sorted({file.parent for file in pathlib.Path(folder).rglob("*") if file.is_file()})
  if len(places) != 1:
    shown = ", ".join(map(str, places)) or "nothing"
    raise AnnotationError(f"the dataset {path} has annotations in {shown}: name one of them")
  return places[0]


def _recognized(file: AnnotationFile, *, alone: bool) -> str | None:
  """Returns the format of a file; None: a JSON file beside annotations that is something else."""
  seen: dict[str, Any] = {}
  for record in itertools.islice(_sniffed(file), _SNIFFED):
    if name := formats.format_of(record):
      return name
    seen |= record
  if not seen:  # records that are no objects are rejected one by one
    return formats.RAW if file.is_jsonl or alone else None
  if not file.is_jsonl and not file.name.endswith(_COLUMNAR) and not alone:
    return None
  raise AnnotationError(
    f"{file.path} ({file.name}) is of no known format: its first records have the keys "
    f"{', '.join(sorted(map(str, seen)))}; the formats are {formats.known()}. Rename its keys, or name its "
    "format"
  )


def _sniffed(file: AnnotationFile) -> Iterator[dict[str, Any]]:
  if not file.is_jsonl:
    yield from ConvertedFile(file.name, file.path, file.member, file.size, "").first_records()
    return
  with file.open() as stream:
    while line := stream.readline(MAX_LINE):
      with contextlib.suppress(BadRecord):
        yield records.load_object(line.removeprefix(BOM))


@dataclasses.dataclass(frozen=True)
class ConvertedFile(AnnotationFile):
  """A file whose records are converted to raw lines."""

  format: str  # of `formats.FORMATS`
  agreement: str = ""  # key of a second MC score; see `formats.agreeing`

  @property
  def plain(self) -> bool:
    return False

  @property
  def stamp(self) -> tuple[Any, ...]:
    return *super().stamp, self.format, self.agreement

  def spans(self) -> list[tuple[int, int | None]]:
    return [(at << _GROUP, (at + 1) << _GROUP) for at in range(self.groups())]

  def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    last = self.groups() if stop is None else stop >> _GROUP
    for group in range(start >> _GROUP, last):
      at, lines, size = group << _GROUP, [], 0
      for line in self._lines(self.records(group)):
        lines.append(line)
        size += len(line)
        if size >= BLOCK:
          yield at, b"".join(lines)
          at, lines, size = at + size, [], 0
      if lines:
        yield at, b"".join(lines)

  def read_lines(self, offsets: list[int], lengths: list[int]) -> Iterator[bytes]:
    wanted = zip(offsets, lengths, strict=True)
    for group, chosen in itertools.groupby(wanted, lambda pair: pair[0] >> _GROUP):
      if self.is_table:
        yield from self._rows(group, [offset - (group << _GROUP) for offset, _ in chosen])
        continue
      at, lines = group << _GROUP, self._lines(self.records(group))
      for offset, length in chosen:
        line = b""
        while at <= offset:
          line = next(lines, b"")
          if not line:
            break
          at += len(line)
        if at - len(line) != offset or len(line) != length + 1:
          raise self._changed()
        yield line[:-1]

  def _rows(self, group: int, numbers: list[int]) -> Iterator[bytes]:
    """Yields the lines of increasing rows of a table's group."""
    wanted, start = collections.deque(numbers), 0
    with self._table() as table:
      for batch in table.batches(group):
        stop, chosen = start + batch.num_rows, []
        while wanted and wanted[0] < stop:
          chosen.append(wanted.popleft() - start)
        for line in self._lines(batch.take(chosen).to_pylist()) if chosen else ():
          yield line[:-1]
        start = stop
    if wanted:
      raise self._changed()

  def _changed(self) -> AnnotationError:
    return AnnotationError(f"{self.path} ({self.name}) changed while it was read: start again")

  def batches(self, group: int) -> Iterator[tuple[int, Any]]:
    """Yields (number of the first row, RecordBatch) of a table's group."""
    at = group << _GROUP
    with self._table() as table:
      for batch in table.batches(group):
        yield at, batch
        at += batch.num_rows

  def lines_of(self, batch: Any) -> bytes:
    return b"".join(self._lines(batch.to_pylist()))

  def embedded_images(self, group: int) -> Iterator[tuple[str, bytes]]:
    """Yields the references and contents of the images stored in columns; they may repeat."""
    found: list[tuple[str, bytes]] = []
    for record in self.records(group) if self.embeds_images() else ():
      _references(record, lambda name, content: found.append((name, content)))
      yield from found
      found.clear()

  @property
  def is_table(self) -> bool:
    return self.name.endswith(_COLUMNAR)

  @property
  def in_columns(self) -> bool:
    """Whether `tables` may read it."""
    return self.format in (formats.RAW, "dataset") and not self.agreement

  def group_of(self, start: int) -> int:
    return start >> _GROUP

  def embeds_images(self) -> bool:
    if not self.is_table:
      return False
    with self._table() as table:
      types = [table.schema.field(name).type for name in table.schema.names]
      return any("bytes: binary" in str(kind) for kind in types)

  def groups(self) -> int:
    if not self.is_table:
      return 1
    with self._table() as table:
      return table.groups

  def _lines(self, found: Iterable[Any]) -> Iterator[bytes]:
    for record in found:
      try:
        if isinstance(record, BadRecord):
          raise record
        if not isinstance(record, dict):
          raise BadRecord("not_an_object", f"a JSON {type(record).__name__}")
        yield _encoded(formats.agreeing(_converted(record, self.format), self.agreement))
      except BadRecord as error:
        yield msgspec.json.encode({records.REJECTED: [error.reason, error.detail]}) + b"\n"

  def records(self, group: int) -> Iterator[Any]:
    """Yields the records of a group as they are; a BadRecord for a line that holds none."""
    if self.is_table:
      with self._table() as table:
        for batch in table.batches(group):
          yield from batch.to_pylist()
    elif self.is_jsonl or not self._is_list():
      for _, block in AnnotationFile(self.name, self.path, self.member, self.size).blocks():
        for line in block.removesuffix(b"\n").split(b"\n"):
          try:
            yield records.load_object(line.removesuffix(b"\r"))
          except BadRecord as error:
            yield error
    else:
      yield from self._list()

  def first_records(self) -> Iterator[dict[str, Any]]:
    """Yields records of the first group; of a JSON list only the first, if it is not huge."""
    found: Iterable[Any] = () if self.is_table else self.records(0)
    if self.is_table and self.groups():
      with self._table() as table:
        found = next(table.batches(0, _SNIFFED)).to_pylist()
    elif not self.is_table and self._is_list():
      with self.open() as stream, contextlib.suppress(ValueError):
        text = stream.read(_HEAD).decode(errors="ignore")
        at = text.index("[") + 1
        at += len(text[at:]) - len(text[at:].lstrip())
        found = iter([json.JSONDecoder().raw_decode(text, at)[0]])
    yield from (record for record in found if isinstance(record, dict))

  def _is_list(self) -> bool:
    with self.open() as stream:
      return stream.read(4096).removeprefix(BOM).lstrip()[:1] == b"["

  def _list(self) -> list[Any]:
    with self.open() as stream:
      try:
        return json.loads(stream.read())
      except (ValueError, RecursionError) as error:
        raise AnnotationError(
          f"{self.path} ({self.name}) is not a JSON list of records ({error}): get the file again"
        ) from error

  @contextlib.contextmanager
  def _table(self) -> Iterator["_Table"]:
    import pyarrow  # here: it takes longer than a selection from a table

    with self.open() as stream:
      try:
        yield _Table(io.BytesIO(stream.read()) if self.member else stream, self.name)
      except (pyarrow.ArrowInvalid, pyarrow.ArrowSerializationError, OSError) as error:
        raise AnnotationError(
          f"{self.path} ({self.name}) is damaged ({error}): get the file again"
        ) from error


class _Table:
  """A Parquet or Arrow file by groups."""

  def __init__(self, stream: Any, name: str):
    import pyarrow.ipc
    import pyarrow.parquet

    self._parquet, self._arrow = None, None
    if name.endswith(".parquet"):
      self._parquet = pyarrow.parquet.ParquetFile(stream)
      self.schema, self.groups = self._parquet.schema_arrow, self._parquet.num_row_groups
    else:
      self._arrow = pyarrow.ipc.open_stream(stream)
      self.schema, self.groups = self._arrow.schema, 1

  def batches(self, group: int, rows: int = _ROWS) -> Iterator[Any]:
    if self._parquet is not None:
      return self._parquet.iter_batches(rows, row_groups=[group])
    return iter(self._arrow or ())


def _converted(record: dict[str, Any], name: str) -> dict[str, Any]:
  raw = formats.converted(record, name)
  return raw | {"image": _references(raw)}


def _references(record: dict[str, Any], keep: Callable[[str, bytes], object] | None = None) -> Any:
  """Returns the images of a record as references: paths, and digests of those in columns."""
  images = next((record[key] for key in ("images", "image") if record.get(key)), None)
  several = images if isinstance(images, list) else [images]
  for at, image in enumerate(several):
    if isinstance(image, dict):
      content = image.get("bytes")
      several[at] = image.get("path")
      if isinstance(content, bytes):
        several[at] = EMBEDDED + hashlib.blake2b(content, digest_size=16).hexdigest()
        if keep:
          keep(several[at], content)
  return several if isinstance(images, list) else several[0]


def _encoded(record: dict[str, Any]) -> bytes:
  try:
    return msgspec.json.encode(record) + b"\n"
  except UnicodeEncodeError as error:
    raise BadRecord("invalid_utf8", f"half of a surrogate pair: {error.reason}") from None
  except (TypeError, OverflowError, RecursionError) as error:
    raise BadRecord("not_json", str(error)) from None
