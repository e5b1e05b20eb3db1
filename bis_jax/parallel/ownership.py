"""The owner of a folder that only one process may use or make at a time."""

import contextlib
import fcntl
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from bis_jax import files
from bis_jax.console import log
from bis_jax.errors import UserError

# An owner changes its file's modification time this often. If it does not for as long as
# `_SILENCE`, an owner that is not known to be alive or dead otherwise counts as dead.
_SIGN_OF_LIFE = 10.0  # seconds
_SILENCE = 60.0


class OwnedError(UserError):
  """Another process owns the folder; the message says which one, and since when."""


@contextlib.contextmanager
def owned(path: epath.PathLike, what: str, *, wait: bool = False) -> Iterator[None]:
  """Makes this process the owner of `what` for the block; the small file `path` says so.

  Raises OwnedError if another process is the owner, or waits until it ends with `wait`; UserError
  if the file can't be written. A killed owner is replaced: at once if it ran on this host, after
  a minute of silence otherwise.
  """
  # The kernel undoes a lock when its process ends. Object stores have none, and not every shared
  # file system's reach other hosts, so the file also holds a record of its owner.
  path, told = files.absolute(path), ""
  record = {
    "host": socket.gethostname(),
    "process": os.getpid(),
    "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    "boot": _boot(),
    "token": secrets.token_hex(8),
  }
  text = json.dumps(record) + "\n"
  with contextlib.ExitStack() as held:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      while owner := _take(path, text, held):
        name = "process {process} on {host}, since {since}".format(**owner)
        if not wait:
          raise OwnedError(f"{what} is in use by {name}: wait until it ends, or stop it")
        if name != told:
          log.info("waiting: %s is in use by %s", what, name)
        told = name
        time.sleep(0.2)
    except OSError as error:
      raise UserError(
        f"{what} can't be written ({path}: {error.strerror}): name another place, or make this one "
        "writable"
      ) from error
    held.enter_context(_signs_of_life(path, text))
    yield


def _take(path: epath.Path, text: str, held: contextlib.ExitStack) -> dict[str, Any]:
  """Returns the record of the owner; {}: this process is the owner now, until `held` is closed."""
  with contextlib.ExitStack() as lock:
    try:
      locked = _lock(path, lock)
    except BlockingIOError:
      for _ in range(20):
        if owner := _read(path)[0]:
          return owner
        time.sleep(0.1)  # it has just begun to write
      return {"process": "(starting)", "host": "this host", "since": "now"}
    owner, sign = _read(path)
    here = owner.get("boot") == _boot()
    if owner and not (here and (locked or not files.is_running(owner["process"]))):
      log.info("waiting for a sign of life of process %(process)s on %(host)s", owner)
      silent_at = time.monotonic() + _SILENCE
      while time.monotonic() < silent_at:
        time.sleep(_SILENCE / 60)
        found, new_sign = _read(path)
        if new_sign != sign:
          return found
    path.write_text(text)
    if not locked:
      time.sleep(_SILENCE / 60)  # of several that write at once, the last one becomes the owner
      found, _ = _read(path)
      if found != json.loads(text):
        return found
    held.push(lock.pop_all())
    return {}


def _lock(path: epath.Path, held: contextlib.ExitStack) -> IO | None:
  """Returns the locked file, or None where files can't be locked; BlockingIOError: it is locked."""
  if "://" in os.fspath(path):
    return None
  while True:
    file = held.enter_context(open(path, "a"))
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise
    except OSError:
      return None
    if path.exists() and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
      return file  # otherwise the last owner has just removed it


def _read(path: epath.Path) -> tuple[dict[str, Any], tuple]:
  """Returns the record in the file, {} if it holds none, and what a sign of life changes."""
  try:
    text = path.read_text()
    record = json.loads(text) if text else {}
    changed = path.stat().mtime if "://" in os.fspath(path) else os.stat(path).st_mtime_ns
    return record, (text, changed)
  except (FileNotFoundError, ValueError):
    return {}, ()


@contextlib.contextmanager
def _signs_of_life(path: epath.Path, text: str) -> Iterator[None]:
  """Gives signs of life during the block, and removes the file afterwards."""
  ended = threading.Event()

  def give() -> None:
    while not ended.wait(_SIGN_OF_LIFE):
      with contextlib.suppress(Exception):  # of any file system: the next one may succeed
        if path.read_text() == text:
          path.write_text(text) if "://" in os.fspath(path) else os.utime(path)

  thread = threading.Thread(target=give, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    with contextlib.suppress(OSError):
      if path.read_text() == text:
        path.unlink()


def _boot() -> str:
  # Names this host from one start of it to the next; containers have host names of their own.
  number = pathlib.Path("/proc/sys/kernel/random/boot_id")
  return f"{socket.gethostname()} {number.read_text().strip() if number.exists() else ''}"
