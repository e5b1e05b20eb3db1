"""Selects 10 % of a billion rollouts from a score table on disk, drawn at random, on one host.

  python -m benchmarks.select_billion --folder=DIR [--rollouts=1000000000] [--devices]

The table has 38 unequal sources and 2 to 9 steps per rollout of 16 continuations: about 13.5 GB. It stays in
DIR for another call. Memory is the most that was resident, mapped pages included, in a process that
selects and writes the manifest. Results: benchmarks/RESULTS.md.
"""

import functools
import json
import pathlib
import resource
import time
import zipfile

import numpy as np
from absl import app, flags

from bis_jax.corpus.score_table import PAPER_OK, STRICT_OK, ScoreTable
from bis_jax.selection.rule import select

_ROLLOUTS = flags.DEFINE_integer("rollouts", 1_000_000_000, "rows of the table")
_FOLDER = flags.DEFINE_string("folder", None, "of the table", required=True)
_DEVICES = flags.DEFINE_bool("devices", False, "Grain and JAX count the blocks, not NumPy")
SOURCES, CHUNK, DRAWN = 38, 1 << 22, 8  # DRAWN chunks are drawn, then they repeat


@functools.cache
def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns numbers of steps and counts of a chunk: half right to the end, others ending in zeros."""
  rng = np.random.default_rng(seed)
  n = rng.integers(2, 10, CHUNK, np.int16)
  counts = rng.integers(1, 17, n.sum(dtype=np.int64), np.uint8)
  right = np.where(rng.random(CHUNK) < 0.5, n, (n * rng.random(CHUNK)).astype(np.int16))
  place = np.arange(counts.size) - np.repeat(np.cumsum(n, dtype=np.int64) - n, n)
  return n, counts * (place < np.repeat(right, n))


def draw(path: pathlib.Path, rows: int) -> None:
  """Writes the table in chunks: a column is never in memory."""
  rng = np.random.default_rng(0)
  shares = rng.lognormal(0, 0.8, SOURCES)
  bounds = np.round(np.cumsum(np.append(0.0, shares)) / shares.sum() * rows).astype(np.int64)
  chunks = [slice(start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK)]

  def lengths(at: int) -> np.ndarray:
    return drawn(at % DRAWN)[0][: chunks[at].stop - chunks[at].start]

  def source(at: int) -> np.ndarray:
    of_row = np.arange(chunks[at].start, chunks[at].stop)
    return (np.searchsorted(bounds, of_row, side="right") - 1).astype(np.int16)

  def correct(at: int) -> np.ndarray:
    return drawn(at % DRAWN)[1][: lengths(at).sum(dtype=np.int64)]

  def line(at: int) -> np.ndarray:
    of_row = np.arange(chunks[at].start, chunks[at].stop)
    return (of_row - bounds[source(at)]).astype(np.int32)

  steps = sum(int(lengths(at).sum(dtype=np.int64)) for at in range(len(chunks)))
  head = {"source_names": [f"source_{at:02d}" for at in range(SOURCES)], "digest": "", "inputs": ""}
  head |= {"rows": rows, "steps": steps}
  one = {"total": np.uint8(16), "flags": np.uint8(STRICT_OK | PAPER_OK), "group": np.uint64(0)}
  one |= {name: np.int64(-1) for name in ("rollout", "offset")} | {"length": np.int32(-1)}
  whole = {name: np.array([value]) for name, value in one.items()}
  whole |= {"head": np.str_(json.dumps(head)), "scores": np.zeros(0)}
  whole |= {"embedding": np.zeros((1, 0), np.float16)}
  ragged = {"source": (source, np.int16, rows), "line": (line, np.int32, rows)}
  ragged |= {"steps": (lengths, np.int16, rows), "correct": (correct, np.uint8, steps)}
  with zipfile.ZipFile(path, "w") as archive:
    for name, value in whole.items():
      with archive.open(f"{name}.npy", "w") as file:
        np.lib.format.write_array(file, np.asarray(value))
    for name, (part, dtype, size) in ragged.items():
      with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        form = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, form | {"shape": (size,)})
        for at in range(len(chunks)):
          file.write(part(at).tobytes())


def peak_gigabytes() -> float:
  """Returns the peak memory of this process."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def main(_) -> None:
  """Prints seconds and peak memory of drawing, selecting and writing the manifest."""
  path = pathlib.Path(_FOLDER.value) / f"{_ROLLOUTS.value}.npz"
  if not path.exists():
    started = time.perf_counter()
    draw(path, _ROLLOUTS.value)
    print(f"draw {time.perf_counter() - started:.0f} s, {path.stat().st_size / 1e9:.1f} GB on disk")
    return  # memory is measured in a process of its own
  table = ScoreTable.load(path)
  started = time.perf_counter()
  manifest = select(table, devices=_DEVICES.value, strategy="bis", fraction=0.1)
  selected = time.perf_counter()
  print(f"select {selected - started:.0f} s, peak {peak_gigabytes():.2f} GB", flush=True)
  manifest.save(path.with_suffix(".manifest.json"))
  print(
    f"write the manifest of {len(manifest):,} rollouts {time.perf_counter() - selected:.0f} s, "
    f"peak {peak_gigabytes():.2f} GB"
  )


if __name__ == "__main__":
  app.run(main)
