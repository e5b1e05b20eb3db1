"""What each strategy prefers, and that random draws follow the record alone."""

import numpy as np
import pytest

from bis_jax.selection.rule import select
from bis_jax.selection.strategies import STRATEGIES


def kept(manifest):
  return {s.name: s.lines.tolist() for s in manifest.sources}


ROLLOUTS = [
  [1.0, 1.0, 1.0, 0.0],  # 0 mixed, R 1
  [0.25, 0.25],  # 1 pure, R 1/4
  [0.0, 0.0],  # 2 no positive step, R 1
  [0.5, 0.0],  # 3 mixed, R 1/2, p 1/2
  [1.0, 1.0],  # 4 pure, R 1
]


@pytest.mark.parametrize(
  ("strategy", "expected"),
  [
    ("full", [0, 1, 2, 3, 4]),
    ("bis", [0, 3]),
    ("mixed", [0, 3]),
    ("reliable", [0, 2]),
    ("reliability_only", [0, 2]),
    ("low_mc", [1, 3]),
    ("average_stepwise", [1, 3]),
    ("mixture_only", [0, 3]),
  ],
)
def test_what_each_strategy_prefers(table_of, strategy, expected):
  assert kept(select(table_of(ROLLOUTS), strategy=strategy, fraction=0.4)) == {"a": expected}


def test_low_mc_never_keeps_a_rollout_without_a_positive_step(table_of):
  assert kept(select(table_of(ROLLOUTS), strategy="low_mc", fraction=1.0)) == {"a": [0, 1, 3, 4]}


def test_mixed_takes_the_rest_once_the_mixed_are_used_up(table_of):
  lines = kept(select(table_of(ROLLOUTS), strategy="mixed", fraction=0.8))["a"]
  assert len(lines) == 4 and {0, 3} <= set(lines)


def test_random_follows_its_seed_and_the_record_not_the_other_sources(table_of):
  rollouts = [[0.5]] * 1000
  alone = kept(select(table_of(rollouts), strategy="random", fraction=0.1, seed=1))["a"]
  assert len(alone) == 100
  assert alone == kept(select(table_of(rollouts), strategy="random", fraction=0.1, seed=1))["a"]
  assert alone != kept(select(table_of(rollouts), strategy="random", fraction=0.1, seed=2))["a"]
  both = table_of(
    rollouts * 2, source=[0] * 1000 + [1] * 1000, line=[*range(1000)] * 2, names=("0", "a")
  )
  two = kept(select(both, strategy="random", fraction=0.1, seed=1))
  assert two["a"] == alone and two["0"] != alone


def test_random_is_uniform_over_the_file(table_of):
  counts = np.zeros(10)
  for seed in range(50):
    lines = kept(select(table_of([[1.0]] * 500), strategy="random", fraction=0.2, seed=seed))["a"]
    counts += np.bincount(np.array(lines) // 50, minlength=10)
  # 500 expected a bin, standard deviation about 19
  assert np.abs(counts - 500).max() < 90


def test_every_strategy_keeps_its_quota(table_of):
  rng = np.random.default_rng(0)
  rollouts = [(rng.integers(0, 17, 5) / 16).tolist() + [1 / 16] for _ in range(200)]
  table = table_of(rollouts, group=np.arange(200) // 3 + 1, embedding=rng.normal(size=(200, 4)))
  for name in STRATEGIES:
    expected = 200 if name == "full" else 50
    assert len(select(table, strategy=name, fraction=0.25)) == expected
