"""Times the evaluation at VisualProcessBench's size: 2,866 items, 26,950 steps, 1,000 draws.

  python benchmarks/evaluation_time.py

Prints seconds, best of three, in one process. Results: benchmarks/RESULTS.md.
"""

import time
import types

import numpy as np

from bis_jax.evaluation import step_evaluation
from bis_jax.evaluation.visual_process_bench import SOURCES

ITEMS, STEPS, DRAWS = 2866, 26_950, 1000


def draw_run(seed: int) -> tuple[list, list[np.ndarray]]:
  """Returns items and scores with the benchmark's numbers of items, steps, sources and policies."""
  rng = np.random.default_rng(seed)
  cuts = np.sort(rng.choice(np.arange(1, STEPS), ITEMS - 1, replace=False))
  items, scores = [], []
  for i, n in enumerate(np.diff(cuts, prepend=0, append=STEPS)):
    labels = rng.choice([1, -1, 0], n, p=[0.6, 0.35, 0.05])
    items.append(
      types.SimpleNamespace(
        labels=tuple(labels.tolist()), data_source=SOURCES[i % 5], policy_model=f"policy {i % 4}"
      )
    )
    scores.append(1 / (1 + np.exp(-rng.normal(labels, 1.5))))
  return items, scores


def seconds(function, *arguments, **more) -> float:
  """Returns the wall time of one call."""
  start = time.perf_counter()
  function(*arguments, **more)
  return time.perf_counter() - start


def main() -> None:
  """Prints the table."""
  items, scores = draw_run(0)
  baseline = draw_run(1)[1]
  baseline = [np.resize(np.concatenate(baseline), len(s)) for s in scores]
  runs = {
    f"evaluate, {DRAWS} draws": (step_evaluation.evaluate, items, scores),
    f"compare, {DRAWS} paired draws": (step_evaluation.compare, items, scores, baseline),
  }
  for name, (function, *arguments) in runs.items():
    best = min(seconds(function, *arguments, bootstrap_draws=DRAWS) for _ in range(3))
    print(f"{name:28} {best:6.2f} s")
  best = min(seconds(step_evaluation.evaluate, items, scores, bootstrap_draws=0) for _ in range(3))
  print(f"{'evaluate, no intervals':28} {best:6.2f} s")


if __name__ == "__main__":
  main()
