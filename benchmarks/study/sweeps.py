"""Runs the study's arms, one per core, and chooses the recipe."""

import collections
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from benchmarks.study import arms, results
from benchmarks.study.arms import Part

ROOT = pathlib.Path(__file__).resolve().parents[2]
# glibc keeps freed memory; otherwise a step of a small model spends a fifth of its time on new pages.
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
_CHOICE_SEED = 1000  # of the runs that choose the batch and the learning rate


@dataclasses.dataclass(frozen=True)
class _Arm:
  """One run; `makes`: its corpus and backbone, which no other arm may make at the same time."""

  part: str
  place: pathlib.Path
  strategy: str
  fraction: float
  seed: int
  settings: Mapping[str, Any]
  makes: frozenset[Hashable]

  @property
  def name(self) -> str:
    return f"{self.strategy}_{self.fraction:g}_seed{self.seed}"

  @property
  def done(self) -> bool:
    return (self.place / self.name / "evaluation.json").exists()

  def command(self) -> list[str]:
    return [
      str(ROOT / "launch" / "sweep.sh"),
      str(self.place),
      f"--fractions={self.fraction:g}",
      f"--strategies={self.strategy}",
      f"--seeds={self.seed}",
      "--",
      "--config=benchmarks/study/recipe.py",
      *(f"--config.{key}={value}" for key, value in self.settings.items()),
    ]


def sweep(
  parts: Iterable[tuple[Part, Sequence[int]]], folder: pathlib.Path, settings: Mapping[str, Any]
) -> None:
  """Runs the unfinished arms in order, one per core.

  Raises:
    SystemExit: 1 if an arm failed, after the others; 75 on SIGTERM or SIGINT.
  """
  every = [arm for part, seeds in parts for arm in _arms_of(part, seeds, folder, settings)]
  made = {thing for arm in every if arm.done for thing in arm.makes}
  waiting = [arm for arm in every if not arm.done]
  if not waiting:
    return
  folder.mkdir(parents=True, exist_ok=True)
  cores = sorted(os.sched_getaffinity(0))
  free = collections.deque(cores)
  running: dict[subprocess.Popen, tuple[_Arm, int, float]] = {}
  failed, stopped = [], False

  def stop(number, frame):
    nonlocal stopped
    stopped = True
    for child in running:
      child.terminate()

  before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    with tqdm(total=len(waiting), unit="arm", disable=not sys.stderr.isatty()) as bar:
      while running or (waiting and not stopped):
        while free and not stopped and (arm := _next(waiting, made, running)):
          waiting.remove(arm)
          core = free.popleft()
          running[_start(arm, core, cores)] = arm, core, time.monotonic()
        time.sleep(0.2)
        for child in [child for child in running if child.poll() is not None]:
          arm, core, started = running.pop(child)
          free.append(core)
          bar.update()
          if child.returncode:
            failed.append(arm)
          else:
            made |= arm.makes
          _note_time(folder, arm, time.monotonic() - started)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  if stopped:
    print("study: stopped; the same command resumes", file=sys.stderr)
    sys.exit(75)
  if failed:
    sys.exit("study: failed: " + ", ".join(f"{arm.place / arm.name}.log" for arm in failed))


def _arms_of(
  part: Part, seeds: Sequence[int], folder: pathlib.Path, settings: Mapping[str, Any]
) -> Iterable[_Arm]:
  own = dict(settings) | dict(part.settings)
  corpus = frozenset((key, value) for key, value in own.items() if key.startswith("corpus."))
  for seed in seeds:
    makes = frozenset({corpus})
    if own.get("pretrain.steps") != 0:
      pictures = own.get("corpus.toy.images")
      makes |= {("backbone", pictures, own.get("pretrain.seed", seed))}
    for fraction in part.fractions:
      for strategy in part.strategies:
        yield _Arm(part.name, folder / part.name, strategy, fraction, seed, own, makes)


def _next(waiting: Sequence[_Arm], made: set[Hashable], running: Mapping) -> _Arm | None:
  """Returns the first arm whose corpus and backbone no running arm is making."""
  being_made = {thing for arm, _, _ in running.values() for thing in arm.makes} - made
  return next((arm for arm in waiting if not arm.makes & being_made), None)


def _start(arm: _Arm, core: int, cores: Sequence[int]) -> subprocess.Popen:
  env = os.environ | _MEMORY | {"RUN": f"{sys.executable} -m bis_jax.main"}
  os.sched_setaffinity(0, {core})  # inherited by the child
  try:
    return subprocess.Popen(arm.command(), cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
  finally:
    os.sched_setaffinity(0, cores)


def _note_time(folder: pathlib.Path, arm: _Arm, seconds: float) -> None:
  with open(folder / "timings.jsonl", "a") as file:
    file.write(json.dumps({"part": arm.part, "arm": arm.name, "seconds": seconds}) + "\n")


def choose(
  folder: pathlib.Path, settings: Mapping[str, Any], first: Iterable[tuple[Part, Sequence[int]]]
) -> Mapping[str, Any]:
  """Sweeps `first`, and returns the best of `arms.CANDIDATES` for `full` and `random`."""
  parts = [part for name in arms.CANDIDATES for part in arms.candidate_parts(name)]
  sweep([*first, *((part, [_CHOICE_SEED]) for part in parts)], folder, settings)
  evaluated = results.evaluate_candidates(folder, _CHOICE_SEED)
  (folder / "candidates.json").write_text(json.dumps(evaluated, indent=2) + "\n")
  best = max(evaluated, key=lambda line: line["mean"])
  print(f"study: {best['name']}", file=sys.stderr)
  return arms.CANDIDATES[best["name"]]


def measure_theory(folder: pathlib.Path) -> None:
  """Writes folder/theory, with measurements on students that were trained on random tenths."""
  runs = [folder / part / "random_0.1_seed0" for part in (arms.START.name, "grid", arms.PASSES)]
  command = [sys.executable, "-m", "benchmarks.study.theory", f"--out={folder / 'theory'}"]
  subprocess.run([*command, f"--workdir={','.join(map(str, runs))}"], cwd=ROOT, check=True)
