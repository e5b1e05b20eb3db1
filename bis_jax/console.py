"""What commands show on the terminal (log lines and progress bars, on stderr), and how they stop."""

import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import flags
from absl import logging as absl_logging

from bis_jax.errors import UserError

log = logging.getLogger("bis_jax")
_SECONDS_TO_LEAVE = 20
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, run the same command again


def progress_bar(description: str, total: int, **options: Any) -> Any:
  """Returns a tqdm bar on a terminal, nothing elsewhere; one inside another disappears when complete."""
  from tqdm import tqdm

  tqdm.monitor_interval = 0  # its own thread would make forking worker processes unsafe
  options: dict[str, Any] = {"disable": None, "leave": None} | options
  return tqdm(desc=description, total=total, **options)


class _Handler(logging.Handler):
  def emit(self, record: logging.LogRecord) -> None:
    from tqdm import tqdm

    tqdm.write(self.format(record), file=sys.stderr)  # above the progress bars


def start_logging() -> None:
  """Shows this package's messages and libraries' warnings; with `--verbosity=0` all messages."""
  if not flags.FLAGS["verbosity"].present:
    absl_logging.set_verbosity(absl_logging.WARNING)  # of the root logger too
  root = logging.getLogger()
  root.removeHandler(absl_logging.get_absl_handler())
  if not any(isinstance(handler, _Handler) for handler in root.handlers):
    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    root.addHandler(handler)
  log.setLevel(logging.INFO)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
  """Turns the garbage collector off, for work that makes millions of objects without cycles."""
  enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if enabled:
      gc.enable()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
  """SIGTERM raises KeyboardInterrupt in the block, as Ctrl-C does."""
  before = signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def start_worker(*_: int) -> None:
  """Makes a worker process end when its parent has ended in any way, and leave Ctrl-C to it."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  if parent:
    parent.join()
    os._exit(1)


def _leave() -> None:
  """Ends a process with 1 whose main thread has ended but others, which it waits for, have not.

  TensorStore tries for a quarter of an hour to write to a bucket that does not answer.
  """
  threading.main_thread().join()
  time.sleep(_SECONDS_TO_LEAVE)
  sys.stdout.flush()
  os._exit(1)


@contextlib.contextmanager
def command(name: str, argv: list[str], flag: str = "") -> Iterator[None]:
  """Runs a command; a user's error exits with its message, a stop signal with `STOPPED`.

  If `flag`, an example for the message, is given, `argv` must hold flags only.
  """
  start_logging()
  gc.freeze()  # imports leave a million objects, which every later collection would visit
  try:
    if flag and len(argv) > 1:
      raise UserError(f"unexpected argument {argv[1]!r}; use flags such as {flag}")
    with stoppable():
      yield
  except (UserError, OSError) as error:
    threading.Thread(target=_leave, daemon=True).start()
    sys.exit(f"{name}: {error}")
  except KeyboardInterrupt:
    print(f"{name}: stopped by a signal: run the same command again", file=sys.stderr)
    sys.exit(STOPPED)
