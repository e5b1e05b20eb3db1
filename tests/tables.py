"""Score tables of rollouts given as steps."""

import numpy as np

from bis_jax.corpus.score_table import ScoreTable, as_counts


def table_from_steps(names, *, lengths, scores, totals, **columns) -> ScoreTable:
  """The table of ragged steps; see `score_table.as_counts`."""
  counts = as_counts(np.asarray(scores, np.float64), np.asarray(totals))
  return ScoreTable.from_counts(names, lengths, counts, **columns)
