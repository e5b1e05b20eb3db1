"""Paths, atomic writes, JSON lines and digests; local files or any URL of etils.epath."""

import concurrent.futures
import contextlib
import errno
import fnmatch
import hashlib
import io
import itertools
import json
import os
import pathlib
import posixpath
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any, Self, TypeVar

import msgspec
from etils import epath

from bis_jax.console import log
from bis_jax.errors import UserError
from bis_jax.storage import failure, filesystem, is_url, require_bucket, upload

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


MAX_JSON = 256 << 20  # bytes of a JSON file or line
_SAVE_SECONDS = 30  # between two uploads of a file that grows
_T = TypeVar("_T")


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns an absolute path; `~` is expanded and URLs such as gs:// are unchanged.

  Raises UserError for a URL that can't be opened.
  """
  # Every path of a user passes through here: Orbax refuses relative ones.
  if is_url(path):
    scheme, _, place = os.fspath(path).partition("://")
    return epath.Path(f"{scheme}://{posixpath.normpath(place)}")
  return epath.Path(os.path.abspath(os.path.expanduser(path)))


def real_path(path: epath.PathLike) -> epath.Path:
  """Returns an absolute path without links."""
  path = absolute(path)
  return path if is_url(path) else epath.Path(os.path.realpath(path))


def is_below(name: object) -> bool:
  """Returns whether a name that a file states is that of a file below a folder, links aside."""
  if not isinstance(name, str) or "\0" in name or posixpath.isabs(name):
    return False
  return posixpath.normpath(name).split("/")[0] != ".."


def size_of(path: epath.PathLike) -> int:
  return filesystem(path).info(os.fspath(path))["size"] if is_url(path) else os.stat(path).st_size


def refuse_overwriting(
  outputs: Mapping[str, epath.PathLike | None],
  inputs: Mapping[str, epath.PathLike | None],
  folders: Mapping[str, epath.PathLike | None] | None = None,
) -> None:
  """Raises UserError for an output that is an input or another output, or is inside a folder of inputs.

  All are named by their flag, such as {"--out": "scores.jsonl"}; empty ones are not set. Links are
  followed. An output may not hold one of `folders` either: it may be replaced as a whole. Nor may
  it be in a place where nothing can be written, or in a bucket that does not exist.
  """
  folders = _real_paths(folders or {})
  others = _real_paths(inputs) | folders
  for name, output in _real_paths(outputs).items():
    if is_url(output):
      require_bucket(output)
    else:
      place = next(p for p in pathlib.Path(output).parents if p.exists())
      if not (place.is_dir() and os.access(place, os.W_OK)):
        raise UserError(
          f"{name}={output}: {place} is not a folder that can be written to: name another {name}"
        )
    for other, path in others.items():
      if output == path or (_exists(output) and _exists(path) and os.path.samefile(output, path)):
        raise UserError(f"{name}={output} is also {other}: name another {name}")
    for other, folder in folders.items():
      if output.startswith(folder + os.sep) and epath.Path(folder).is_dir():
        raise UserError(f"{name}={output} is inside {other}={folder}: name another {name}")
      if folder.startswith(output + os.sep):
        raise UserError(f"{name}={output} holds {other}={folder}: name another {name}")
    others[name] = output


def _real_paths(paths: Mapping[str, epath.PathLike | None]) -> dict[str, str]:
  return {name: os.fspath(real_path(path)) for name, path in paths.items() if path}


def _exists(path: str) -> bool:
  return not is_url(path) and os.path.exists(path)


def temporary_name(path: epath.Path) -> epath.Path:
  """Returns a sibling of `path` whose name no other process uses."""
  owner = f"{socket.gethostname()}-{os.getpid()}"
  return path.with_name(f"{path.name}.{owner}-{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def naming_full_disk(path: epath.PathLike, needed: int = 0) -> Iterator[None]:
  """Turns any library's error about a full disk or a failing bucket into one that names `path`.

  `needed` is the number of bytes to write, 0 if it is not known.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    if any(getattr(error, "errno", 0) == n or os.strerror(n) in str(error) for n in _FULL):
      raise full_disk(path, needed) from error
    if is_url(path) and (unreachable := failure(error)):
      raise unreachable from None
    raise


