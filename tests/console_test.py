"""Commands that are stopped or killed leave no worker processes, and exit with 75 if they can."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from bis_jax.console import STOPPED
from bis_jax.run import stages

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORK = """
import sys, threading, time
from bis_jax.console import command
from bis_jax.corpus.workers import Workers

def work(_):
  time.sleep(0.5)

if __name__ == "__main__":
  if sys.argv[1] == "spawn":
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
  with command("work", []), Workers(2) as workers:
    workers.map(work, [0] * 200, lambda _: print("works", flush=True))
"""


def _children(process: int) -> list[int]:
  listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], stdout=subprocess.PIPE)
  return [int(word) for word in listed.stdout.split()]


def _run(process: int) -> bool:
  status = pathlib.Path(f"/proc/{process}/status")
  return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_command(tmp_path, start, number):
  script = tmp_path / "work.py"
  script.write_text(WORK)
  process = subprocess.Popen(
    [sys.executable, script, start],
    env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    start_new_session=True,
  )
  assert process.stdout.readline() == "works\n", process.communicate()
  workers = _children(process.pid)
  assert len(workers) >= 2
  if number == signal.SIGINT:
    os.killpg(process.pid, number)  # as a terminal does
  else:
    process.send_signal(number)
  error = process.stderr.read()
  code = process.wait(timeout=30)
  deadline = time.monotonic() + 10
  while any(map(_run, workers)) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(map(_run, workers))
  if number == signal.SIGKILL:
    assert code == -signal.SIGKILL
  else:
    assert (code, error) == (STOPPED, "work: stopped by a signal: run the same command again\n")


STUCK = """
import threading, time
from bis_jax import console

console._SECONDS_TO_LEAVE = 0.5
with console.command("save", []):
  print("saves")
  threading.Thread(target=time.sleep, args=(120,)).start()  # a write to a bucket that is gone
  raise ConnectionError("gs://bucket can't be reached")
"""


def test_a_command_that_failed_does_not_wait_for_a_write_that_cannot_end(tmp_path):
  script = tmp_path / "save.py"
  script.write_text(STUCK)
  ended = subprocess.run(
    [sys.executable, script],
    env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (ended.returncode, ended.stdout) == (1, "saves\n")
  assert ended.stderr == "save: gs://bucket can't be reached\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_training_ends_with_75(command, monkeypatch, number):
  """On f92436b SIGTERM ended the process with -15, and Ctrl-C with a traceback."""

  def prepare(*_):
    os.kill(os.getpid(), number)
    time.sleep(10)

  monkeypatch.setattr(stages, "run", prepare)
  monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
  before = signal.getsignal(signal.SIGTERM)
  interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    done = command("bis_jax.main", f"--config={ROOT}/configs/toy_bis10.py", "--workdir=unused")
  finally:
    signal.signal(signal.SIGINT, interrupts)
  assert (done.returncode, done.stderr) == (
    STOPPED,
    "main: stopped by a signal: run the same command again to resume\n",
  )
  assert signal.getsignal(signal.SIGTERM) == before
