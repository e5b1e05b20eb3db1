"""Starts several runs at once on one empty cache, many times: one corpus, equal figures.

    python -m benchmarks.cache_starts [TIMES [RUNS]]

Each of 2, 3 and 5 processes draws the toy corpus, prepares it and selects from it; at the end they
must have read the same bytes and kept the same rollouts, and nothing else may be in the cache. Then
as many whole runs, RUNS times, each with a workdir of its own, train a tiny model: their losses and
evaluations must be equal.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROCESSES = (2, 3, 5)
TOY = dict(rollouts=300, images=100, benchmark_items=18)
_CACHE = """
import json, pathlib, sys
from bis_jax.corpus import preparation, shared
from bis_jax.selection.rule import select
from bis_jax.toy import drawing
cache, toy = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
drawn = drawing.draw(cache / "toy", workers=1, **toy)
corpus = preparation.prepare(drawn / "annotations", drawn / "images", cache / "corpus", workers=1)
manifest = select(corpus.score_table, strategy="bis", fraction=0.1)
print(json.dumps([shared.digests_of(drawn), corpus.stats, len(corpus), corpus.digest, manifest.digest]))
"""
_OPTIONS = [
  *("corpus.toy.rollouts=1000", "corpus.toy.images=300", "corpus.toy.benchmark_items=24"),
  *("corpus.workers=1", "model.size=tiny", "pretrain.steps=2", "train.steps=4"),
  *("train.global_batch=8", "train.log_every=1", "train.checkpoint_every=4", "evaluation.every=0"),
]


def start(cache: pathlib.Path) -> subprocess.Popen:
  command = [sys.executable, "-c", _CACHE, str(cache), json.dumps(TOY)]
  return subprocess.Popen(command, cwd=ROOT, text=True, stdout=-1, stderr=-1)


def start_run(cache: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
  command = [sys.executable, "-m", "bis_jax.main", "--config=configs/qwen_bis10.py:toy"]
  options = [f"--config.{option}" for option in (*_OPTIONS, f"corpus.cache={cache}")]
  return subprocess.Popen(
    [*command, f"--workdir={workdir}", *options], cwd=ROOT, text=True, stdout=-1, stderr=-1
  )


def ended(process: subprocess.Popen) -> str:
  """Returns what a process printed; raises if it failed."""
  out, errors = process.communicate()
  if process.returncode:
    raise RuntimeError(f"exit code {process.returncode}:\n{errors}")
  return out


def cache(processes: int) -> bool:
  """Returns whether processes that were started at once saw one corpus and left nothing else."""
  with tempfile.TemporaryDirectory() as folder:
    starts = [start(pathlib.Path(folder)) for _ in range(processes)]
    found = {ended(process) for process in starts}
    left = {path.name for path in pathlib.Path(folder).iterdir()}
  return len(found) == 1 and left == {"toy", "corpus"}


def runs(processes: int) -> bool:
  """Returns whether whole runs that were started at once have the same losses and evaluation."""
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    starts = [start_run(folder / "cache", folder / f"run{at}") for at in range(processes)]
    for process in starts:
      ended(process)
    figures = set()
    for at in range(processes):
      lines = (folder / f"run{at}/metrics.jsonl").read_text().splitlines()
      losses = [line.get("loss") for line in map(json.loads, lines)]
      figures.add(f"{losses} {(folder / f'run{at}/evaluation.json').read_text()}")
    left = sorted(path.name.split("-")[0] for path in (folder / "cache").iterdir())
  return len(figures) == 1 and left == ["backbone", "compiled", "corpus", "toy"]


def main(times: int = 20, whole: int = 1) -> None:
  wrong = 0
  for what, turns, check in (("corpus", times, cache), ("run", whole, runs)):
    for processes in PROCESSES if turns else ():
      began = time.monotonic()
      good = sum(check(processes) for _ in range(turns))
      wrong += turns - good
      print(
        f"{processes} at once, {what}: {good} of {turns} times equal, "
        f"{(time.monotonic() - began) / turns:.1f} s each",
        flush=True,
      )
  sys.exit(wrong > 0)


if __name__ == "__main__":
  main(*map(int, sys.argv[1:]))