def full_disk(path: epath.PathLike, needed: int = 0) -> UserError:
  need = f", {needed:,} bytes are needed" if needed else ""
  place = tempfile.gettempdir() if is_url(path) else path  # what is uploaded is a file there first
  return UserError(
    f"no space left to write {path}: {free_bytes(place):,} bytes are free "
    f"{'there' if place == path else f'in {place}'}{need}; make room and run the same command again"
  )


def require_room(path: epath.PathLike, size: int) -> None:
  """Raises UserError, before any work, if there are fewer than `size` bytes for `path`."""
  if free_bytes(path) < size:
    raise full_disk(path, size)


def free_bytes(path: epath.PathLike) -> int:
  """Returns the free bytes where `path` is or will be; a huge number for object stores."""
  path = absolute(path)
  if is_url(path):
    return 2**63
  while not path.exists():
    path = path.parent
  return shutil.disk_usage(path).free


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[IO]:
  """Opens a temporary file that replaces `path` once the block succeeds, and is removed otherwise."""
  path = epath.Path(path)
  if is_url(path):
    with naming_full_disk(path), tempfile.NamedTemporaryFile() as file:
      yield file
      file.flush()
      upload(pathlib.Path(file.name), path)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  part = temporary_name(path)
  with naming_full_disk(path):
    try:
      with part.open("wb") as file:
        yield file
      part.replace(path)
    except BaseException:
      part.unlink(missing_ok=True)
      raise


def write_text(path: epath.PathLike, text: str) -> None:
  with replacing(path) as file:
    file.write(text.encode())


def write_json(path: epath.PathLike, content: Any) -> None:
  """Writes sorted, indented JSON atomically."""
  write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def temporary_folder(path: epath.PathLike) -> Iterator[epath.Path]:
  """Yields a new folder beside `path` that is removed afterwards."""
  # If this process is killed, the next call for the same path on this host removes it.
  path = epath.Path(path)
  _remove_leftovers(path)
  part = temporary_name(path)
  with naming_full_disk(path):
    part.mkdir(parents=True)
    try:
      yield part
    finally:
      part.rmtree(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: epath.PathLike, *, replace: bool = False) -> Iterator[epath.Path]:
  """Yields a temporary folder that is renamed to `path` if the block succeeds, else removed.

  If `path` exists by then, it is removed with `replace`; otherwise it stays and the new one is
  removed. In an object store, where nothing is renamed, the folder is `path` itself, emptied first:
  what says that it is complete must be written last.
  """
  # Another process that has published `path` meanwhile made it from the same settings.
  path = epath.Path(path)
  if is_url(path):
    if replace:
      path.rmtree(missing_ok=True)
    try:
      yield path
    except BaseException:
      path.rmtree(missing_ok=True)
      raise
    return
  with temporary_folder(path) as part:
    yield part
    _follow_umask(part)
    if replace and path.exists():
      old = temporary_name(path)
      path.rename(old)
      part.rename(path)
      old.rmtree()
      return
    if path.is_dir() and not any(path.iterdir()):
      path.rmtree()  # empty folders are not replaced by every file system
    try:
      part.rename(path)
    except OSError:
      if not path.exists():
        raise


def move_folder(folder: epath.Path, target: epath.Path) -> None:
  """Renames a folder; in an object store, where that takes time, every file in it."""
  if is_url(folder):
    filesystem(folder).mv(os.fspath(folder), os.fspath(target), recursive=True)
    return
  target.parent.mkdir(parents=True, exist_ok=True)
  folder.rename(target)


