"""Ranks from MC counts on the device order and tie rollouts exactly as float64 scores do."""

import jax
import numpy as np
import pytest

from bis_jax.selection.ranks import NO_STEP, rank_table, step_ranks
from bis_jax.selection.rule import select, top


def counts_of(rollouts, steps):
  counts = np.full((steps, len(rollouts)), NO_STEP, np.uint8)
  for column, rollout in enumerate(rollouts):
    counts[: len(rollout), column] = rollout
  return counts


@pytest.mark.parametrize(
  ("continuations", "alpha", "none_positive"),
  [(16, 0.2, 1.0), (16, 0.05, 1.0), (4, 0.2, 1.0), (64, 0.0, 1.0), (16, 0.2, 0.3), (8, 0.2, 0.0)],
)
def test_kept_set_by_ranks_is_that_by_scores(table_of, continuations, alpha, none_positive):
  rng = np.random.default_rng(continuations)
  rollouts = [rng.integers(0, continuations + 1, rng.integers(1, 9)).tolist() for _ in range(3000)]
  ranks = rank_table(alpha, steps=8, continuations=continuations, if_no_positive=none_positive)
  ranks = step_ranks(counts_of(rollouts, 8), ranks)
  table = table_of([[c / continuations for c in rollout] for rollout in rollouts])
  rule = {"strategy": "bis", "alpha": alpha, "reliability_if_no_positive": none_positive}
  for fraction, rollouts_kept in ((0.1, 300), (0.9, 2700)):
    expected = select(table, fraction=fraction, **rule).sources[0].lines
    chosen = np.flatnonzero(top(np.asarray(ranks, float), rollouts_kept))
    assert chosen.tolist() == expected.tolist()


def test_rollouts_tie_exactly_where_their_scores_do():
  ranks = rank_table(0.2, steps=8)
  pure, all_right, half = ranks[5, 0, 0], ranks[6, 6, 96], ranks[8, 4, 32]
  assert pure == all_right
  assert half > pure
  assert ranks[0, 0, 0] == ranks[3, 4, 64] == ranks[3, 2, 1] == ranks[3, 2, 33] == -1


def test_a_rollout_without_steps_has_no_rank():
  counts = counts_of([[], [16]], 4)
  assert np.asarray(step_ranks(counts, rank_table(0.2, steps=4))).tolist()[0] == -1


def test_the_device_program_holds_no_floating_point():
  counts = jax.ShapeDtypeStruct((16, 64), np.uint8)
  table = jax.ShapeDtypeStruct((17, 17, 257), np.int32)
  assert "f32" not in step_ranks.lower(counts, table).as_text()
  assert "f64" not in step_ranks.lower(counts, table).as_text()


def test_continuations_whose_sums_round_are_refused():
  with pytest.raises(ValueError, match="not 10: score such rollouts on the host"):
    rank_table(0.2, steps=8, continuations=10)
