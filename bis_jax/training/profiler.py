"""A profiler trace of some steps of a run."""

import jax
from etils import epath


class Profile:
  """Traces steps `first` to `first + count - 1` of a run; a context, so that none stays open.

  The trace holds what this process and its devices did. Look at it with XProf or TensorBoard's
  profile plugin (`pip install xprof; xprof --logdir=WORKDIR/profile`), or open its *.trace.json.gz at
  ui.perfetto.dev. A run that goes on behind `first` traces nothing.

  Args:
    folder: of the trace; a remote workdir needs a jaxlib that can write there.
    first: step, from 1; 0: no trace.
    count: of steps.
    write: whether this process traces (process 0 of a run).
  """

  def __init__(self, folder: epath.Path, first: int, count: int, *, write: bool):
    self._folder, self._first, self._last = folder, first, first + count - 1
    self._write, self._open = write, False

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *_: object) -> None:
    self._stop()

  def before(self, step: int) -> None:
    """Starts the trace if this is the first step of it."""
    if self._write and step == self._first:
      jax.profiler.start_trace(str(self._folder))
      self._open = True

  def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Writes the trace if this is the last step of it, when the step is done."""
    if self._open and step == self._last:
      jax.block_until_ready(metrics)
      self._stop()

  def _stop(self) -> None:
    if self._open:
      self._open = False
      jax.profiler.stop_trace()