class GrowingFile:
  """A file that is appended to; a context manager.

  Object stores can't append: they get the whole file again, at most every `_SAVE_SECONDS`, and at
  the end.
  """

  def __init__(self, path: epath.Path, size: int):
    """Keeps the first `size` bytes of what is there."""
    self._remote = path if is_url(path) else None
    self._saved = time.monotonic()
    if self._remote:
      self._file: IO[bytes] = tempfile.NamedTemporaryFile()
      self._file.write(path.read_bytes() if size else b"")
    else:
      self._file = open(path, "ab")
    if self._file.tell() > size:
      self._file.truncate(size)
      self._file.seek(size)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    with self._file:
      self._save()

  def write(self, data: bytes) -> None:
    self._file.write(data)

  def flush(self) -> None:
    self._file.flush()
    if time.monotonic() > self._saved + _SAVE_SECONDS:
      self._save()

  def _save(self) -> None:
    self._file.flush()
    if self._remote:
      with naming_full_disk(self._remote):
        upload(pathlib.Path(self._file.name), self._remote)
      self._saved = time.monotonic()


@contextlib.contextmanager
def written_locally(folder: epath.PathLike, last: str = "") -> Iterator[pathlib.Path]:
  """Yields a local folder whose files are in `folder` after the block, `last` at the end.

  It is `folder` itself, or for an object store a temporary one.
  """
  folder = epath.Path(folder)
  if not is_url(folder):
    yield pathlib.Path(folder)
    return
  with naming_full_disk(folder), tempfile.TemporaryDirectory() as temporary:
    yield (local := pathlib.Path(temporary))
    paths = [path for path in local.rglob("*") if path.is_file()]
    first = [path for path in paths if path.name != last]
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
      list(threads.map(lambda path: upload(path, folder / path.relative_to(local)), first))
    for path in {*paths} - {*first}:
      upload(path, folder / path.relative_to(local))


@contextlib.contextmanager
def read_locally(folder: epath.PathLike, *patterns: str) -> Iterator[pathlib.Path]:
  """Yields a local folder with the files of `folder` whose names match one of the patterns.

  It is `folder` itself, or for an object store a temporary one, for libraries that read no URLs.
  """
  if not is_url(folder):
    yield pathlib.Path(folder)
    return
  with tempfile.TemporaryDirectory() as temporary:
    for path in epath.Path(folder).iterdir():
      if any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns):
        (pathlib.Path(temporary) / path.name).write_bytes(path.read_bytes())
    yield pathlib.Path(temporary)


def _follow_umask(folder: epath.Path) -> None:
  # Some libraries, such as safetensors, write temporary files that only their owner may read.
  if is_url(folder):
    return
  mode = os.stat(folder).st_mode & 0o666
  for file in pathlib.Path(folder).rglob("*"):
    if file.is_file():
      file.chmod(mode)


def _remove_leftovers(path: epath.Path) -> None:
  # Of processes of this host that no longer run.
  if is_url(path) or not path.parent.is_dir():
    return
  name = rf"{re.escape(path.name)}\.{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]+\.part"
  for sibling in path.parent.iterdir():
    owner = re.fullmatch(name, sibling.name)
    if owner and sibling.is_dir() and not is_running(int(owner[1])):
      log.info("removing %s, left by a process that was killed", sibling)
      sibling.rmtree(missing_ok=True)


def is_running(process: int) -> bool:
  try:
    os.kill(process, 0)
  except (ProcessLookupError, OverflowError):
    return False
  except PermissionError:
    pass  # another user's
  return True


def parse_json(raw: bytes) -> Any:
  """Returns the value of UTF-8 JSON; NaN and Infinity are numbers, as in Python's json.

  Raises:
    ValueError: it is not JSON, nested too deep, or a text holds half of a surrogate pair.
  """
  try:
    text = raw.decode()
    value = json.loads(text)
    if "\\u" in text:  # nothing else makes half of a pair
      json.dumps(value, ensure_ascii=False).encode()
  except RecursionError as error:
    raise ValueError("nested too deep") from error
  except UnicodeEncodeError as error:
    raise ValueError(f"half of a surrogate pair, {error.object[error.start]!a}") from error
  return value


