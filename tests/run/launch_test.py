"""Pods of real processes on this machine: the same run as on one device, also after kills.

Most of the time is that of starting processes and compiling: every run below has a purpose that no
other one serves.

One pod shares a disk. The other one's processes have home and temporary folders of their own, as on
hosts that share nothing but a bucket.
"""

import json
import os
import pathlib
import re
import signal
import stat
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from bis_jax import console
from bis_jax.settings import keys
from configs import qwen_bis10
from tests.xla_flags import FAST_COMPILATION

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 4
HEARTBEAT = 10  # seconds, where a process is killed; any other run has processes.HEARTBEAT_SECONDS
# Every line of a run of process 0, without the time.
OUTPUT = (
  r"\d+ cpu devices?, \d+ process(es)?",
  r"(prepared 1,000 rollouts with \d+ images in|reusing the (toy )?corpus in) .*",
  r"[\d,]+ of [\d,]+ parameters train: [\d,]+ by '\.\*' at factor 1",
  r"bis selects 100 of 1,?000 rollouts",
  r"100 rollouts in 2 epochs: .*",
  r"step \d of 4: loss [\d.]+",
  r"(fixed_0.5|tuned_on_test) .*",
  r"see .*/index.html",
)
NO_ACCOUNT = (r"Authentication failed using .*", r".* Using GOOGLE_AUTH_TOKEN_FOR_TESTING")

# `bis_jax.main` that writes down the examples of every training batch, and that is hit by a signal
# as it asks for one: HIT="BATCH PROCESS SIGNAL". HEARTBEAT: seconds of silence that count as death.
RECORDING_MAIN = """
import json, os, signal, sys
sys.modules["torch"] = None  # as where only bis_jax is installed; its import takes 5 s
import numpy as np
from absl import app
from bis_jax import main
from bis_jax.parallel import processes
from bis_jax.training import loop
from bis_jax.inputs.pipeline import BatchIterator

mine = os.environ["JAX_PROCESS_ID"]
at, process, name = os.environ.get("HIT", "-1 - -").split()

class Recorded(BatchIterator):
  def __next__(self):
    number = self.next_batch
    if (number, mine) == (int(at), process):
      os.kill(os.getpid(), getattr(signal, name))
    batch = super().__next__()
    rows = [np.unique(row[row >= 0]).tolist() for row in batch["example_index"]]
    with open(os.environ["RECORD"] + mine, "a") as file:
      file.write(json.dumps([number, rows]) + "\\n")
    return batch

def recorded(*arguments):
  [iterator] = [argument for argument in arguments if isinstance(argument, BatchIterator)]
  iterator.__class__ = Recorded
  return plain(*arguments)

if __name__ == "__main__":
  if "HEARTBEAT" in os.environ:
    processes.start.__kwdefaults__["heartbeat_seconds"] = int(os.environ["HEARTBEAT"])
  plain, loop.train = loop.train, recorded
  app.run(main.main)
"""


