"""Does it hold? The paper's comparison, rerun on the embedded corpus, where the truth is known.

  python -m benchmarks.study --out=runs/study            # whole
  python -m benchmarks.study --out=runs/study --quick    # its outline
  python -m benchmarks.study --out=runs/study --page     # the page again, from what has run

First the peak learning rate is chosen on `full` and `random 10 %` alone, by their mean
`overall_source_weighted` with a seed that no arm has. Then every part of `arms` is swept
(`launch/sweep.sh`, one workdir an arm), as many arms abreast as there are cores. The same command
goes on where it was stopped, or a finished arm was deleted. OUT/index.html has the figures and
tables, OUT/results.json every number of it, OUT/table.md what the README shows; OUT/theory says why
selection should work (`benchmarks.study.theory`; not with --quick).

Seeds are not batched on one device: arms abreast, a core each, use the cores fully as it is.
"""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags
from tqdm import tqdm

from benchmarks.study import arms, page, results
from benchmarks.study.arms import Part

_OUT = flags.DEFINE_string("out", "runs/study", "folder of all arms and of the page")
_SEEDS = flags.DEFINE_integer("seeds", 0, "of every arm; 0: 5, or 3 with --quick", lower_bound=0)
_QUICK = flags.DEFINE_bool("quick", False, "few arms on a smaller corpus")
_PAGE = flags.DEFINE_bool("page", False, "train nothing, write the page of the arms that are done")
_CORPUS_CACHE = flags.DEFINE_string(
  "corpus_cache", "", "config.corpus.cache; default: the recipe's"
)

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
  children = [
    subprocess.Popen(
      command,
      cwd=ROOT,
      env=env,
      stdout=sys.stderr,
      preexec_fn=functools.partial(os.sched_setaffinity, 0, own),
    )
    for command, own in zip(commands, cores, strict=True)
  ]

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


def main(argv: list[str]) -> None:
  """Runs what is left of the study and writes its page."""
  if len(argv) > 1:
    sys.exit(f"study: what is {argv[1]!r}? Every argument is a flag, like --quick")
  folder = pathlib.Path(_OUT.value).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  parts = arms.QUICK if _QUICK.value else arms.MAIN + arms.ABLATIONS
  if not _PAGE.value:
    settings = dict(arms.QUICK_SETTINGS) if _QUICK.value else {}
    if _CORPUS_CACHE.value:
      settings["corpus.cache"] = _CORPUS_CACHE.value
    seeds = range(_SEEDS.value or (3 if _QUICK.value else 5))
    settings["optim.learning_rate"] = learning_rate(folder, settings)
    for part in parts:
      sweep(part, folder, settings, seeds)
    if not _QUICK.value and not (folder / "theory" / "index.html").exists():
      measure_theory(folder, settings)
  print(page.write(folder, parts))


if __name__ == "__main__":
  app.run(main)
