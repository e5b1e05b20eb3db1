"""Annotation files as blocks of whole lines: plain, gzip or zstd, in a folder or in a zip.

Both may be local or in an object store.

A file is read in blocks of about `BLOCK` bytes, and of a line no more than `MAX_LINE`, so memory does
not grow with the file. Plain files
can be read from any byte on and are split into spans for several processes; a compressed file or a
zip's member is one span. Offsets are those of the uncompressed bytes.
"""

import contextlib
import dataclasses
import gzip
import io
import lzma
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any, BinaryIO, cast

import zstandard
from etils import epath

from bis_jax import storage
from bis_jax.corpus.rejections import CorpusError
from bis_jax.files import absolute

BLOCK = 1 << 20  # bytes: few enough for the cache, enough to spread the cost of a numpy call
MAX_LINE = 16 << 20  # bytes; of a longer line only the first are read, and it is rejected
SPAN = 16 << 20  # bytes of a plain file that one task reads
_ZSTD_BYTES = 2 << 10  # at most 32,000 times as many come out
BOM = b"\xef\xbb\xbf"  # allowed once, at the start of a file

_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_JSON = (".json", ".json.gz", ".json.zst")
SUFFIXES = (*_JSONL, *_JSON, ".parquet", ".arrow")
_LIKE_THEM = re.compile(r"\.(jsonl(\.\w+)?|parquet|arrow)$", re.IGNORECASE)
_DAMAGE = (
  *(EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError),
  *(gzip.BadGzipFile, zipfile.BadZipFile),
)


class AnnotationError(CorpusError):
  """Annotation files that are missing, not named as expected, or damaged."""


@dataclasses.dataclass(frozen=True)
class AnnotationFile:
  name: str  # for example "nlvr2_en_20240910.jsonl"
  path: epath.Path  # the file, or the zip that contains it
  member: str | None  # its name in the zip
  size: int  # bytes, uncompressed in a zip

  @property
  def source(self) -> str:
    """The name without its suffixes."""
    suffix = next(s for s in sorted(SUFFIXES, key=len, reverse=True) if self.name.endswith(s))
    return self.name.removesuffix(suffix)

  @property
  def is_jsonl(self) -> bool:
    return self.name.endswith(_JSONL)

  @property
  def plain(self) -> bool:
    """Whether it is stored uncompressed, so that it can be read from any byte."""
    return self.member is None and self.name.endswith(".jsonl")

  @property
  def _has_descriptor(self) -> bool:
    """Whether `open` gives the file itself, whose seeks are cheap."""
    return self.plain and not storage.is_url(self.path)

  @property
  def stamp(self) -> tuple[str, int, int]:
    """Name, size and modification time (of the zip, if any), to detect changes."""
    if storage.is_url(self.path):
      return self.name, self.size, int(self.path.stat().mtime)
    return self.name, self.size, os.stat(self.path).st_mtime_ns

  @contextlib.contextmanager
  def open(self) -> Iterator[BinaryIO]:
    """Opens the uncompressed bytes; AnnotationError if the data are damaged or truncated."""
    place = self.path if self.member is None else f"{self.path}, member {self.member}"
    with contextlib.ExitStack() as stack:
      try:
        yield self._open(stack)
      except _DAMAGE as error:
        raise AnnotationError(f"{place} is damaged ({error}): get the file again") from error
      except RuntimeError as error:  # encrypted, or compressed by a method that Python lacks
        raise AnnotationError(
          f"{place} can't be read ({error}): extract the zip and name the folder"
        ) from error

  def _open(self, stack: contextlib.ExitStack) -> Any:
    if self.member is None:
      stream = stack.enter_context(self.path.open("rb"))
    else:
      archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(self.path.open("rb"))))
      stream = stack.enter_context(archive.open(self.member))
    if self._has_descriptor:
      return stream
    if self.name.endswith(".gz"):
      return io.BufferedReader(stack.enter_context(gzip.GzipFile(fileobj=stream)), BLOCK)
    if self.name.endswith(".zst"):
      return io.BufferedReader(_ZstdStream(stream), BLOCK)
    return io.BufferedReader(cast(io.RawIOBase, stream), BLOCK)

  def spans(self) -> list[tuple[int, int | None]]:
    """Returns byte ranges (start, stop) for `blocks` that together hold every line once."""
    if not self.plain:
      return [(0, None)]
    return [(at, min(at + SPAN, self.size)) for at in range(0, self.size, SPAN)]

  def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, whole lines) of all lines that begin in bytes [start, stop)."""
    with self.open() as stream:
      at = start
      if start:
        stream.seek(start - 1)
        at += _rest_of_line(stream, None if stop is None else stop - start + 1) - 1
      while stop is None or at < stop:
        block, end = self._whole_lines(stream, at, BLOCK if stop is None else min(BLOCK, stop - at))
        if not block:
          return
        skip = len(BOM) if at == 0 and block.startswith(BOM) else 0
        if len(block) > skip:
          yield at + skip, block[skip:]
        at = end

  def _whole_lines(self, stream: BinaryIO, at: int, size: int) -> tuple[bytes, int]:
    """Returns `size` bytes from `at`, where `stream` is, to the end of a line; and where it ends.

    The last line is cut if it is longer than `MAX_LINE`.
    """
    # Of a local file the end is found first: joining two parts would copy every block.
    if local := self._has_descriptor:
      stream.seek(at + size - 1)
      size += len(stream.readline(MAX_LINE)) - 1
      stream.seek(at)
    block = stream.read(size)
    if not (local or block.endswith(b"\n")):
      block += stream.readline(MAX_LINE)
    cut = 0 if block.endswith(b"\n") else _rest_of_line(stream)
    return block, at + len(block) + cut

  def read_lines(self, offsets: list[int], lengths: list[int]) -> Iterator[bytes]:
    """Yields the bytes at increasing offsets."""
    with self.open() as stream:
      at, has_descriptor = 0, self._has_descriptor
      for offset, length in zip(offsets, lengths, strict=True):
        if has_descriptor:
          line = os.pread(stream.fileno(), length, offset)
        elif self.plain:
          stream.seek(offset)
          line = stream.read(length)
        else:
          while skipped := stream.read(min(BLOCK, offset - at)):
            at += len(skipped)
          line = stream.read(length)
          at = offset + length
        if len(line) < length:
          raise AnnotationError(f"{self.path} ({self.name}) changed while it was read: start again")
        yield line


def annotation_files(path: str | os.PathLike) -> list[AnnotationFile]:
  """Returns the annotation files of a folder or a zip (or one file), sorted by name.

  Raises AnnotationError if there are none, or two of them have the same stem.
  """
  path = epath.Path(path)
  if path.is_dir():
    names = _names_in(path)
    files = [
      AnnotationFile(name, path / name, None, (path / name).stat().length)
      for name in _annotations(path, names)
    ]
  elif path.is_file() and path.name.endswith(SUFFIXES):
    files = [AnnotationFile(path.name, path, None, path.stat().length)]
  elif path.is_file() and _is_zip(path):
    try:
      with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
    except zipfile.BadZipFile as error:
      raise AnnotationError(f"{path} is damaged ({error}): get the file again") from error
    files = [
      AnnotationFile(pathlib.PurePosixPath(name).name, path, name, members[name].file_size)
      for name in _annotations(path, members)
    ]
  elif path.exists():
    raise AnnotationError(f"{path} is neither a folder, nor a zip, nor a file {SUFFIXES}")
  else:
    raise AnnotationError(f"no annotations at {absolute(path)}: name a folder or annotations.zip")
  if not files:
    raise AnnotationError(f"{path} holds no annotation file: expected names like x{SUFFIXES[0]}")
  files.sort(key=lambda file: file.name)
  by_source: dict[str, AnnotationFile] = {}
  for file in files:
    other = by_source.setdefault(file.source, file)
    if other is not file:
      raise AnnotationError(
        f"{path}: {other.name} and {file.name} are one source by their names: remove one of them"
      )
  return files


def _is_zip(path: epath.Path) -> bool:
  with path.open("rb") as file:
    return zipfile.is_zipfile(file)


def _names_in(folder: epath.Path) -> list[str]:
  """Returns the names of the files in a folder; AnnotationError for a file that can't be read."""
  if storage.is_url(folder):
    return _annotations(folder, [path.name for path in folder.iterdir()])
  names = []
  for place, folders, found in os.walk(folder):
    folders[:] = [name for name in folders if not name.startswith((".", "__"))]
    for name in _annotations(place, found):
      path = pathlib.Path(place, name)
      if path.parent != pathlib.Path(folder) and name.endswith(_JSON):
        continue
      if not path.is_file():
        raise AnnotationError(f"{path} is not a file, or a broken link: remove it")
      if path.parent != pathlib.Path(folder):
        raise AnnotationError(f"{path} is in a subfolder: name that folder, or move the file")
      names.append(name)
  return names


