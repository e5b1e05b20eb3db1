"""Paths, atomic writes, JSON lines and digests; local files or any URL that etils.epath opens."""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from bis_jax.errors import UserError


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns an absolute path; `~` is expanded and URLs such as gs:// are unchanged.

  Every path of a user enters through here: Orbax refuses relative ones.
  """
  path = epath.Path(path).expanduser()
  return path if "://" in os.fspath(path) else epath.Path(os.path.abspath(path))


def temporary_name(path: epath.Path) -> epath.Path:
  """Returns a sibling of `path` whose name no other process uses."""
  return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def replacing(path: epath.PathLike, mode: str = "wb") -> Iterator[IO]:
  """Opens a temporary file that replaces `path` once the block succeeds, and is removed otherwise."""
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = temporary_name(path)
  try:
    with part.open(mode) as file:
      yield file
    part.replace(path)
  except BaseException:
    part.unlink(missing_ok=True)
    raise


def write_text(path: epath.PathLike, text: str) -> None:
  """Writes a UTF-8 file atomically."""
  with replacing(path) as file:
    file.write(text.encode())


def write_json(path: epath.PathLike, content: Any) -> None:
  """Writes sorted, indented JSON atomically."""
  write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def new_folder(path: epath.PathLike) -> Iterator[epath.Path]:
  """Yields a temporary folder that is renamed to `path` once the block succeeds.

  It is removed if the block fails. If another process has published `path` meanwhile, that one
  stays and this one is removed: both were made from the same settings.
  """
  path = epath.Path(path)
  part = temporary_name(path)
  part.mkdir(parents=True)
  try:
    yield part
    try:
      part.rename(path)
    except OSError:
      if not path.exists():
        raise
  finally:
    if part.exists():
      part.rmtree()


def read_jsonl(
  path: epath.PathLike, error: type[UserError] = UserError
) -> Iterator[tuple[int, Any]]:
  """Yields (line number from 1, value) of every line that is not blank.

  Raises:
    error: a line is not UTF-8 JSON; the message names file and line.
  """
  for number, line in enumerate(epath.Path(path).read_bytes().split(b"\n"), start=1):
    if not line.strip():
      continue
    try:
      value = json.loads(line)
    except (ValueError, RecursionError) as fault:
      raise error(f"{path} line {number} is not valid JSON: {fault}") from fault
    yield number, value


def digest(*parts: object) -> str:
  """Returns 12 hex digits that identify the `repr` of the parts, for names of cached folders."""
  return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
