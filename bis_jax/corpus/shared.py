"""Folders that several runs share: made by one process, published whole, checked before use."""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

from etils import epath

from bis_jax import files, storage
from bis_jax.console import log
from bis_jax.errors import UserError
from bis_jax.parallel import ownership

RECORD = "digest.json"  # what a folder was made from, and the size and digest of its files
CHECK = "check"  # key of a record's digest of itself

Digests = dict[str, str]  # {name in the folder: "SIZE DIGEST"}


def digest_of(path: epath.Path) -> str:
  """Returns the size and the digest of a file."""
  with path.open("rb") as file:
    raw: Any = file
    digest = hashlib.file_digest(raw, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return f"{raw.tell()} {digest}"  # epath's stat() takes as long as all of this


def digests_of(folder: epath.PathLike, known: Mapping[str, str] | None = None) -> Digests:
  """Returns the digests of all files; those that are `known` are not read."""
  known, folder = dict(known or {}), epath.Path(folder)
  return known | {
    name: digest_of(folder / name) for name in sorted(_sizes(folder)) if name not in known
  }


def _sizes(folder: epath.Path) -> dict[str, int]:
  if storage.is_url(folder):
    return {name: about["size"] for name, about in storage.listing(folder).items()}
  paths = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
  return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def write_record(path: epath.PathLike, record: dict[str, Any]) -> None:
  files.write_json(path, record | {CHECK: _check(record)})


def read_record(path: epath.Path) -> dict[str, Any] | None:
  """Returns a record; None if the file is missing or not as `write_record` wrote it."""
  try:
    record = json.loads(path.read_bytes())
    return record if record.pop(CHECK) == _check(record) else None
  except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
    return None


def _check(record: dict[str, Any]) -> str:
  return files.digest(json.dumps(record, sort_keys=True))


def damaged_file(
  folder: epath.Path,
  digests: Mapping[str, str],
  by_size: Callable[[str], bool] = lambda name: False,
) -> epath.Path | None:
  """Returns a file that differs from its digest, or from its size alone if `by_size(name)`."""
  sizes = _sizes(folder)
  for name, digest in digests.items():
    path = folder / name
    if sizes.get(name) != int(digest.split()[0]):
      return path
    if not by_size(name) and digest_of(path) != digest:
      return path
  return None


@contextlib.contextmanager
def owner(out: epath.Path) -> Iterator[None]:
  """Makes this process the only one that makes `out`; waits for another one that does."""
  with ownership.owned(out.with_name(f"{out.name}.owner"), str(out), wait=True):
    yield


def made(
  out: epath.PathLike,
  what: str,
  identity: Any,
  make: Callable[[pathlib.Path], None],
  contents: Container[str] | None = None,
) -> None:
  """Lets `make` fill the folder `out`, unless it is there undamaged; makes a damaged one again.

  `identity` is JSON. Raises UserError if `out` was made from another one, or has no record and
  holds other names than `contents`.
  """
  out = epath.Path(out)
  if not _damage(out, what, identity, contents):
    return
  with owner(out):
    damage = _damage(out, what, identity, contents)
    if not damage:  # made by the process that this one waited for
      return
    if out.exists():
      log.warning("%s is damaged: making %s again", damage, what)
    with (
      files.new_folder(out, replace=True) as folder,
      files.written_locally(folder, last=RECORD) as part,
    ):
      make(part)
      write_record(part / RECORD, {"made_from": identity, "files": digests_of(part)})


def _damage(
  out: epath.Path, what: str, identity: Any, contents: Container[str] | None
) -> epath.Path | None:
  """Returns a missing or damaged file or folder, None if there is none."""
  if not out.exists():
    return out
  record = read_record(out / RECORD)
  if record is None:
    names = [path.name for path in out.iterdir()] if out.is_dir() else [out.name]
    if contents is not None and not all(name in contents for name in names):
      raise UserError(f"{out} holds something else than {what}: name another folder")
    return out / RECORD
  if record["made_from"] != identity:
    raise UserError(
      f"{out} holds {what} of {record['made_from']}, not of {identity}: delete it or name another "
      "folder"
    )
  # Of an object store's files only the sizes are compared: it keeps digests of its own.
  damaged = damaged_file(out, record["files"], lambda name: storage.is_url(out))
  if damaged is None:
    log.info("reusing %s in %s", what, out)
  return damaged
