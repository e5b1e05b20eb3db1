"""A small run whose bucket goes away while it trains: for 20 seconds, and for good.

  python -m benchmarks.bucket_faults [--seconds=20]

The bucket is a local one (tests/bucket_server.py) that refuses connections, with the waiting times
between retries that a real one has. Prints whether the run survived the short outage with the same
losses, how long after a lasting one it ended and with which words, and whether it then resumed to the
same losses. Results: benchmarks/RESULTS.md.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

from tests.bucket_server import BucketServer

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 40
SETTINGS = {
  "corpus.cache": "gs://bucket/cache",
  "corpus.toy.rollouts": 1000,
  "corpus.toy.images": 300,
  "corpus.toy.benchmark_items": 24,
  "evaluation.benchmark": "",
  "inputs.prefetch": 1,
  "model.size": "tiny",
  "pretrain.steps": 0,
  "selection.fraction": 1.0,
  "train.checkpoint_every": 10,
  "train.log_every": 1,
  "train.steps": STEPS,
}


def start(name: str, errors: pathlib.Path) -> subprocess.Popen:
  """Starts the run in the workdir gs://bucket/NAME."""
  command = [sys.executable, "-m", "bis_jax.main", "--config=configs/qwen_bis10.py:toy"]
  command += [f"--workdir=gs://bucket/{name}"]
  command += [f"--config.{key}={value}" for key, value in SETTINGS.items()]
  return subprocess.Popen(command, cwd=ROOT, stderr=errors.open("w"))


def losses(service: BucketServer, name: str) -> list[float]:
  """Returns the losses that a run has logged, in the order of the steps."""
  lines = service.objects["bucket"][f"{name}/metrics.jsonl"].data.splitlines()
  logged = [json.loads(line) for line in lines]
  assert [line["step"] for line in logged] == list(range(1, STEPS + 1))
  return [line["loss"] for line in logged]


def break_at_checkpoint(
  service: BucketServer, name: str, step: int, seconds: float | None
) -> float:
  """Stops the service while a checkpoint is saved, for some seconds or for good; returns when."""
  while not service.names(f"bucket/{name}/checkpoints/{step}/"):
    time.sleep(0.02)
  service.stop()
  if seconds is not None:
    threading.Timer(seconds, service.start).start()
  return time.monotonic()


def main() -> None:
  """Runs and prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--seconds", type=float, default=20)
  seconds = parser.parse_args().seconds
  service = BucketServer()
  service.start()
  service.make_bucket("bucket")
  os.environ.update(service.environment, JAX_PLATFORMS="cpu")
  with tempfile.TemporaryDirectory() as folder:
    errors = pathlib.Path(folder) / "errors"
    assert start("calm", errors).wait() == 0, errors.read_text()
    calm = losses(service, "calm")
    running = start("short", errors)
    break_at_checkpoint(service, "short", 10, seconds)
    code = running.wait()
    same = code == 0 and losses(service, "short") == calm
    print(f"outage of {seconds:.0f} s: exit code {code}, losses equal to the bit: {same}")
    running = start("long", errors)
    broken = break_at_checkpoint(service, "long", 10, None)
    code = running.wait()
    print(f"lasting outage: exit code {code} after {time.monotonic() - broken:.0f} s")
    print("  " + errors.read_text().strip().splitlines()[-1])
    service.start()
    code = start("long", errors).wait()
    same = code == 0 and losses(service, "long") == calm
    print(f"the same command afterwards: exit code {code}, losses equal to the bit: {same}")


if __name__ == "__main__":
  main()
