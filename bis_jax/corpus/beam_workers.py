"""Work spread over machines by Apache Beam, for corpora larger than one machine.

Every place where preparing a corpus maps a function over tasks can run as a Beam pipeline instead of
in processes of this machine; what is written is the same. Tasks and results travel as files, so the
pipeline itself stays small. The machines must see the same paths as this one.
"""

import os
import pathlib
import pickle
import shutil
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

from bis_jax.corpus.rejections import CorpusError

T = TypeVar("T")
R = TypeVar("R")


class BeamWorkers:
  """Stands in for `processes.Workers`; one pipeline a call of `map`.

  Attributes:
    count: how many machines' worth of tasks are worth making.
  """

  count = 64

  def __init__(self, options: Sequence[str], scratch: pathlib.Path):
    """Plans pipelines with Beam's own options; the default runner works on this machine.

    Args:
      options: for example ["--runner=DataflowRunner", "--project=..."].
      scratch: folder for tasks and results, seen by all machines; deleted in the end.

    Raises:
      CorpusError: Apache Beam is not installed.
    """
    try:
      from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
      raise CorpusError(
        f"Apache Beam is not installed ({error}): pip install 'bis_jax[beam]'"
      ) from error
    self._options = PipelineOptions(list(options))
    self._scratch = scratch

  def __enter__(self) -> "BeamWorkers":
    self._scratch.mkdir(parents=True)
    return self

  def __exit__(self, *error: object) -> None:
    shutil.rmtree(self._scratch, ignore_errors=True)

  def map(
    self,
    function: Callable[[T], R],
    tasks: Sequence[T],
    done: Callable[[R], object] = lambda result: None,
  ) -> list[R]:
    """Returns [function(task) for task in tasks]; calls `done` with each result in the end."""
    import apache_beam as beam

    paths = [self._scratch / f"{at:06d}" for at in range(len(tasks))]
    for path, task in zip(paths, tasks, strict=True):
      path.write_bytes(pickle.dumps((function, task)))
    with beam.Pipeline(options=self._options) as pipeline:
      _ = pipeline | beam.Create(map(os.fspath, paths)) | beam.Reshuffle() | beam.Map(_run_task)
    results = []
    for path in paths:
      result = pickle.loads(_result_of(path).read_bytes())
      if isinstance(result, CorpusError):
        raise result
      results.append(result)
      done(result)
    for path in self._scratch.iterdir():
      path.unlink()
    return results


def _result_of(task: pathlib.Path) -> pathlib.Path:
  return task.with_name(f"{task.name}.result")


def _run_task(path: str) -> None:
  """Writes the result of a task, whole or not at all: Beam may run a task twice."""
  place = pathlib.Path(path)
  function, task = pickle.loads(place.read_bytes())
  try:
    result = function(task)
  except CorpusError as error:  # Beam would hide it in an error of its own
    result = error
  part = place.with_name(f"{place.name}.part-{socket.gethostname()}-{os.getpid()}")
  part.write_bytes(pickle.dumps(result))
  part.replace(_result_of(place))