def json_bytes(path: epath.PathLike) -> bytes:
  """Returns the content of a file; raises ValueError, without reading on, if it is too long."""
  with epath.Path(path).open("rb") as file:
    raw = file.read(MAX_JSON + 1)
  if len(raw) > MAX_JSON:
    raise ValueError(f"more than {MAX_JSON:,} bytes")
  return raw


def read_json(
  path: epath.PathLike,
  remedy: str,
  form: type[_T] = dict[str, Any],
  error: type[UserError] = UserError,
) -> _T:
  """Returns what a JSON file holds as a msgspec type; raises `error` with the remedy if it cannot."""
  try:
    return msgspec.convert(parse_json(json_bytes(path)), form)
  except (ValueError, msgspec.ValidationError) as fault:
    raise error(f"{path} is damaged ({fault}): {remedy}") from fault


def read_lines(
  path: epath.PathLike, error: type[UserError] = UserError
) -> Iterator[tuple[int, bytes]]:
  """Yields (number from 1, line) with its end; raises `error` for a line longer than `MAX_JSON`."""
  with epath.Path(path).open("rb") as opened:
    raw: Any = opened
    file = io.BufferedReader(raw) if is_url(path) else raw  # fsspec's lines have no limit
    for number in itertools.count(1):
      line = file.readline(MAX_JSON + 1)
      if len(line) > MAX_JSON:
        raise error(f"{path} line {number} has more than {MAX_JSON:,} bytes")
      if not line:
        return
      yield number, line


def read_jsonl(
  path: epath.PathLike, error: type[UserError] = UserError
) -> Iterator[tuple[int, Any]]:
  """Yields (line number from 1, value) of every line that is not blank.

  Raises `error`, naming file and line, if a line is not UTF-8 JSON.
  """
  for number, line in read_lines(path, error):
    if not line.strip():
      continue
    try:
      value = parse_json(line)
    except ValueError as fault:
      raise error(f"{path} line {number} is not valid JSON: {fault}") from fault
    yield number, value


def read_log(path: epath.PathLike) -> list[dict[str, Any]]:
  """Returns the objects of a file of JSON lines that a run appends to; [] if there is no file.

  A damaged line is left out with a warning: a kill or a full disk can cut the last one off.
  """
  path, objects = epath.Path(path), []
  raw = path.read_bytes() if path.exists() else b""
  for number, line in enumerate(raw.split(b"\n"), start=1):
    if not line.strip():
      continue
    try:
      value = parse_json(line)
    except ValueError as fault:
      value = fault
    if isinstance(value, dict):
      objects.append(value)
    else:
      log.warning("%s line %d is damaged and left out: %s", path, number, value)
  return objects


_NOTES = "digests.json"


def note_digests(*paths: epath.Path) -> None:
  """Notes the digests of files that a run has written, in `digests.json` of their folder."""
  for folder in {path.parent for path in paths}:
    sizes = {path: size_of(path) for path in paths if path.parent == folder}
    found = {path.name: _start_digest(path, size) for path, size in sizes.items()}
    write_json(folder / _NOTES, _noted(folder) | found)


def changed_files(folder: epath.Path, *names: str) -> list[epath.Path]:
  """Returns which files are not as they were noted, of all or those named; each with a warning.

  They may have grown since.
  """
  noted = _noted(folder)
  changed = []
  for name in names or noted:
    size = noted.get(name, "").partition(" ")[0]
    if size.isdigit() and _start_digest(folder / name, int(size)) != noted[name]:
      changed.append(folder / name)
      log.warning(
        "%s is not as the run wrote it: put it back, unless you changed it", folder / name
      )
  return changed


def _noted(folder: epath.Path) -> dict[str, str]:
  try:
    noted = read_json(folder / _NOTES, "", dict[str, str])
    return {name: digest for name, digest in noted.items() if is_below(name)}
  except (UserError, OSError):
    return {}


def _start_digest(path: epath.Path, size: int) -> str:
  start = path.read_bytes()[:size] if path.exists() else b""
  return f"{size} {hashlib.sha256(start).hexdigest()}"


def digest(*parts: object) -> str:
  """Returns 12 hex digits that identify the `repr` of the parts, for names of cached folders."""
  return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
