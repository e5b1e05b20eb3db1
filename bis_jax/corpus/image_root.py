"""The image files of a corpus: a folder, or a zip that is not extracted; local or in a bucket.

Nothing outside the root is opened: references are resolved by name, symbolic links must lead to a
place inside, and only regular files are read.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import lzma
import os
import posixpath
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from bis_jax import files, storage
from bis_jax.corpus.rejections import BadRecord, CorpusError

MAX_BYTES = 256 << 20  # of an encoded image
_AT_ONCE = 32  # images that are asked of an object store at the same time
_LISTERS = 4  # threads that list local folders; with more, two cores are slower than with one
_FOLDERS = 32  # that a thread lists in one task
_LOCAL_HEADER = 30  # bytes before the names of a zip's member, which its data follow
_SLACK = 1 << 10  # bytes of those names at most, or the member is read alone

_RELEASE = "VisualPRM400K-v1.1-Raw/"
_FOLDER = "images/"
EMBEDDED = "embedded/"  # before the digest of an image stored in a column: its reference


def candidates(reference: str) -> tuple[str, ...]:
  """Returns the names, relative to the image root, that a reference may mean, in order.

  `VisualPRM400K-v1.1-Raw/<x>` is `<x>`; a bare `images/<x>` is `<x>`, else `nlvr2/images/<x>`, else
  `nlvr2/<x>` (two-image records); anything else is used unchanged. Raises BadRecord
  (image_outside_root).
  """
  if reference.startswith(_RELEASE):
    names = (reference.removeprefix(_RELEASE),)
  elif reference.startswith(_FOLDER):
    name = reference.removeprefix(_FOLDER)
    names = (name, f"nlvr2/images/{name}", f"nlvr2/{name}")
  else:
    names = (reference,)
  if not all(map(files.is_below, names)):
    raise BadRecord("image_outside_root", repr(reference))
  return tuple(map(posixpath.normpath, names))


class ImageRoot:
  """Encoded images by name. Pickles as its path, so worker processes open their own."""

  def __init__(self, path: str | os.PathLike):
    """Opens a folder, or a zip whose members may be in `images/`; CorpusError if there is neither."""
    self.path = epath.Path(path)
    self._url = storage.is_url(self.path)
    self._folder = os.fspath(self.path) if self._url else os.path.realpath(self.path)
    self._zip: zipfile.ZipFile | None = None
    self._members: dict[str, zipfile.ZipInfo] = {}
    self._objects: dict[str, tuple[int, int]] = {}  # size and generation of a bucket's files
    if self.path.is_dir():
      found = storage.listing(self.path).items() if self._url else ()
      self._objects = {name: (a["size"], int(a.get("generation", 0))) for name, a in found}
      return
    if not self.path.is_file():
      raise CorpusError(f"no image folder or zip at {os.path.abspath(self.path)}")
    try:
      self._zip = zipfile.ZipFile(self.path.open("rb") if self._url else self.path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
      raise CorpusError(f"{self.path} is neither a folder nor a zip ({error})") from error
    self._members = {
      member.filename.removeprefix(_FOLDER): member
      for member in self._zip.infolist()
      if not member.is_dir()
    }

  def __reduce__(self):
    found = None if self._url else os.stat(self.path)
    return _opened, (os.fspath(self.path), found and (found.st_size, found.st_mtime_ns))

  def locate(self, reference: str) -> str:
    """Returns the name of the file that a reference means, links resolved.

    Raises BadRecord (image_outside_root or missing_image).
    """
    for name in candidates(reference):
      if self._zip is not None or self._url:
        if name in self._members or name in self._objects:
          return name
        continue
      real = os.path.realpath(os.path.join(self._folder, name))
      if os.path.commonpath((real, self._folder)) != self._folder:
        raise BadRecord("image_outside_root", f"{reference!r} is a link to {real}")
      if os.path.isfile(real):
        located = os.path.relpath(real, self._folder)
        try:
          located.encode()
        except UnicodeEncodeError:
          raise BadRecord("unreadable_image", f"{located!a}: the name is not UTF-8") from None
        return located
    raise BadRecord("missing_image", f"{reference!r} is not in {self.path}")

  def listing(self) -> Iterator[tuple[str, int, int]]:
    """Yields (name, *stamp) of every file and link under the root, without following any."""
    if self._zip is not None or self._url:
      yield from ((name, *self.stamp(name)) for name in self._members or self._objects)
      return
    folders = [""]
    with concurrent.futures.ThreadPoolExecutor(_LISTERS) as pool:
      while folders:
        tasks = [folders[at : at + _FOLDERS] for at in range(0, len(folders), _FOLDERS)]
        parts = list(pool.map(self._inside, tasks))
        folders = [folder for inside, _ in parts for folder in inside]
        yield from itertools.chain.from_iterable(found for _, found in parts)

  def _inside(self, folders: Sequence[str]) -> tuple[list[str], list[tuple[str, int, int]]]:
    """Returns the folders in local folders, and the (name, *stamp) of the files and links."""
    inside, found = [], []
    for folder in folders:
      entries: list[os.DirEntry] = []
      with contextlib.suppress(
        PermissionError
      ):  # its images are then missing, each with its record
        entries = [*os.scandir(os.path.join(self._folder, folder))]
      for entry in entries:
        name = os.path.join(folder, entry.name)
        if entry.is_dir(follow_symlinks=False):
          inside.append(name)
        elif not (entry.is_symlink() and os.path.isdir(entry.path)):  # a link to a folder
          about = entry.stat(follow_symlinks=False)
          if stat.S_ISREG(about.st_mode) or stat.S_ISLNK(about.st_mode):
            found.append((name, about.st_size, about.st_mtime_ns))
    return inside, found

  def stamp(self, name: str) -> tuple[int, int]:
    """Returns size and CRC (zip), generation (bucket) or modification time, to detect changes."""
    if self._zip is not None:
      member = self._members[name]
      return member.file_size, member.CRC
    if self._url:
      return self._objects[name]
    found = os.stat(os.path.join(self._folder, name))
    return found.st_size, found.st_mtime_ns

  def read(self, name: str) -> bytes:
    """Returns the encoded bytes of a located image; raises BadRecord (unreadable_image)."""
    (data,) = self.read_each([name])
    if isinstance(data, BadRecord):
      raise data
    return data

  def read_each(self, names: Sequence[str]) -> Iterator[bytes | BadRecord]:
    """Yields the encoded bytes of located images, or why they can't be read (unreadable_image).

    An object store is asked for many at the same time.
    """
    for at in range(0, len(names), _AT_ONCE):
      several = names[at : at + _AT_ONCE]
      fetched = self._fetch(several) if self._url else [None] * len(several)
      for name, data in zip(several, fetched, strict=True):
        try:
          yield self._read(name, data)
        except BadRecord as error:
          yield error

  def _fetch(self, names: Sequence[str]) -> list[bytes | Exception]:
    """Returns the bytes of files, or of a zip's members with their headers, from an object store."""
    places = [self._place(name) for name in names]
    paths, starts, stops = map(list, zip(*places, strict=True))
    found: Any = storage.filesystem(self.path).cat_ranges(paths, starts, stops, on_error="return")
    for data in found:
      if isinstance(data, ConnectionError | PermissionError):
        raise data
    return found

  def _place(self, name: str) -> tuple[str, int, int]:
    """Returns the object and the range that holds a file; its first byte if it is too large."""
    size = self.stamp(name)[0]
    if self._zip is None:
      return f"{self._folder}/{name}", 0, size if size <= MAX_BYTES else 1
    member, start = self._members[name], self._members[name].header_offset
    size = member.compress_size + _LOCAL_HEADER + _SLACK
    return self._folder, start, start + (size if member.file_size <= MAX_BYTES else 1)

  def _read(self, name: str, fetched: bytes | Exception | None) -> bytes:
    try:
      if self.stamp(name)[0] > MAX_BYTES:
        raise BadRecord("unreadable_image", f"{name}: more than {MAX_BYTES:,} bytes")
      if isinstance(fetched, Exception):
        raise fetched
      if self._zip is not None:
        member = self._members[name]
        found = None if fetched is None else _member_data(member, fetched)
        return self._zip.read(member) if found is None else found
      if fetched is not None:
        return fetched
      with open(os.path.join(self._folder, name), "rb") as file:
        return file.read()
    except (
      OSError,
      EOFError,
      RuntimeError,
      zlib.error,
      lzma.LZMAError,
      zipfile.BadZipFile,
    ) as error:
      raise BadRecord("unreadable_image", f"{name}: {error}") from error