def _annotations(place: str | os.PathLike, paths: Iterable[str]) -> list[str]:
  """Returns the paths of annotation files; AnnotationError for names that are nearly theirs."""
  found = []
  for path in paths:
    name = pathlib.PurePosixPath(path).name
    if name.startswith(".") or not (_LIKE_THEM.search(name) or name.endswith(_JSON)):
      continue
    if not name.endswith(SUFFIXES):
      raise AnnotationError(f"{place} holds {name!r}: rename it to one of *{', *'.join(SUFFIXES)}")
    try:
      name.encode()
    except UnicodeEncodeError:
      raise AnnotationError(f"{place} holds {name!a}, which is not UTF-8: rename it") from None
    found.append(path)
  return found


def _rest_of_line(stream: BinaryIO, most: int | None = None) -> int:
  """Reads to the end of the line, or about `most` bytes of it; returns how many bytes it read."""
  size = 0
  while most is None or size < most:
    piece = stream.readline(BLOCK)
    size += len(piece)
    if not piece or piece.endswith(b"\n"):
      break
  return size


class _ZstdStream(io.RawIOBase):
  """Decompresses zstd frames; unlike zstandard's own reader it detects a file cut short."""

  def __init__(self, stream: IO[bytes]):
    self._stream, self._ready = stream, memoryview(b"")
    self._frame: Any = None  # the decompressor inside a frame

  def readable(self) -> bool:
    return True

  def readinto(self, out: Any, /) -> int:
    while not self._ready:
      data = self._stream.read(_ZSTD_BYTES)
      if not data:
        if self._frame is not None:
          raise EOFError("the last zstd frame has no end")
        return 0
      ready = b""
      while data:
        self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
        ready += self._frame.decompress(data)
        data = self._frame.unused_data if self._frame.eof else b""
        self._frame = None if self._frame.eof else self._frame
      self._ready = memoryview(ready)
    count = min(len(out), len(self._ready))
    out[:count], self._ready = self._ready[:count], self._ready[count:]
    return count
