"""Starts several runs at once in one workdir: one owns it, the others are told, nothing is lost.

    python -m benchmarks.simultaneous

2, 3 and 5 processes, ten new workdirs each. Asked: exactly one run completes, every other one ends
with the sentence that names the owner, and the workdir holds every step once and a whole checkpoint.
"""

import json
import multiprocessing
import pathlib
import re
import sys
import tempfile
import time

TIMES, COUNTS = 10, (2, 3, 5)


def _runs(index: int, cache: pathlib.Path, barrier, ended) -> None:
  from benchmarks.damage import tiny_config
  from bis_jax.errors import UserError
  from bis_jax.run import stages

  config = tiny_config(cache).unlock()
  config.evaluation.benchmark = ""
  if index == 0:
    stages.run(config, str(cache / "first"))  # draws the corpus and compiles
  barrier.wait()
  for count in COUNTS:
    for turn in range(TIMES):
      barrier.wait()
      if index >= count:
        continue
      try:
        stages.run(config, str(cache / f"{count}-{turn}"))
        ended.put("done")
      except UserError as error:
        ended.put(str(error))
      except BaseException as error:
        ended.put(f"TRACEBACK {error!r}")


def main() -> None:
  context = multiprocessing.get_context("spawn")
  barrier, ended = context.Barrier(max(COUNTS) + 1), context.Queue()
  faults = 0
  with tempfile.TemporaryDirectory() as scratch:
    cache = pathlib.Path(scratch)
    started = [
      context.Process(target=_runs, args=(i, cache, barrier, ended), daemon=True)
      for i in range(max(COUNTS))
    ]
    for process in started:
      process.start()
    barrier.wait()
    for count in COUNTS:
      start, whole = time.monotonic(), 0
      for turn in range(TIMES):
        barrier.wait()
        outcomes = [ended.get() for _ in range(count)]
        told = rf"--workdir={cache}/{count}-{turn} is in use by process \d+ on .*, since "
        others = [outcome for outcome in outcomes if outcome != "done"]
        right = len(others) == count - 1 and all(re.match(told, other) for other in others)
        if right and _is_whole(cache / f"{count}-{turn}"):
          whole += 1
        else:
          print(outcomes, flush=True)
      faults += TIMES - whole
      seconds = time.monotonic() - start
      print(
        f"{count} at once: one owner and a whole run {whole} of {TIMES} times, {seconds:.0f} s",
        flush=True,
      )
  sys.exit(bool(faults))


def _is_whole(run: pathlib.Path) -> bool:
  lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
  checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
  return lines == [1, 2, 3, 4] and checkpoints == ["2", "4"] and not (run / "owner.json").exists()


if __name__ == "__main__":
  main()
