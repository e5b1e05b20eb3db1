"""A profiler trace of some steps of a run."""

import contextlib
from typing import Self

import jax
from etils import epath

from bis_jax import files


class Profile:
  """Traces steps `first` (from 1; 0: none) to `first + count - 1`, on processes with `write`.

  Open `folder` with XProf or TensorBoard's profile plugin (`pip install xprof; xprof
  --logdir=WORKDIR/profile`), or its *.trace.json.gz at ui.perfetto.dev. A run that resumes after
  step `first` traces nothing.
  """

  def __init__(self, folder: epath.Path, first: int, count: int, *, write: bool):
    self._folder, self._first, self._last = folder, first if write else 0, first + count - 1
    self._trace = contextlib.ExitStack()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._trace.close()

  def before(self, step: int) -> None:
    if step == self._first:
      local = self._trace.enter_context(files.written_locally(self._folder))
      self._trace.enter_context(jax.profiler.trace(str(local)))

  def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
    # The trace must hold the device's work, so it ends once the step is done.
    if step == self._last:
      jax.block_until_ready(metrics)
      self._trace.close()
