"""Runs in workdirs on disks of 1 to 30 MB: a sentence when one is full, and then it completes.

    python -m benchmarks.full_disk

The disks are tmpfs mounts, so it needs root. Asked: where a disk is too small, one sentence with the
place and the free bytes; once the disk is larger, the same run completes, with the same parameters
as on a large disk.
"""

import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks.damage import tiny_config
from bis_jax.errors import UserError
from bis_jax.run import stages
from bis_jax.scoring.restore import load_run

MEGABYTES = (1, 2, 3, 4, 8, 30)


def main() -> None:
  faults = 0
  with tempfile.TemporaryDirectory() as scratch:
    config = tiny_config(pathlib.Path(scratch) / "cache")
    stages.run(config, f"{scratch}/large")
    wanted = load_run(f"{scratch}/large").params
    for size in MEGABYTES:
      disk = pathlib.Path(scratch) / f"{size}MB"
      disk.mkdir()
      subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "none", disk], check=True)
      try:
        print(f"{size} MB: {_run(config, disk / 'run')}")
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        again = _run(config, disk / "run")
        params = load_run(str(disk / "run")).params
        equal = all(np.array_equal(params[name], wanted[name]) for name in wanted)
        print(f"  with room: {again}; parameters {'equal' if equal else 'DIFFERENT'}")
        faults += again != "complete" or not equal
      finally:
        subprocess.run(["umount", disk], check=True)
  sys.exit(bool(faults))


def _run(config, folder: pathlib.Path) -> str:
  try:
    stages.run(config, str(folder))
    return "complete"
  except UserError as error:
    return str(error)


if __name__ == "__main__":
  main()