class Pod:
  """A folder of runs that differ only in processes, devices and signals."""

  def __init__(self, config, folder: pathlib.Path, place: epath.Path | None = None):
    """Workdirs are in `place`, by default in `folder`, where records of the runs are.

    The cache of corpora is in `place`, by default the config's.
    """
    self._folder, self._place = folder, place or epath.Path(folder)
    self.cache = place / "cache" if place else epath.Path(config.corpus.cache)
    self.lines: dict[str, list[str]] = {}  # written by the latest run in a workdir
    config = config.copy_and_resolve_references()
    with config.unlocked():
      config.pretrain.steps = 0
      config.corpus.workers = 1
      config.corpus.cache, config.train.compile_cache = str(self.cache), "compiled"
      # Adam makes a gradient that is mostly rounding, as a key's bias has, as large as any other.
      config.optim.eps = 1e-5
      config.train.global_batch = config.inputs.row_multiple = 4
      config.train.steps = STEPS
      config.train.checkpoint_every = 100  # only if a run is stopped, and at its end
    ours, recipe = (
      keys.flatten(json.loads(c.to_json())) for c in (config, qwen_bis10.get_config("toy"))
    )
    self._flags = [f"--config.{key}={value}" for key, value in ours.items() if recipe[key] != value]
    (folder / "main.py").write_text(RECORDING_MAIN)
    python = folder / "python"  # what local_pod.sh takes for Python
    python.write_text(
      f"#!/bin/sh\nexport HOME={folder}/host$JAX_PROCESS_ID TMPDIR={folder}/host$JAX_PROCESS_ID/tmp\n"
      f'if [ "$1" = -m ]; then mkdir -p $TMPDIR; shift 2; set -- {folder}/main.py "$@"; fi\n'
      f'exec {sys.executable} "$@"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    self._env = os.environ | {
      "PYTHON": str(python),
      "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
      "XLA_FLAGS": FAST_COMPILATION,
      "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
      "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }

  def run(
    self,
    name: str,
    processes: int,
    devices: int,
    *,
    hit: str = "",
    record: str = "",
    evaluate: bool = False,
    **variables: str,
  ) -> subprocess.CompletedProcess:
    """Runs in workdir `name`; the batches read go to files `record`, by default of that name."""
    env = self._env | variables | {"RECORD": str(self._folder / f"{record or name}.batches.")}
    command = ["launch/local_pod.sh", str(processes), str(devices)]
    command += ["--config=configs/qwen_bis10.py:toy", f"--workdir={self[name]}", *self._flags]
    command += ["--config.mesh.data=1", "--config.mesh.fsdp=-1"]
    process = subprocess.Popen(
      command if evaluate else [*command, "--config.evaluation.benchmark="],
      cwd=ROOT,
      env=env | ({"HIT": hit} if hit else {}),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    try:
      out, err = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)  # the script and all its processes
      raise
    self.lines[name] = (err + out).splitlines()
    return subprocess.CompletedProcess(command, process.returncode, out, err)

  def __getitem__(self, name: str) -> epath.Path:
    return self._place / name

  def own_files(self) -> list[pathlib.Path]:
    """Returns the files in the home and temporary folders of the processes."""
    return [path for path in self._folder.glob("host*/**/*") if path.is_file()]

  def take(self, source: epath.Path, name: str) -> None:
    """Copies a folder of this or another pod to `name`."""
    self[name].mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
      if path.is_dir():
        self.take(path, f"{name}/{path.name}")
      else:
        (self[name] / path.name).write_bytes(path.read_bytes())

  def steps_read(self, record: str) -> list[int]:
    """Returns the numbers of the batches that process 0 read."""
    lines = (self._folder / f"{record}.batches.0").read_text().splitlines()
    return [json.loads(line)[0] for line in lines]

  def batches(self, record: str) -> dict[int, list[list[list[int]]]]:
    """Returns of every batch, in the order read, the examples of its rows by process."""
    files = sorted(self._folder.glob(f"{record}.batches.*"))
    read = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    numbers = [number for number, _ in read[0]]
    assert all([number for number, _ in part] == numbers for part in read), "all read the same"
    return {number: [part[k][1] for part in read] for k, number in enumerate(numbers)}


def _state(folder: epath.Path) -> dict[str, np.ndarray]:
  """Returns the latest checkpoint's state as numpy arrays by path."""
  steps = [path for path in (folder / "checkpoints").iterdir() if path.name.isdigit()]
  latest = max(steps, key=lambda path: int(path.name))
  assert latest.name == str(STEPS)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with ocp.StandardCheckpointer() as checkpointer:
    like = jax.tree.map(
      lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device),
      checkpointer.metadata(latest / "state").item_metadata.tree,
    )
    state = checkpointer.restore(latest / "state", like)
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _losses(folder: epath.Path) -> list[float]:
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "every step once"
  return [line["loss"] for line in lines]


def _scores(folder: epath.Path) -> np.ndarray:
  lines = (folder / "scores.jsonl").read_text().splitlines()
  return np.concatenate([json.loads(line)["scores"] for line in lines])


def _rows(batches) -> dict[int, list[list[int]]]:
  """Returns the examples of the rows of every batch, over all processes."""
  return {number: [row for part in parts for row in part] for number, parts in batches.items()}


@pytest.fixture(scope="module")
def pod(small_config, tmp_path_factory) -> Pod:
  return Pod(small_config, tmp_path_factory.mktemp("pod"))


@pytest.fixture(scope="module")
def unbroken(pod) -> str:
  done = pod.run("unbroken", 2, 2, evaluate=True)
  assert done.returncode == 0, done.stderr[-3000:]
  return "unbroken"


@pytest.fixture(scope="module")
def hosts(small_config, tmp_path_factory, bucket_server) -> Pod:
  """A pod whose processes share nothing but a bucket."""
  folder = tmp_path_factory.mktemp("hosts")
  return Pod(small_config, folder, epath.Path("gs://bis-jax") / folder.name)


