"""Work spread over processes of this machine, or over machines by Apache Beam."""

import concurrent.futures
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from etils import epath

from bis_jax import files
from bis_jax.console import start_worker
from bis_jax.corpus.rejections import CorpusError

T = TypeVar("T")
R = TypeVar("R")


class Workers:
  """A pool of `count` processes, started when first needed; they end with the `with` block."""

  def __init__(self, count: int = 0):
    """`count` is 0 for one per core, 1 for this process itself."""
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
    """Returns [function(task) for task in tasks]; calls `done` with each result in that order."""
    results = []
    for result in self.imap(function, tasks):
      results.append(result)
      done(result)
    return results

  def imap(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterable[R]:
    """Yields the results in the order of the tasks."""
    if self.count <= 1 or len(tasks) <= 1:
      return map(function, tasks)
    if self._pool is None:
      # Forking is fastest, but safe only while this process has a single thread.
      alone = threading.active_count() == 1 and "jax" not in sys.modules
      context = multiprocessing.get_context("fork" if alone else "spawn")
      self._pool = concurrent.futures.ProcessPoolExecutor(self.count, context, start_worker)
    return self._pool.map(function, tasks)


class BeamWorkers(Workers):
  """Runs every `map` as one Beam pipeline, for corpora larger than one machine."""

  # Tasks and results travel as files, so the pipeline itself stays small; all machines must see the
  # same paths. What is written is the same as with `Workers`.

  def __init__(self, options: Sequence[str], out: epath.Path):
    """`options` are Beam's, such as ["--runner=DataflowRunner"]; by default it uses this machine.

    Tasks and results are in temporary folders beside `out`. Raises CorpusError if Apache Beam is
    not installed.
    """
    super().__init__(64)
    try:
      # pyrefly: ignore[missing-import]  # an optional dependency
      from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
      raise CorpusError(
        f"Apache Beam is not installed ({error}): pip install 'bis_jax[beam]'"
      ) from error
    self._options, self._out = PipelineOptions(list(options)), out

  def imap(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterable[R]:
    import apache_beam as beam  # pyrefly: ignore[missing-import]

    with files.temporary_folder(self._out) as scratch:
      paths = [scratch / f"{at:06d}" for at in range(len(tasks))]
      for path, task in zip(paths, tasks, strict=True):
        path.write_bytes(pickle.dumps((function, task)))
      with beam.Pipeline(options=self._options) as pipeline:
        _ = pipeline | beam.Create(map(os.fspath, paths)) | beam.Reshuffle() | beam.Map(_run_task)
      for path in paths:
        result = pickle.loads(_result_of(path).read_bytes())
        if isinstance(result, CorpusError):
          raise result
        yield result


def _result_of(task: epath.Path) -> epath.Path:
  return task.with_name(f"{task.name}.result")


def _run_task(path: str) -> None:
  # Atomic, because Beam may run a task twice.
  task_path = epath.Path(path)
  function, task = pickle.loads(task_path.read_bytes())
  try:
    result = function(task)
  except CorpusError as error:  # Beam would hide it in an error of its own
    result = error
  with files.replacing(_result_of(task_path)) as file:
    file.write(pickle.dumps(result))
