"""The image files of a corpus: a folder, or a zip that is not extracted.

Nothing outside the root is opened: references are resolved by name, symbolic links must lead to a
place inside, and only regular files are read.
"""

import functools
import lzma
import os
import pathlib
import posixpath
import stat
import zipfile
import zlib
from collections.abc import Iterator

from bis_jax import images
from bis_jax.corpus.rejections import BadRecord, CorpusError

MAX_BYTES = 256 << 20  # of an encoded image

_RELEASE = "VisualPRM400K-v1.1-Raw/"
_FOLDER = "images/"


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
  if "\0" in reference or posixpath.isabs(names[0]):
    raise BadRecord("image_outside_root", repr(reference))
  names = tuple(map(posixpath.normpath, names))
  if any(name == ".." or name.startswith("../") for name in names):
    raise BadRecord("image_outside_root", repr(reference))
  return names


class ImageRoot:
  """Encoded images by name. Pickles as its path, so worker processes open their own."""

  def __init__(self, path: str | os.PathLike):
    """Opens a folder, or a zip whose members may be in `images/`; CorpusError if there is neither."""
    self.path = pathlib.Path(path)
    self._folder = os.path.realpath(self.path)
    self._zip: zipfile.ZipFile | None = None
    if self.path.is_dir():
      return
    if not self.path.is_file():
      raise CorpusError(f"no image folder or zip at {self.path.absolute()}")
    try:
      self._zip = zipfile.ZipFile(self.path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
      raise CorpusError(f"{self.path} is neither a folder nor a zip ({error})") from error
    self._members = {
      member.filename.removeprefix(_FOLDER): member
      for member in self._zip.infolist()
      if not member.is_dir()
    }

  def __reduce__(self):
    found = self.path.stat()
    return _opened, (self.path, (found.st_size, found.st_mtime_ns))

  def locate(self, reference: str) -> str:
    """Returns the name of the file that a reference means, links resolved.

    Raises BadRecord (image_outside_root or missing_image).
    """
    for name in candidates(reference):
      if self._zip is not None:
        if name in self._members:
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
    if self._zip is not None:
      yield from ((name, *self.stamp(name)) for name in self._members)
      return
    for folder, _, names in os.walk(self._folder):
      for name in names:
        path = os.path.join(folder, name)
        found = os.lstat(path)
        if stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode):
          yield os.path.relpath(path, self._folder), found.st_size, found.st_mtime_ns

  def stamp(self, name: str) -> tuple[int, int]:
    """Returns the size and CRC (zip) or modification time of a file, to detect changes."""
    if self._zip is not None:
      member = self._members[name]
      return member.file_size, member.CRC
    found = os.stat(os.path.join(self._folder, name))
    return found.st_size, found.st_mtime_ns

  def read(self, name: str) -> bytes:
    """Returns the encoded bytes of a located image; raises BadRecord (unreadable_image)."""
    try:
      if self.stamp(name)[0] > MAX_BYTES:
        raise BadRecord("unreadable_image", f"{name}: more than {MAX_BYTES:,} bytes")
      if self._zip is not None:
        return self._zip.read(self._members[name])
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


def image_size(data: bytes, name: str) -> tuple[int, int]:
  """Returns the upright (height, width) of an encoded image; BadRecord if it does not decode."""
  try:
    return images.upright_size(data, whole=True)
  except images.ImageError as error:
    raise BadRecord("unreadable_image", f"{name}: {error.detail}") from error


@functools.lru_cache(maxsize=1)
def _opened(path: pathlib.Path, stamp: tuple[int, int]) -> ImageRoot:
  # Cached: a process reads the directory of a large zip once, not once per task.
  del stamp  # changes when the zip is replaced
  return ImageRoot(path)
