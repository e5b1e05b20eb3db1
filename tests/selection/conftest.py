"""Score tables written as lists of MC scores."""

import numpy as np
import pytest

from bis_jax.corpus.score_table import PAPER_OK, STRICT_OK, ScoreTable


def _table_of(rollouts, *, source=None, line=None, names=("a",), flags=None, **rest):
  rows = len(rollouts)
  scores = np.array([s for rollout in rollouts for s in rollout], float)
  return ScoreTable.from_steps(
    names,
    source=np.zeros(rows, int) if source is None else np.array(source),
    line=np.arange(rows) if line is None else np.array(line),
    lengths=np.array([len(r) for r in rollouts], int),
    scores=scores,
    measured=np.ones(scores.size, bool),
    flags=np.full(rows, STRICT_OK | PAPER_OK) if flags is None else np.array(flags),
    **rest,
  )


@pytest.fixture(scope="session")
def table_of():
  """Builds a table of one valid rollout per list of MC scores, all in source "a" by default."""
  return _table_of
