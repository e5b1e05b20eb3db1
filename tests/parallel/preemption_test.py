"""A stop signal is caught once, and signal handlers are restored afterwards."""

import os
import signal

import pytest

from bis_jax.parallel.preemption import StopRequest


@pytest.fixture(autouse=True)
def interruptible():
  """Ctrl-C as in a terminal: background processes start with it ignored."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request(number):
  before = signal.getsignal(number)
  with StopRequest() as stop:
    assert not stop.on_any_process()
    os.kill(os.getpid(), number)
    assert stop.on_any_process()
  assert signal.getsignal(number) == before


def test_the_second_does_what_it_always_does():
  with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.on_any_process()
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("not reached")


def test_outside_of_it_signals_do_what_they_always_do():
  with StopRequest():
    pass
  with pytest.raises(KeyboardInterrupt):
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("not reached")
