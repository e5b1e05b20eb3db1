"""A full disk under the cache: one sentence, nothing half-written, and it completes with room.

    python -m benchmarks.cache_full_disk        # as root: it mounts small file systems in memory

The cache (toy corpus, prepared corpus, pre-trained backbone) is on a tmpfs of 1, 4, 8 and 30 MB. The
command must end with a sentence that names the place, leave no part of what it could not finish, and
complete after the file system has grown, with the digests of a run on a large disk.
"""

import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
MEGABYTES = (1, 4, 8, 30)
_COMMAND = """
import pathlib, sys
from bis_jax.console import command
from bis_jax.corpus import shared
from bis_jax.run import stages
from bis_jax.settings.locations import locate
from configs import qwen_bis10
from absl import flags
flags.FLAGS(["full_disk"])
c = qwen_bis10.get_config("toy")
c.corpus.cache, c.corpus.workers = sys.argv[1], 1
c.corpus.toy.rollouts, c.corpus.toy.images, c.corpus.toy.benchmark_items = 1000, 300, 24
c.pretrain.steps = 2
with command("full_disk", []):
  where = locate(c)
  corpus = stages.prepare_corpus(c, where)
  backbone = stages.initial_checkpoint(c, where)
  for path in (where.toy, backbone):
    print({k: v for k, v in shared.digests_of(path).items() if k not in ("README.md", "digest.json")})
  print(corpus.digest)
"""


def run(cache: pathlib.Path) -> tuple[int, str, str]:
  done = subprocess.run(
    [sys.executable, "-c", _COMMAND, str(cache)], cwd=ROOT, text=True, capture_output=True
  )
  return done.returncode, done.stdout, done.stderr


def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    code, wanted, errors = run(pathlib.Path(folder))
  assert code == 0, errors
  wrong = 0
  for size in MEGABYTES:
    with tempfile.TemporaryDirectory() as folder:
      mount = ["mount", "-t", "tmpfs", "-o"]
      subprocess.run([*mount, f"size={size}m", "tmpfs", folder], check=True)
      try:
        code, out, errors = run(pathlib.Path(folder))
        told = errors.strip().splitlines()[-1] if code else "it fits"
        left = [path.name for path in pathlib.Path(folder).iterdir()]
        good = "Traceback" not in errors and not any("part" in name for name in left)
        good &= code == 0 or (folder in told and "no space left" in told)
        subprocess.run([*mount, "remount,size=500m", "tmpfs", folder], check=True)
        code, out, errors = run(pathlib.Path(folder))
        good &= code == 0 and out == wanted
      finally:
        subprocess.run(["umount", folder], check=True)
      wrong += not good
      print(f"{size} MB: {'good' if good else 'WRONG'}; {told}; left: {left}", flush=True)
  sys.exit(wrong > 0)


if __name__ == "__main__":
  main()
