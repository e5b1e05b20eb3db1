"""Stops a run between two steps on SIGTERM or Ctrl-C, without losing work.

Clouds and schedulers send SIGTERM before they take a machine away, often to one host only. The
processes of the run then agree on a step, save after it and exit with `console.STOPPED`; the same command
resumes at the next batch.
"""

import functools
import signal
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


class Preempted(Exception):
  """The run stopped on a signal, with everything saved."""


class StopRequest:
  """Whether any process of the run received a stop signal; a context manager that listens."""

  # The first SIGTERM or SIGINT within the context is a request; a second one, like any outside of
  # the context, has its default effect.

  def __init__(self):
    self._requested = False
    self._previous = {}

  def __enter__(self) -> Self:
    signals = (signal.SIGTERM, signal.SIGINT)
    self._previous = {number: signal.signal(number, self._request) for number in signals}
    return self

  def __exit__(self, *_: object) -> None:
    self._restore()

  def _request(self, number: int, _: object) -> None:
    self._requested = True
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}

  def on_any_process(self) -> jax.Array | bool:
    """Returns a replicated bool[] (asynchronous): True if any process received a stop signal."""
    # Every process must call this equally often, in the same order as its other work on devices.
    if jax.process_count() == 1:
      return self._requested
    split, any_of = _over_all_devices()
    requested = np.full(jax.local_device_count(), self._requested)
    return any_of(jax.make_array_from_process_local_data(split, requested))


@functools.cache
def _over_all_devices() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
  mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
  replicated = NamedSharding(mesh, PartitionSpec())
  return NamedSharding(mesh, PartitionSpec("all")), jax.jit(jnp.any, out_shardings=replicated)
