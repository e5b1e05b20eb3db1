"""Runs the study's arms, one per core, and the backbone that they start from."""

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

from benchmarks.study import arms
from benchmarks.study.arms import Part

ROOT = pathlib.Path(__file__).resolve().parents[2]
# glibc keeps freed memory; otherwise a step of a small model spends a fifth of its time on new pages.
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


@dataclasses.dataclass(frozen=True)
class _Arm:
  """One run; `corpus`: its settings, which no other arm may draw at the same time."""

  part: str
  place: pathlib.Path
  strategy: str
  fraction: float
  seed: int
  settings: Mapping[str, Any]
  corpus: Hashable

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
  drawn = {arm.corpus for arm in every if arm.done}
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
        while free and not stopped and (arm := _next(waiting, drawn, running)):
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
            drawn.add(arm.corpus)
          _note_time(folder, arm.part, arm.name, time.monotonic() - started)
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
    for fraction in part.fractions:
      for strategy in part.strategies:
        yield _Arm(part.name, folder / part.name, strategy, fraction, seed, own, corpus)


def _next(waiting: Sequence[_Arm], drawn: set[Hashable], running: Mapping) -> _Arm | None:
  """Returns the first arm whose corpus no running arm is drawing."""
  being_drawn = {arm.corpus for arm, _, _ in running.values()} - drawn
  return next((arm for arm in waiting if arm.corpus not in being_drawn), None)


def _start(arm: _Arm, core: int, cores: Sequence[int]) -> subprocess.Popen:
  env = os.environ | _MEMORY | {"RUN": f"{sys.executable} -m bis_jax.main"}
  os.sched_setaffinity(0, {core})  # inherited by the child
  try:
    return subprocess.Popen(arm.command(), cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
  finally:
    os.sched_setaffinity(0, cores)


def _note_time(folder: pathlib.Path, part: str, arm: str, seconds: float) -> None:
  with open(folder / "timings.jsonl", "a") as file:
    file.write(json.dumps({"part": part, "arm": arm, "seconds": seconds}) + "\n")


def make_backbone(
  folder: pathlib.Path, settings: Mapping[str, Any], learn: Mapping[str, Any] | None = None
) -> pathlib.Path:
  """Trains and exports a model for arms to start from, once; returns its folder.

  `learn`: more settings of its first run.
  """
  folder.mkdir(parents=True, exist_ok=True)
  start = dict(learn or {})
  for form in ("learn", "settle"):
    run, out = folder / form, folder / f"backbone_{form}"
    if not (out / "config.json").exists():
      started, flags = time.monotonic(), dict(settings) | start
      _run(
        *("bis_jax.main", f"--workdir={run}", f"--config=benchmarks/study/recipe.py:{form}"),
        *(f"--config.{key}={value}" for key, value in flags.items()),
      )
      _run("bis_jax.export", f"--workdir={run}", f"--out={out}", "--dtype=float32")
      _note_time(folder, "backbone", form, time.monotonic() - started)
    start = {"model.checkpoint": str(out)}
  return out


def measure_theory(folder: pathlib.Path) -> None:
  """Writes folder/theory, with measurements on students that were trained on random parts."""
  names = (f"{arms.START.name}/random_0.1", "grid/random_0.1", "grid/random_0.5")
  runs = [str(folder / f"{name}_seed0") for name in names]
  _run("benchmarks.study.theory", f"--out={folder / 'theory'}", f"--workdir={','.join(runs)}")


def _run(module: str, *flags: str) -> None:
  subprocess.run([sys.executable, "-m", module, *flags], cwd=ROOT, check=True)
