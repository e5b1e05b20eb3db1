"""The main job on the toy corpus from scratch: time, memory, and whether the model uses images.

  python -m benchmarks.main_job [configs/internvl_bis10.py:toy]

Runs the README's first command (after its install), or that of another recipe, with an empty cache
in a folder of its own, and prints what was asked beside what was measured. "Looks" compares the
macro-F1 with that on blanked images. Results: benchmarks/RESULTS.md.
"""

import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time


def main(config: str = "configs/toy_bis10.py") -> None:
  """Runs the job and prints the table."""
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder) / "run"
    command = [sys.executable, "-m", "bis_jax.main", f"--config={config}"]
    command += [f"--workdir={workdir}", f"--config.corpus.cache={folder}/cache"]
    start = time.monotonic()
    subprocess.run(command, check=True, cwd=pathlib.Path(__file__).resolve().parents[1])
    minutes = (time.monotonic() - start) / 60
    evaluation = json.loads((workdir / "evaluation.json").read_text())
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  memory = used.ru_maxrss * 1024 / 1e9  # of one process
  busy = (used.ru_utime + used.ru_stime) / 60
  seeing = evaluation["thresholds"]["fixed_0.5"]["macro_f1_pooled"]
  blanked = evaluation["blank_images"]["fixed_0.5"]["macro_f1_pooled"]
  for name, found, asked in (
    ("wall time", f"{minutes:.1f} min", "at most 8"),
    ("processor time", f"{busy:.1f} min", "nothing"),
    ("peak resident memory", f"{memory:.2f} GB", "at most 6"),
    ("pooled macro-F1 at 0.5", f"{seeing:.3f}", "at least 0.80"),
    ("less that of blanked images", f"{seeing - blanked:.3f}", "at least 0.15"),
  ):
    print(f"{name:30} {found:9} asked: {asked}")


if __name__ == "__main__":
  main(*sys.argv[1:])
