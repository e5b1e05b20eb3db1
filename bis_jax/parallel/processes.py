"""Starts and ends the processes of one run: one per host, or one per GPU.

Every process runs the same command. The first of these that is present says which process it is:

1. three environment variables, with the same address and count for all and a different id for each:

       JAX_COORDINATOR_ADDRESS=10.0.0.1:8476 JAX_NUM_PROCESSES=4 JAX_PROCESS_ID=0

   `JAX_NUM_PROCESSES=1` alone is a run of one process, regardless of the environment below;
2. SLURM (under `srun`), Open MPI, Cloud TPU metadata or GKE, as `jax.distributed.initialize` reads
   them. JAX_COORDINATOR_ADDRESS or JAX_COORDINATOR_PORT may be set alone, and JAX_LOCAL_DEVICE_IDS
   gives a SLURM process several GPUs;
3. otherwise the run has one process.

Processes wait `START_SECONDS`, or --start_seconds, for each other, then end with a sentence.

If a process dies, JAX's coordination service in process 0 ends the others with an error (SIGABRT)
after `HEARTBEAT_SECONDS`; they notice the death of process 0, or of a process that they wait for
over TCP, at once. A process that hangs counts as dead only if its heartbeat thread stops as well.
"""

import concurrent.futures
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from bis_jax import files
from bis_jax.console import log
from bis_jax.errors import UserError

START_SECONDS = 3600  # that processes wait for the last one to start
_VISIBLE_SECONDS = 10  # until a shared file system shows a new file on other hosts
_QUIET_SECONDS = 30  # before a waiting process says so
HEARTBEAT_SECONDS = 60  # silence after which a process counts as dead
_SHUTDOWN_SECONDS = 30  # between the first and the last process that ends; they come from a barrier
_WAIT_SECONDS = 7 * 24 * 3600  # no bound on work; a wait for a dead process ends by its heartbeat

_COUNT, _INDEX, _ADDRESS = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"


class DistributedError(UserError):
  """The environment names the run's processes incompletely, or its hosts do not share a folder."""


def start(
  *, start_seconds: float = START_SECONDS, heartbeat_seconds: int = HEARTBEAT_SECONDS
) -> None:
  """Joins this process to the others of its run; must come before the first use of a device.

  A process that is silent for `heartbeat_seconds` counts as dead. Raises DistributedError if the
  environment variables are incomplete or not numbers; ends this process if the others have not
  started after `start_seconds`.
  """
  joined = threading.Event()
  threading.Thread(target=_watch_start, args=(joined, start_seconds), daemon=True).start()
  try:
    _join(start_seconds, heartbeat_seconds)
  finally:
    joined.set()
  if jax.process_count() > 1 and jax.default_backend() == "cpu":
    # In programs that XLA's CPU client loads from a cache, collectives in loops are not ordered with
    # those outside of them, and processes exchange the arrays of different ones.
    jax.config.update("jax_enable_compilation_cache", False)


def _watch_start(joined: threading.Event, seconds: float) -> None:
  # JAX itself would abort with the stack of its C++ code.
  names = {
    _COUNT: _INDEX,
    "SLURM_NTASKS": "SLURM_PROCID",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
  }
  name = next((name for name in names if name in os.environ), _COUNT)
  count, index = os.environ.get(name, "?"), os.environ.get(names[name], "?")
  where = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get(_ADDRESS, "the other hosts")
  waits = f"process {index} of {count} ({name}) waits for the others to start, at {where}"
  if joined.wait(min(_QUIET_SECONDS, seconds)):
    return
  log.warning("%s, for %.0f s; %s=1 makes this a run of one process", waits, seconds, _COUNT)
  if not joined.wait(seconds - _QUIET_SECONDS):
    print(
      f"main: {waits}, and did for {seconds:.0f} s: start this command on all hosts, set {_COUNT}=1 for "
      "a run of one process, or raise --start_seconds",
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)


def _join(start_seconds: float, heartbeat_seconds: int) -> None:
  # JAX's own preemption notice is turned off: it holds SIGTERM back for the life of the process and
  # ignores it before the first step. See `preemption`.
  jax.config.update("jax_enable_preemption_service", False)
  # With one CPU device per process JAX does not order the collectives of programs in flight: those
  # of the stop request and of a step then meet in another order on another process.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  timeouts = {
    "initialization_timeout": int(start_seconds) + 60,
    "heartbeat_timeout_seconds": heartbeat_seconds,
    "shutdown_timeout_seconds": _SHUTDOWN_SECONDS,
  }
  found = {name: os.environ[name] for name in (_ADDRESS, _COUNT, _INDEX) if os.environ.get(name)}
  if found.get(_COUNT) == "1":
    return
  if _COUNT in found or _INDEX in found:
    jax.distributed.initialize(*_from_environment(found), **timeouts)
    return
  if "TORCHELASTIC_RUN_ID" in os.environ:
    _refuse_torchrun()
  try:
    jax.distributed.initialize(**timeouts)
  except ValueError as error:  # raised before any start if no cluster is detected
    if _ADDRESS in found:
      raise DistributedError(
        f"{_ADDRESS} is set, but neither {_COUNT} and {_INDEX} nor a cluster that JAX knows: set "
        f"all three, or none for a run of one process ({error})"
      ) from error
    if "coordinator_address" not in str(error):
      raise
    _refuse_torchrun()


