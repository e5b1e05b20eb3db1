"""Stopping a run between two steps, on SIGTERM or Ctrl-C, so that nothing of it is lost.

Clouds and schedulers send SIGTERM before they take a machine away, often to one host only. Then the
processes of the run agree on a step, save after it and end with `EXIT_CODE`; the same command goes
on at the next batch.
"""

import functools
import signal
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


class Preempted(Exception):
  """The run stopped because it was told to, with everything saved."""


class StopRequest:
  """Whether any process of the run was asked to stop; a context that listens while it is open.

  Outside of it signals do what they always do. Inside, the first SIGTERM or SIGINT is a request and
  a second one again does what it always does.
  """

  _SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    self._asked = False
    self._before = {}

  def __enter__(self) -> "StopRequest":
    self._before = {number: signal.signal(number, self._ask) for number in self._SIGNALS}
    return self

  def __exit__(self, *_: object) -> None:
    self._restore()

  def _ask(self, number: int, _: object) -> None:
    self._asked = True
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def anywhere(self) -> jax.Array | bool:
    """Returns whether a process was asked: bool[], not waited for, the same on all of them.

    Every process must call this equally often, in the same order as its other work on devices.
    """
    if jax.process_count() == 1:
      return self._asked
    split, any_of = _over_all_devices()
    asked = np.full(jax.local_device_count(), self._asked)
    return any_of(jax.make_array_from_process_local_data(split, asked))


@functools.cache
def _over_all_devices() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
  """Returns the sharding of bool[devices], one each, and the jitted `any` of such an array."""
  mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
  whole = NamedSharding(mesh, PartitionSpec())
  return NamedSharding(mesh, PartitionSpec("all")), jax.jit(jnp.any, out_shardings=whole)