@pytest.fixture(scope="module")
def broken(hosts) -> str:
  """A run that was stopped, resumed, and lost a process to kill -9."""
  done = hosts.run("broken", 2, 2, hit="1 1 SIGTERM", record="first")
  assert done.returncode == console.STOPPED, done.stderr[-3000:]
  assert done.stderr.count("step 2 of 4 is saved: run the same command again") == 2
  done = hosts.run("broken", 2, 2, hit="3 1 SIGKILL", record="second", HEARTBEAT=str(HEARTBEAT))
  assert done.returncode not in (0, console.STOPPED)
  assert hosts.steps_read("second")[0] == 2, "it went on where it was told to stop"
  assert "process 1 ended with 137" in done.stderr
  assert re.search("process 0 ended with (1|134)\n", done.stderr), "by itself, not by the script"
  return "broken"


@pytest.fixture(scope="module")
def alone(hosts, broken) -> str:
  """The broken run, resumed by one process with one device until it ends."""
  hosts.take(hosts[broken], "alone")
  done = hosts.run("alone", 1, 1, evaluate=True)
  assert done.returncode == 0, done.stderr[-3000:]
  return "alone"


def test_a_run_shows_what_a_person_needs_and_nothing_else(pod, unbroken, hosts, alone):
  """Neither lines of libraries nor of the second process, and no line twice."""
  resumed = (*OUTPUT, "resuming from step 2 of 4", *NO_ACCOUNT)
  for shows, patterns in (pod.lines[unbroken], OUTPUT), (hosts.lines[alone], resumed):
    shown = "\n".join(shows)
    lines = [re.sub(r"^\[0\] ([-\d]{10} [:\d]{8} )?", "", line) for line in shows]
    assert all(any(re.fullmatch(p, line) for p in patterns) for line in lines), shown
    assert all(any(re.fullmatch(p, line) for line in lines) for p in patterns), shown
    assert len(set(lines)) == len(lines), shown


def test_every_process_reads_rows_of_its_own_and_none_is_missed(pod, unbroken):
  split = pod.batches(unbroken)
  assert list(split) == list(range(STEPS))
  for parts in split.values():
    assert [len(part) for part in parts] == [2, 2], "half the rows each"
    assert parts[0] != parts[1]


def test_a_pod_leaves_one_set_of_files(pod, unbroken):
  names = {path.name for path in pod[unbroken].iterdir()}
  assert names >= {"config.json", "manifest.json", "evaluation.json", "index.html", "checkpoints"}
  assert not [name for name in names if name.endswith(".part")]
  assert len(list(pod[unbroken].glob("tensorboard/*"))) == 1


def test_hosts_that_share_only_a_bucket_end_bit_equal_to_the_run_on_a_disk(
  pod, unbroken, hosts, broken, tmp_path
):
  """Stopped, killed, resumed and evaluated; a run's other commands are in `bucket_run_test`."""
  hosts.take(hosts[broken], "resumed")
  done = hosts.run("resumed", 2, 2, evaluate=True)
  assert done.returncode == 0, done.stderr[-3000:]
  ours, theirs = _state(hosts["resumed"]), _state(pod[unbroken])
  assert set(ours) == set(theirs) and len(ours) > 20
  for path, array in ours.items():
    np.testing.assert_array_equal(array, theirs[path], err_msg=path)
  assert _losses(hosts["resumed"]) == _losses(pod[unbroken])
  np.testing.assert_array_equal(_scores(hosts["resumed"]), _scores(pod[unbroken]))
  kept = [path.name for path in hosts.own_files() if path.stat().st_size > 100_000]
  assert not kept, "nothing of the corpus or the run is on a host's own disk"


def test_it_goes_on_with_one_device_of_four_at_the_exact_next_record(pod, unbroken, hosts, alone):
  """Two processes of two devices train and score as one device does.

  Their steps 3 and 4 begin from the same state; losses, state and scores then agree.
  """
  first, last = _rows(hosts.batches("first")), _rows(hosts.batches(alone))
  assert list(first) == [0, 1] and list(last) == [2, 3]
  assert first | last == _rows(pod.batches(unbroken)), "every record once, in its batch"
  np.testing.assert_allclose(_losses(hosts[alone]), _losses(pod[unbroken]), rtol=1e-5)
  np.testing.assert_allclose(_scores(hosts[alone]), _scores(pod[unbroken]), atol=1e-4)
  ours, theirs = _state(hosts[alone]), _state(pod[unbroken])
  assert set(ours) == set(theirs)
  for path, array in ours.items():  # sums in another order
    apart = np.linalg.norm(array - theirs[path]) / max(np.linalg.norm(theirs[path]), 1e-30)
    assert apart < 1e-5, path
