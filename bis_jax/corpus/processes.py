"""Work spread over processes."""

import concurrent.futures
import multiprocessing
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_in_processes(
  function: Callable[[T], R],
  tasks: Sequence[T],
  workers: int,
  done: Callable[[R], object] = lambda result: None,
) -> list[R]:
  """Returns [function(task) for task in tasks], worked out by `workers` processes.

  `done` is called with each result as it comes. Forking is fastest, but only safe while this
  process has a single thread; otherwise processes start afresh. One worker is this process.
  """
  if workers <= 1 or len(tasks) <= 1:
    results = []
    for task in tasks:
      results.append(function(task))
      done(results[-1])
    return results
  alone = threading.active_count() == 1 and "jax" not in sys.modules
  context = multiprocessing.get_context("fork" if alone else "spawn")
  with concurrent.futures.ProcessPoolExecutor(min(workers, len(tasks)), context) as pool:
    futures = [pool.submit(function, task) for task in tasks]
    try:
      for future in concurrent.futures.as_completed(futures):
        done(future.result())
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
    return [future.result() for future in futures]
