"""Jitted statistics and scores alone: steps per second, beside the same run's memory bandwidth.

  python benchmarks/step_ranks.py

MC counts of 4 million rollouts are on the device; the program counts steps, positive steps and
continuations and looks the BIS rank up. Times are the least of 20. Results: benchmarks/RESULTS.md.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from bis_jax.selection.ranks import NO_STEP, rank_table, step_ranks

ROLLOUTS, MOST_STEPS = 1 << 22, 16


def least_seconds(program, *arguments) -> float:
  """Returns the least time of 20 runs, after one that compiles."""
  jax.block_until_ready(program(*arguments))
  times = []
  for _ in range(20):
    started = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    times.append(time.perf_counter() - started)
  return min(times)


def main() -> None:
  """Prints both rates."""
  rng = np.random.default_rng(0)
  counts = rng.integers(0, 17, (MOST_STEPS, ROLLOUTS), dtype=np.uint8)
  lengths = np.clip(np.round(rng.normal(5.6, 1.9, ROLLOUTS)), 2, 15)
  counts[np.arange(MOST_STEPS)[:, None] >= lengths] = NO_STEP
  steps = int(lengths.sum())
  counts, ranks = jnp.asarray(counts), jnp.asarray(rank_table(0.2, steps=MOST_STEPS))
  seconds = least_seconds(step_ranks, counts, ranks)
  print(f"statistics and ranks {steps / seconds / 1e6:8.0f} M steps/s")
  moved = counts.size + 4 * ROLLOUTS
  print(f"bytes read + written {moved / seconds / 1e9:8.2f} GB/s")
  copy = least_seconds(jax.jit(lambda block: block + jnp.uint8(1)), counts)
  print(f"plain copy           {2 * counts.size / copy / 1e9:8.2f} GB/s")


if __name__ == "__main__":
  main()
