"""Annotations -> kept records on disk, against a plain Python loop, and again from the score table.

  python benchmarks/select_corpus.py --annotations=DIR [--repeats=3]

DIR holds 565,149 rollouts in 38 files (1.4 GB) in the layout of VisualPRM400K-v1.1-Raw. Commands
run as a person runs them, start of Python included, plain loop and command alternating; the least
time of each counts. Memory is the most that a command and its processes held together (Pss).
Results: benchmarks/RESULTS.md.
"""

import filecmp
import pathlib
import resource
import subprocess
import sys
import tempfile
import threading
import time

from absl import app, flags

_ANNOTATIONS = flags.DEFINE_string("annotations", None, "folder of *.jsonl", required=True)
_REPEATS = flags.DEFINE_integer("repeats", 3, "of which the least time counts")

HERE = pathlib.Path(__file__).parent
OTHER_RULES = (
  ("--fraction=0.25",),
  ("--alpha=0.05",),
  ("--strategy=average_stepwise",),
  ("--strategy=random", "--seed=1"),
  ("--tau=0.25",),
  ("--unmeasured=ignore",),
  ("--strategy=bis_grouped",),
  ("--strategy=bis_by_position",),
  ("--strategy=bis_posterior",),
)


def processes_of(root: int) -> list[int]:
  """Returns a process and all its descendants."""
  found = [root]
  for process in found:
    try:
      children = pathlib.Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
      continue
    found += map(int, children.split())
  return found


def proportional_kilobytes(process: int) -> int:
  """Returns a process's memory, pages shared by several processes divided among them."""
  try:
    text = pathlib.Path(f"/proc/{process}/smaps_rollup").read_text()
  except OSError:
    return 0
  return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)


def timed(command: list[str], memory: bool = False) -> tuple[float, float, float]:
  """Returns (seconds, processor seconds, peak megabytes, or 0 if not measured)."""
  most, before, started = 0, resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
  running = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
  done = threading.Event()

  def watch():
    nonlocal most
    while memory and not done.wait(0.05):
      most = max(most, sum(map(proportional_kilobytes, processes_of(running.pid))))

  watcher = threading.Thread(target=watch)
  watcher.start()
  code = running.wait()
  seconds = time.perf_counter() - started
  done.set()
  watcher.join()
  if code:
    raise RuntimeError(f"{command} ended with {code}")
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
  return seconds, cpu, most / 1024


def main(_) -> None:
  """Prints every figure."""
  with tempfile.TemporaryDirectory() as name:
    folder, annotations = pathlib.Path(name), _ANNOTATIONS.value
    plain = [str(HERE / "select_corpus_plain.py"), annotations, f"{folder}/plain", "0.1", "0.2"]
    ours = ["-m", "bis_jax.select", f"--annotations={annotations}", "--overwrite"]
    select = [*ours, "--fraction=0.1", "--alpha=0.2", f"--out={folder}/kept.jsonl"]
    runs = [(timed(plain), timed(select)) for _ in range(_REPEATS.value)]
    loop, command = (min(run[which][0] for run in runs) for which in (0, 1))
    loop_cpu, command_cpu = (min(run[which][1] for run in runs) for which in (0, 1))
    print(f"plain loop          {loop:8.2f} s, {loop_cpu:.2f} processor s")
    print(f"bis_jax.select      {command:8.2f} s, {command_cpu:.2f} processor s")
    print(f"                    {loop / command:8.1f} times faster")
    same = filecmp.cmp(folder / "plain", folder / "kept.jsonl", shallow=False)
    print(f"kept records        {'the same bytes' if same else 'NOT THE SAME'}")
    print(f"peak memory         {timed(select, memory=True)[2]:8.0f} MB")
    table = f"--table={folder}/table.npz"
    timed([*ours, f"--out={folder}/first.jsonl", table])
    for rule in OTHER_RULES:
      records = min(timed([*ours, f"--out={folder}/next.jsonl", table, *rule])[0] for _ in range(3))
      manifest = min(
        timed([*ours, f"--out={folder}/next.json", "--format=manifest", table, *rule])[0]
        for _ in range(3)
      )
      print(
        f"from the table, {' '.join(rule):32} manifest {manifest:.2f} s, records {records:.2f} s"
      )


if __name__ == "__main__":
  app.run(main)
