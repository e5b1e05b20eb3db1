"""Held-out rollouts: none that is kept, stratified by source, reproducible."""

import types

import numpy as np
import pytest

from bis_jax.run import held_out

SIZES = (60, 25, 15)


@pytest.fixture
def corpus():
  """100 stored rollouts of three sources; every tenth row of the table is stored nowhere."""
  source = np.repeat([0, 1, 2], [size + size // 9 for size in SIZES])
  stored = np.arange(len(source)) % 10 != 9
  rollout = np.where(stored, np.cumsum(stored) - 1, -1)
  table = types.SimpleNamespace(source=source.astype(np.int16), rollout=rollout)
  return types.SimpleNamespace(score_table=table)


def sources_of(corpus, drawn):
  table = corpus.score_table
  return np.bincount(table.source[np.isin(table.rollout, drawn)], minlength=3)


def test_every_source_gives_its_share_and_no_kept_rollout_is_drawn(corpus):
  table = corpus.score_table
  stored = table.rollout[table.rollout >= 0]
  kept = stored[::2]
  for count in (1, 7, 20, 40):
    drawn = held_out.draw(corpus, kept, count, 0)
    assert len(np.unique(drawn)) == count and (np.diff(drawn) > 0).all()
    assert not np.isin(drawn, kept).any() and np.isin(drawn, stored).all()
    share = sources_of(corpus, stored[1::2]) * count / len(stored[1::2])
    assert (np.abs(sources_of(corpus, drawn) - share) <= 1).all()


def test_the_seed_and_nothing_else_decides(corpus):
  kept = np.arange(0, 90, 3)
  draws = [held_out.draw(corpus, kept, 20, seed) for seed in (0, 0, 1)]
  assert draws[0].tolist() == draws[1].tolist() != draws[2].tolist()


def test_no_more_are_drawn_than_are_left(corpus):
  stored = corpus.score_table.rollout[corpus.score_table.rollout >= 0]
  assert held_out.draw(corpus, stored[4:], 20, 0).tolist() == [0, 1, 2, 3]
  assert held_out.draw(corpus, stored, 20, 0).tolist() == []
  assert held_out.draw(corpus, stored[:0], 0, 0).tolist() == []
