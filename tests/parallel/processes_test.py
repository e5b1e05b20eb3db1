"""Real processes find each other, wait for each other, compute together and end together."""

import concurrent.futures
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from bis_jax.parallel import processes
from tests.xla_flags import FAST_COMPILATION

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEARTBEAT = 10  # seconds, in the tests of dying; a run has distributed.HEARTBEAT_SECONDS
SLACK = 15  # seconds, for a busy machine
SECONDS = 300  # that any process may take, on the busiest machine


def _port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def _start(code: str, *arguments: object, devices: int = 1, **variables: str) -> subprocess.Popen:
  """Starts Python on `code`, with fake CPU devices and environment variables."""
  flags = f"--xla_force_host_platform_device_count={devices} {FAST_COMPILATION}"
  env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
  return subprocess.Popen(
    [sys.executable, "-u", "-c", code, *map(str, arguments)],
    env=env | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _start_two(code: str, *arguments: object, **options) -> list[subprocess.Popen]:
  """Starts the two processes of a run by environment variables."""
  address = f"localhost:{_port()}"
  return [
    _start(
      code,
      *arguments,
      JAX_COORDINATOR_ADDRESS=address,
      JAX_NUM_PROCESSES="2",
      JAX_PROCESS_ID=str(i),
      **options,
    )
    for i in range(2)
  ]


def _finish(process: subprocess.Popen) -> tuple[int, str, str]:
  """Returns (exit code, stdout, stderr)."""
  try:
    out, err = process.communicate(timeout=SECONDS)
  finally:
    process.kill()
  return process.returncode, out, err


WAIT = """
import sys, time
from bis_jax.parallel import processes
processes.start()
import jax
jax.devices()
if processes.is_first():
  time.sleep(35)
processes.wait_for_all("corpus")
print("together")
"""


@pytest.fixture(scope="module", autouse=True)
def waiting():
  """Two processes, of which one waits for the other while the other tests run."""
  started = _start_two(WAIT)
  yield started
  for process in started:
    process.kill()


COUNT = """
from bis_jax.parallel import processes
processes.start()
import jax
print(jax.process_index(), jax.process_count(), processes.is_first())
jax.jit(lambda: jax.numpy.arange(3) * 2)()
processes.wait_for_all("end")
"""


def _cache(folder: pathlib.Path) -> dict[str, str]:
  return {
    "JAX_COMPILATION_CACHE_DIR": str(folder),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }


def _environment(kind: str, process: int, port: int) -> dict[str, str]:
  """Returns the environment of process 0 or 1 of two."""
  if kind == "variables":
    return {
      "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
      "JAX_NUM_PROCESSES": "2",
      "JAX_PROCESS_ID": str(process),
    }
  common = {"JAX_COORDINATOR_PORT": str(port)}
  if kind == "slurm":
    return common | {
      "SLURM_JOB_ID": "7",
      "SLURM_STEP_NODELIST": "localhost",
      "SLURM_NTASKS": "2",
      "SLURM_PROCID": str(process),
      "SLURM_LOCALID": str(process),
    }
  return common | {  # a GKE pod with TPUs, less the TPUs
    "JAX_FORCE_TPU_INIT": "1",
    "TPU_WORKER_HOSTNAMES": "localhost,localhost",
    "TPU_WORKER_ID": str(process),
    "MEGASCALE_COORDINATOR_ADDRESS": "",
    "MEGASCALE_NUM_SLICES": "1",
    "MEGASCALE_SLICE_ID": "0",
  }


@pytest.mark.parametrize("kind", ["variables", "slurm", "tpu"])
def test_processes_find_each_other(kind, tmp_path):
  """And compile every program: loaded from a cache, XLA's CPU client mixes up their collectives."""
  port = _port()
  started = [_start(COUNT, **_cache(tmp_path), **_environment(kind, i, port)) for i in range(2)]
  ended = [_finish(process) for process in started]
  assert [code for code, _, _ in ended] == [0, 0], ended
  assert [out.split() for _, out, _ in ended] == [["0", "2", "True"], ["1", "2", "False"]]
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("surroundings", [{}, {"JAX_NUM_PROCESSES": "1", "SLURM_NTASKS": "2"}])
def test_a_process_with_no_others_starts_alone(surroundings, tmp_path):
  code, out, err = _finish(_start(COUNT, **_cache(tmp_path), **surroundings))
  assert (code, out.split()) == (0, ["0", "1", "True"]), err
  assert any(tmp_path.iterdir()), "its programs are kept"


@pytest.mark.parametrize(
  "variables, words",
  [
    ({"JAX_PROCESS_ID": "0"}, "but not JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES"),
    ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2"}, "but not JAX_PROCESS_ID"),
    (
      {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
      "0 <= JAX_PROCESS_ID < JAX_NUM_PROCESSES",
    ),
    (
      {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
      "JAX_NUM_PROCESSES=two",
    ),
    (
      {"JAX_COORDINATOR_ADDRESS": "host", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
      "HOST:PORT",
    ),
  ],
)
def test_processes_named_by_half_are_refused(variables, words, monkeypatch):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(processes.DistributedError, match=words):
    processes.start()
  assert not jax.distributed.is_initialized()


@pytest.mark.parametrize("launcher", [{"TORCHELASTIC_RUN_ID": "none"}, {}])
def test_torchruns_processes_are_told_how_to_start(monkeypatch, launcher):
  def find_no_cluster(**_):
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", find_no_cluster)
  for name, value in {"WORLD_SIZE": "2", "RANK": "1", **launcher}.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(processes.DistributedError, match="RANK=1 .* once per host without torchrun"):
    processes.start()
  monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
  processes.start()


def test_an_address_alone_is_refused():
  """In a process of its own: JAX looks for a cluster only before its first device is used."""
  code, _, err = _finish(_start(COUNT, JAX_COORDINATOR_ADDRESS="h:1"))
  assert code != 0 and "JAX_COORDINATOR_ADDRESS is set, but neither" in err


DIE = """
import os, signal, sys, time
from bis_jax.parallel import processes
who, how, wait = int(sys.argv[1]), sys.argv[2], sys.argv[3]
processes.start(heartbeat_seconds=int(sys.argv[4]))
import jax
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("start")
print(time.time())
try:
  if jax.process_index() == who:
    if how == "error":
      raise ValueError("a bad record")
    os.kill(os.getpid(), getattr(signal, how))
  if wait == "barrier":
    processes.wait_for_all("corpus")
  else:
    multihost_utils.sync_global_devices("step")
except Exception as error:
  processes.fail(f"error: {error}")
"""


DEATHS = [
  (0, "SIGKILL", "step", 0),
  (1, "SIGKILL", "step", HEARTBEAT),  # over TCP at once; on devices after the heartbeat
  (1, "SIGSTOP", "step", HEARTBEAT),  # a host that hangs: nothing breaks off by itself
  (1, "SIGKILL", "barrier", HEARTBEAT),
  (0, "error", "barrier", 0),
  (1, "error", "step", HEARTBEAT),
]


def _die(who: int, how: str, wait: str, bound: int) -> tuple:
  """Returns what `_finish` gives for the other process, then for `who`, and how long that took."""
  started = _start_two(DIE, who, how, wait, HEARTBEAT)
  other = _finish(started[1 - who])
  seconds = time.time() - float(other[1].split()[-1])
  if how == "SIGSTOP":
    started[who].send_signal(signal.SIGKILL)
  return other, _finish(started[who]), seconds


@pytest.fixture(scope="module")
def deaths():
  """{case: future of `_die`}: three pairs at a time, because they mostly wait."""
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    yield {case: pool.submit(_die, *case) for case in DEATHS}


@pytest.mark.parametrize("who, how, wait, bound", DEATHS)
def test_where_one_process_dies_the_other_stops_with_an_error_in_time(
  deaths, who, how, wait, bound
):
  (code, _, err), (died, _, its_err), seconds = deaths[who, how, wait, bound].result()
  assert code != 0 and died != 0
  assert "error" in err.lower(), "it says why"
  assert how != "error" or "error: a bad record" in its_err
  assert seconds < bound + SLACK, f"it took {seconds:.1f} s"


def test_a_wait_outlasts_the_thirty_seconds_of_one_on_the_devices(waiting):
  ended = [_finish(process) for process in waiting]
  assert [code for code, _, _ in ended] == [0, 0], ended
  assert all("together" in out for _, out, _ in ended)


SHARED = """
import sys
from etils import epath
from bis_jax.parallel import processes
processes.start()
import jax
folders = [epath.Path(path.format(jax.process_index())) for path in sys.argv[1:]]
try:
  for at, folder in enumerate(folders):
    processes.require_shared(folder, f"--{at}")
except processes.DistributedError as error:
  print(error)
made = folders[0] / "made"
processes.first_makes(made, made.mkdir)
print(made.is_dir())
processes.wait_for_all("end")
"""


def test_a_folder_that_a_host_does_not_see_is_named_by_all(tmp_path, bucket):
  """Disks of their own are no error where a bucket is shared; an old token of a host is no sign."""
  (tmp_path / "own1").mkdir()
  (tmp_path / "own1/seen-by-all").write_text("12345")
  started = _start_two(SHARED, tmp_path / "shared", bucket / "cache", tmp_path / "own{}")
  ended = [_finish(process) for process in started]
  assert [code for code, _, _ in ended] == [0, 0], ended
  for _, out, _ in ended:
    assert "--2 is " in out and "process 1 does not see what process 0 writes there" in out
    assert "--2=gs://BUCKET/NAME" in out and out.endswith("True\n")
  assert not list(tmp_path.glob("*0*/seen-by-all")) and not list(bucket.glob("cache/*"))


def test_a_process_that_waits_for_others_says_for_whom_and_ends_with_words(
  monkeypatch, capsys, caplog
):
  """JAX's own limit, 300 s, ends in SIGABRT and the stack of its C++ code."""
  ended = threading.Event()

  def join(start_seconds, heartbeat_seconds):
    assert ended.wait(30)

  monkeypatch.setattr(processes, "_join", join)
  monkeypatch.setattr(processes, "_QUIET_SECONDS", 0.1)
  monkeypatch.setattr(os, "_exit", lambda code: ended.set())
  for name, value in {"NTASKS": "4", "PROCID": "0", "STEP_NODELIST": "node[1-2]"}.items():
    monkeypatch.setenv(f"SLURM_{name}", value)
  monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
  processes.start(start_seconds=0.3)
  waits = "process 0 of 4 (SLURM_NTASKS) waits for the others to start, at node[1-2]"
  assert waits in caplog.text and "JAX_NUM_PROCESSES=1 makes this a run of one" in caplog.text
  assert waits in (said := capsys.readouterr().err) and "or raise --start_seconds" in said
  assert processes.START_SECONDS >= 3600 and processes.HEARTBEAT_SECONDS <= 60
