"""Runs the study's arms, as many abreast as there are cores, and what is chosen from them."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from benchmarks.study import arms, results
from benchmarks.study.arms import Part

ROOT = pathlib.Path(__file__).resolve().parents[2]
# glibc keeps freed memory: a step of a small model spends a fifth of its time on fresh pages else.
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
_RATE_SEED = 1000  # of the runs that choose the learning rate


def sweep(part: Part, folder: pathlib.Path, settings: Mapping[str, Any], seeds: Sequence[int]):
  """Runs the arms of a part that are not done, as many abreast as there are cores.

  Raises SystemExit: 1 where an arm failed, 75 where it was told to stop.
  """
  cores = sorted(os.sched_getaffinity(0))
  place = folder / part.name
  wanted = [
    place / f"{strategy}_{fraction:g}_seed{seed}" / "evaluation.json"
    for strategy in part.strategies
    for fraction in part.fractions
    for seed in seeds
  ]
  if all(path.exists() for path in wanted):
    return
  started = time.monotonic()
  done_before = sum(path.exists() for path in wanted)
  if part.draws and not wanted[0].exists():
    _run([_command(part, place, settings, seeds[:1], first_alone=True)], [cores], wanted, part.name)
  jobs = min(len(cores), len(seeds))
  commands = [_command(part, place, settings, seeds[job::jobs]) for job in range(jobs)]
  _run(commands, [cores[job::jobs] for job in range(jobs)], wanted, part.name)
  with open(folder / "timings.jsonl", "a") as file:
    line = {"part": part.name, "arms": len(wanted) - done_before, "cores": len(cores)}
    file.write(json.dumps(line | {"seconds": time.monotonic() - started}) + "\n")


def _command(
  part: Part,
  place: pathlib.Path,
  settings: Mapping[str, Any],
  seeds: Sequence[int],
  first_alone: bool = False,
) -> list[str]:
  end = 1 if first_alone else None
  return [
    str(ROOT / "launch" / "sweep.sh"),
    str(place),
    "--fractions=" + ",".join(f"{fraction:g}" for fraction in part.fractions[:end]),
    "--strategies=" + ",".join(part.strategies[:end]),
    "--seeds=" + ",".join(map(str, seeds)),
    "--",
    "--config=benchmarks/study/recipe.py",
    *(f"--config.{key}={value}" for key, value in (settings | dict(part.settings)).items()),
  ]


def _run(
  commands: list[list[str]], cores: list[list[int]], wanted: list[pathlib.Path], name: str
) -> None:
  """Runs sweeps abreast, each on its own cores, under a bar of the arms that are done."""
  env = os.environ | _MEMORY | {"RUN": f"{sys.executable} -m bis_jax.main"}
  every, children = os.sched_getaffinity(0), []
  for command, own in zip(commands, cores, strict=True):
    os.sched_setaffinity(0, own)  # which a child inherits
    children.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=sys.stderr))
  os.sched_setaffinity(0, every)

  def stop(number, frame):
    for child in children:
      child.terminate()

  before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    with tqdm(total=len(wanted), desc=name, unit="arm", disable=not sys.stderr.isatty()) as bar:
      while any(child.poll() is None for child in children):
        bar.n = sum(path.exists() for path in wanted)
        bar.refresh()
        time.sleep(0.5)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  codes = [child.returncode for child in children]
  if 75 in codes or -signal.SIGTERM in codes:
    print("study: stopped; the same command goes on", file=sys.stderr)
    sys.exit(75)
  if any(codes):
    sys.exit(f"study: arms of {name} failed; see {wanted[0].parents[1]}/*.log")


def learning_rate(folder: pathlib.Path, settings: Mapping[str, Any]) -> float:
  """Returns the peak learning rate that serves `full` and `random 10 %` best; runs what it needs."""
  for rate in arms.RATES:
    for part in arms.rate_part(rate):
      sweep(part, folder, settings, [_RATE_SEED])
  judged = results.judge_rates(folder, _RATE_SEED)
  (folder / "learning_rates.json").write_text(json.dumps(judged, indent=2) + "\n")
  best = max(judged, key=lambda line: line["mean"])
  print(f"study: learning rate {best['rate']:g}", file=sys.stderr)
  return best["rate"]


def measure_theory(folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
  """Writes folder/theory: closed forms, and the signal of rollouts on a student before and after."""
  sweep(arms.START, folder, settings, [0])
  runs = [folder / part / "random_0.1_seed0" for part in (arms.START.name, "grid")]
  command = [sys.executable, "-m", "benchmarks.study.theory", f"--out={folder / 'theory'}"]
  subprocess.run([*command, f"--workdir={','.join(map(str, runs))}"], cwd=ROOT, check=True)