class ImageRoots:
  """The image root, if there is one, and a folder with the images stored in columns."""

  def __init__(self, root: ImageRoot | None, embedded: str | os.PathLike | None = None):
    """`embedded` is a folder of files named by their digests."""
    self._root, self._embedded = root, ImageRoot(embedded) if embedded else None

  def locate(self, reference: str) -> str:
    """Returns the name of the file that a reference means; raises BadRecord."""
    name = reference.removeprefix(EMBEDDED)
    if name != reference and self._embedded:
      return EMBEDDED + self._embedded.locate(name)
    if self._root is None:
      raise BadRecord("missing_image", f"{reference!r}, but no image root is named")
    return self._root.locate(reference)

  def stamp(self, name: str) -> tuple[int, int]:
    root, name = self._of(name)
    return root.stamp(name)

  def read_each(self, names: Sequence[str]) -> Iterator[bytes | BadRecord]:
    """Yields the encoded bytes of located images, or why they can't be read (unreadable_image)."""
    for _, group in itertools.groupby(map(self._of, names), lambda pair: id(pair[0])):
      roots, several = zip(*group, strict=True)
      yield from roots[0].read_each(several)

  def _of(self, name: str) -> tuple[ImageRoot, str]:
    if self._embedded and (name.startswith(EMBEDDED) or not self._root):
      return self._embedded, name.removeprefix(EMBEDDED)
    if self._root is None:
      raise CorpusError(f"image {name!r} was found before, but no image root is named now")
    return self._root, name


def _member_data(member: zipfile.ZipInfo, raw: bytes) -> bytes | None:
  """Returns the content of a zip's member from the bytes at its header; None: it is a rare one."""
  signature, flags, method, names, extra = struct.unpack_from("<I2xHH16xHH", raw)
  start = _LOCAL_HEADER + names + extra
  data = raw[start : start + member.compress_size]
  if signature != 0x04034B50 or flags & 1 or len(data) < member.compress_size:
    return None
  if method == zipfile.ZIP_DEFLATED:
    data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.file_size)
  elif method != zipfile.ZIP_STORED:
    return None
  if zlib.crc32(data) != member.CRC:
    raise zipfile.BadZipFile(f"Bad CRC-32 for file {member.filename!r}")
  return data


def image_size(data: bytes, name: str) -> tuple[int, int]:
  """Returns the upright (height, width) of an encoded image; BadRecord if it does not decode."""
  from bis_jax import images  # imports Pillow

  try:
    return images.upright_size(data, whole=True)
  except images.ImageError as error:
    raise BadRecord("unreadable_image", f"{name}: {error.detail}") from error


@functools.lru_cache(maxsize=1)
def _opened(path: str, stamp: tuple[int, int] | None) -> ImageRoot:
  # Cached: a process reads the directory of a large zip once, not once per task.
  del stamp  # changes when the zip is replaced
  return ImageRoot(path)
