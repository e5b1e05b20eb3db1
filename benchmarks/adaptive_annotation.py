"""Continuations that `select --adaptive` saves at an equal kept set, simulated.

  python -m benchmarks.adaptive_annotation TABLE.npz [...]

A table holds the final counts of N continuations per step (`select --table`, or score_table.npz of a
prepared corpus). They are sampled in a random order: N/4 of every step; then, again and again, all of
the rollouts that the counts so far would keep, or N/4 more of all that can still be kept. Those that
can't be kept any more are not sampled further. Results: benchmarks/RESULTS.md.
"""

import dataclasses
import sys

import numpy as np

from bis_jax.corpus.score_table import ScoreTable
from bis_jax.selection.adaptive import standing
from bis_jax.selection.rule import Rule, written_rows

RULES = ((0.25, 0.05), (0.1, 0.2))  # fraction, alpha of the paper


def simulate(table: ScoreTable, rule: Rule, seed: int = 0) -> tuple[float, float]:
  """Returns the shares of continuations saved and of rollouts not sampled to the end.

  Raises AssertionError if a rollout that full annotation keeps was stopped.
  """
  rng, final = np.random.default_rng(seed), int(table.total.max())
  kept, is_open = written_rows(table, rule), np.ones(len(table), bool)
  drawn, sampled = np.zeros(table.correct.size, np.int64), np.zeros(len(table), np.int64)

  def sample(rows: np.ndarray, number: int) -> ScoreTable:
    nonlocal sampled
    more = np.where(rows, np.minimum(number, final - sampled), 0)
    before = np.repeat(sampled, table.steps)
    # Of the continuations not sampled yet, those that are right are hypergeometric.
    right = table.correct - drawn
    drawn[:] += rng.hypergeometric(right, final - before - right, np.repeat(more, table.steps))
    sampled = sampled + more
    totals = np.repeat(sampled, table.steps).astype(np.uint8)
    return dataclasses.replace(table, correct=drawn.astype(np.uint8), total=totals)

  now = sample(is_open, final // 4)
  while True:
    is_open &= standing(now, rule, final).open
    assert not (kept & ~is_open).any(), "a kept rollout was stopped"
    left = is_open & (sampled < final)
    if not left.any():
      return 1 - (sampled * table.steps).sum() / (final * table.correct.size), (
        sampled < final
      ).mean()
    leading = left & written_rows(now, rule)
    now = sample(leading, final) if leading.any() else sample(left, final // 4)


def main(paths: list[str]) -> None:
  """Prints the share of continuations saved for each table and rule."""
  for path in paths:
    table = ScoreTable.load(path)
    measured = np.where(table.total > 0, table.total, table.total.max())  # 0 of 0 counts as sampled
    table = dataclasses.replace(table, total=measured)
    for fraction, alpha in RULES:
      saved, stopped = simulate(table, Rule("bis", fraction=fraction, alpha=alpha))
      print(
        f"{path}: {len(table):,} rollouts, fraction {fraction}, alpha {alpha}: {100 * saved:.1f} % of "
        f"continuations saved, {100 * stopped:.1f} % of rollouts not sampled to the end",
        flush=True,
      )


if __name__ == "__main__":
  main(sys.argv[1:])