def _refuse_torchrun() -> None:
  # Its address is in use by its own store, and its processes would each run alone.
  count, index = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK")
  if count != "1" and index is not None:
    raise DistributedError(
      f"WORLD_SIZE={count} and RANK={index} are set, as by torchrun, but not {_COUNT}: start this "
      "command once per host without torchrun, as one process uses all devices of its host, and "
      f"on several hosts set {_ADDRESS}=HOST:PORT, {_COUNT} and {_INDEX}; {_COUNT}=1 is a run of "
      "one process"
    )


def _from_environment(found: dict[str, str]) -> tuple[str, int, int]:
  """Returns (address, count, index) from the three variables; raises DistributedError."""
  missing = [name for name in (_ADDRESS, _COUNT, _INDEX) if name not in found]
  if missing:
    raise DistributedError(
      f"{' and '.join(found)} {'is' if len(found) == 1 else 'are'} set but not "
      f"{' and '.join(missing)}: set all three, or none for a run of one process"
    )
  try:
    count, index = int(found[_COUNT]), int(found[_INDEX])
  except ValueError:
    count = index = -1
  if not 0 <= index < count:
    raise DistributedError(
      f"{_INDEX}={found[_INDEX]} and {_COUNT}={found[_COUNT]}: they must be whole numbers with "
      f"0 <= {_INDEX} < {_COUNT}"
    )
  if not found[_ADDRESS].rpartition(":")[2].isdigit():
    raise DistributedError(f"{_ADDRESS}={found[_ADDRESS]} has no port: write HOST:PORT")
  return found[_ADDRESS], count, index


def is_first() -> bool:
  """Returns whether this is process 0, which alone writes the run's files."""
  return jax.process_index() == 0


def wait_for_all(name: str) -> None:
  """Waits, without a time limit, for every process; `name` must be unique within the run."""
  # The wait uses the coordination service. A collective on the devices would time out, on CPU after
  # 30 seconds, while process 0 prepares a corpus.
  if jax.process_count() == 1:
    return
  everyone, arrived = set(range(jax.process_count())), concurrent.futures.Future()

  def wait() -> None:
    try:
      ocp.multihost.sync_global_processes(name, timeout=_WAIT_SECONDS, processes=everyone)
      arrived.set_result(None)
    except BaseException as error:
      arrived.set_exception(error)

  # In a thread, as signals do not interrupt the service's call.
  threading.Thread(target=wait, daemon=True).start()
  arrived.result()


def gather(name: str, rows: np.ndarray) -> np.ndarray:
  """Returns the rows [k, ...] of all processes, in their order; `name` as in `wait_for_all`."""
  if jax.process_count() == 1:
    return rows
  wait_for_all(name)  # processes may come minutes apart, see above
  counts = multihost_utils.process_allgather(np.array([len(rows)]))[:, 0]
  padded = np.zeros((counts.max(), *rows.shape[1:]), rows.dtype)
  padded[: len(rows)] = rows
  every = multihost_utils.process_allgather(padded)
  return np.concatenate([part[:count] for part, count in zip(every, counts, strict=True)])


def require_shared(folder: epath.Path, key: str) -> None:
  """Raises DistributedError, on all processes, if one doesn't see what process 0 writes in `folder`."""
  if jax.process_count() == 1:
    return
  wait_for_all(f"{key} is to be seen")
  number = str(multihost_utils.broadcast_one_to_all(np.array(secrets.randbits(31))))
  token = folder / "seen-by-all"
  if is_first():
    files.write_text(token, number)
  wait_for_all(f"{key} has a token")
  until = time.monotonic() + _VISIBLE_SECONDS
  while not (sees_it := token.exists() and token.read_text() == number):
    if time.monotonic() > until:
      break
    time.sleep(0.5)
  blind = np.flatnonzero(~gather(f"{key} was looked at", np.array([sees_it])))
  if is_first():
    token.unlink()
  if blind.size:
    raise DistributedError(
      f"{key} is {folder}, and process {blind[0]} does not see what process 0 writes there: name a "
      f"folder in a bucket, such as {key}=gs://BUCKET/NAME, or on a disk that all hosts share"
    )


def first_makes(path: epath.PathLike, make: Callable[[], object]) -> None:
  """Process 0 makes a file or folder, in a folder that all share, while the others wait."""
  if is_first():
    make()
  wait_for_all(str(path))


def fail(message: str, code: int = 1, *, at_once: bool = False) -> NoReturn:
  """Ends this process; `at_once` waits for no thread of a library."""
  # With other processes it ends at once: an orderly end would wait for them, while they wait for
  # this one. They stop as the module's docstring says.
  print(message, file=sys.stderr)
  if not (at_once or jax.distributed.is_initialized()):
    sys.exit(code)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
