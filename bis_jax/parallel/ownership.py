"""The owner of a folder that only one process may use or make at a time."""

import contextlib
import fcntl
import json
import os
import pathlib
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from bis_jax import files
from bis_jax.console import log
from bis_jax.errors import UserError
from bis_jax.storage import filesystem, is_url

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
  # file system's reach other hosts, so the file also holds a record of its owner. A bucket lets only
  # one process replace a generation of it.
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
        f"{what} can't be written ({path}: {error.strerror or error}): name another place, or make this one "
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
    if not _write(path, text, sign) or not (locked or _is_last_writer(path, text)):
      return _read(path)[0] or {"process": "(ending)", "host": "another host", "since": "now"}
    held.push(lock.pop_all())
    return {}


def _lock(path: epath.Path, held: contextlib.ExitStack) -> IO | None:
  """Returns the locked file, or None where files can't be locked; BlockingIOError: it is locked."""
  if is_url(path):
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


def _read(path: epath.Path) -> tuple[dict[str, Any], int]:
  """Returns the record in the file, {} if it holds none, and what a sign of life changes, 0 for none."""
  sign = 0
  try:
    sign = _sign(path)
    text = path.read_text()
    return json.loads(text) if text else {}, sign
  except FileNotFoundError:
    return {}, 0
  except ValueError:
    return {}, sign


def _sign(path: epath.Path) -> int:
  if not is_url(path):
    return os.stat(path).st_mtime_ns
  info = filesystem(path).info(os.fspath(path))
  return int(info.get("generation") or path.stat().mtime)


def _write(path: epath.Path, text: str, sign: int) -> bool:
  """Writes the file unless its last sign of life is another one, where the store can tell."""
  if not hasattr(filesystem(path), "swap"):
    path.write_text(text)
    return True
  try:
    filesystem(path).swap(os.fspath(path), text.encode(), sign)
  except FileExistsError:
    # Of another process; or ours, if the answer to the first attempt was lost.
    return path.exists() and path.read_text() == text
  return True


def _is_last_writer(path: epath.Path, text: str) -> bool:
  if hasattr(filesystem(path), "swap"):
    return True
  time.sleep(_SILENCE / 60)  # of several that write at once, the last one becomes the owner
  return path.read_text() == text


@contextlib.contextmanager
def _signs_of_life(path: epath.Path, text: str) -> Iterator[None]:
  """Gives signs of life during the block, and removes the file afterwards.

  Stops this process if another one has become the owner, since no sign of life got through.
  """
  ended = threading.Event()

  def give() -> None:
    while not ended.wait(_SIGN_OF_LIFE):
      with contextlib.suppress(Exception):  # of any file system: the next one may succeed
        owner, sign = _read(path)
        if owner and owner != json.loads(text):
          log.error(
            "%s is now owned by process %s on %s: stopping", path, owner["process"], owner["host"]
          )
          os.kill(os.getpid(), signal.SIGKILL)  # SIGTERM would save a checkpoint over the new one's
          return
        if is_url(path):
          _write(path, text, sign)
        else:
          os.utime(path)

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
