"""Work spread over processes, with a progress bar."""

import concurrent.futures
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")


class Workers:
  """A pool of processes that starts when it is first needed and ends with the `with` block.

  Forking is fastest, but only safe while this process has a single thread; otherwise the processes
  start afresh. One worker is this process itself.
  """

  def __init__(self, count: int = 0):
    """Plans `count` processes; 0 for one a core."""
    self.count = count or os.cpu_count() or 1
    self._pool: concurrent.futures.ProcessPoolExecutor | None = None

  def __enter__(self) -> "Workers":
    return self

  def __exit__(self, *error: object) -> None:
    if self._pool:
      self._pool.shutdown(cancel_futures=True)

  def map(
    self,
    function: Callable[[T], R],
    tasks: Sequence[T],
    done: Callable[[R], object] = lambda result: None,
  ) -> list[R]:
    """Returns [function(task) for task in tasks]; calls `done` with each result as it comes."""
    if self.count <= 1 or len(tasks) <= 1:
      results = []
      for task in tasks:
        results.append(function(task))
        done(results[-1])
      return results
    if self._pool is None:
      alone = threading.active_count() == 1 and "jax" not in sys.modules
      context = multiprocessing.get_context("fork" if alone else "spawn")
      self._pool = concurrent.futures.ProcessPoolExecutor(self.count, context)
    futures = [self._pool.submit(function, task) for task in tasks]
    for future in concurrent.futures.as_completed(futures):
      done(future.result())
    return [future.result() for future in futures]


class ProgressBar(tqdm):
  """tqdm on a terminal, nothing elsewhere; without tqdm's own thread, so that we may fork."""

  monitor_interval = 0

  def __init__(self, description: str, total: int, **options: object):
    """Starts a bar of `total` units."""
    super().__init__(desc=description, total=total, disable=None, **options)
