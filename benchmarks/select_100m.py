"""Selects 10 % of 100 million rollouts from their score table, drawn at random, on one host.

  python benchmarks/select_100m.py [--rollouts=100000000]

Results: benchmarks/RESULTS.md.
"""

import pathlib
import resource
import tempfile
import time

import numpy as np
from absl import app, flags

from bis_jax.corpus.score_table import PAPER_OK, STRICT_OK, ScoreTable
from bis_jax.selection.rule import select

_ROLLOUTS = flags.DEFINE_integer("rollouts", 100_000_000, "rows of the table")
SOURCES, CHUNK = 38, 1 << 20


def draw(rows: int) -> ScoreTable:
  """Returns a table of 2 to 15 steps per rollout, MC scores in sixteenths, unequal sources."""
  rng = np.random.default_rng(0)
  shares = rng.lognormal(0, 0.8, SOURCES)
  bounds = np.round(np.cumsum(np.append(0.0, shares)) / shares.sum() * rows).astype(np.int64)
  sizes = np.diff(bounds)
  n, n_pos = np.empty(rows, np.int16), np.empty(rows, np.int16)
  score_sum, spread_sum = np.empty(rows), np.empty(rows)
  for start in range(0, rows, CHUNK):
    part = slice(start, min(start + CHUNK, rows))
    size = part.stop - part.start
    n[part] = rng.integers(2, 16, size)
    n_pos[part] = np.minimum(rng.integers(0, 30, size), n[part])  # half of them pure
    units = n_pos[part] + rng.integers(0, 15 * n_pos[part].astype(np.int64) + 1)
    score_sum[part] = units / 16
    spread_sum[part] = (units * (16 - units / np.maximum(n_pos[part], 1)) / 256).round(3)
  return ScoreTable(
    source_names=tuple(f"source_{i:02d}" for i in range(SOURCES)),
    source=np.repeat(np.arange(SOURCES, dtype=np.int16), sizes),
    line=np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
    n=n,
    n_pos=n_pos,
    score_sum=score_sum,
    spread_sum=spread_sum,
    flags=np.full(rows, STRICT_OK | PAPER_OK, np.uint8),
    rollout=np.broadcast_to(np.int64(-1), rows),  # nothing is stored: these three take no memory
    offset=np.broadcast_to(np.int64(-1), rows),
    length=np.broadcast_to(np.int32(-1), rows),
  )


def peak_gigabytes() -> float:
  """Returns the peak memory of this process."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def main(_) -> None:
  """Prints seconds and peak memory of drawing, selecting and writing the manifest."""
  started = time.perf_counter()
  table = draw(_ROLLOUTS.value)
  print(
    f"draw                {time.perf_counter() - started:6.1f} s, peak {peak_gigabytes():.2f} GB"
  )
  for rule in (
    {"strategy": "bis", "fraction": 0.1},
    {"strategy": "random", "fraction": 0.1},
    {"strategy": "bis", "fraction": 0.1, "scope": "global"},
  ):
    started = time.perf_counter()
    manifest = select(table, **rule)
    selected = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
      manifest.save(pathlib.Path(folder) / "manifest.json")
    written = time.perf_counter()
    words = " ".join(str(value) for value in rule.values())
    print(
      f"{words:19} {selected - started:6.1f} s, and {written - selected:.1f} s to write its "
      f"{len(manifest):,} rollouts; peak {peak_gigabytes():.2f} GB"
    )


if __name__ == "__main__":
  app.run(main)
