"""Exact BIS ranks of rollouts whose MC counts are on a device, by integers and one table look-up.

Rollouts with the same (n, n_pos, sum of counts) have the same score, and there are few such
triples. The host scores and ranks every possible triple in float64; the device counts and looks up
the rank. It never rounds, so order and ties are the same on every backend.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bis_jax.selection.bis import bis_scores

NO_STEP = 255  # in `counts_SB`: no scored step


def rank_table(
  alpha: float, *, steps: int, continuations: int = 16, if_no_positive: float = 1.0
) -> np.ndarray:
  """Returns the rank of every possible rollout: int32[n, n_pos, sum of counts].

  A higher score has a higher rank, and scores that tie in float64 share one; -1 for impossible
  triples. `steps` is the maximum number of scored steps, `continuations` (a power of two up to 128)
  that of each step.
  """
  # Sums of other fractions would depend on the order of the steps.
  if continuations not in (1, 2, 4, 8, 16, 32, 64, 128):
    raise ValueError(
      f"ranks by counts need 1, 2, 4, ... 128 continuations per step, not {continuations}: score "
      "such rollouts on the host with bis_scores"
    )
  n, n_pos, total = np.indices((steps + 1, steps + 1, steps * continuations + 1))
  possible = (n > 0) & (n_pos <= n) & (n_pos <= total) & (total <= n_pos * continuations)
  ranks = np.full(n.shape, -1, np.int32)
  sums = total[possible] / continuations
  scores = bis_scores(n[possible], n_pos[possible], sums, alpha, if_no_positive)
  ranks[possible] = np.unique(scores, return_inverse=True)[1]
  return ranks


@jax.jit
def step_ranks(counts_SB: jax.Array, ranks: jax.Array) -> jax.Array:
  """Returns int32[B], the BIS rank of each rollout, from a `rank_table` for S steps.

  `counts_SB` is uint8, correct continuations per step or NO_STEP.
  """
  # S is first so that a vector register holds one step of many rollouts.
  scored_SB = counts_SB != NO_STEP
  positive_SB = scored_SB & (counts_SB > 0)
  n_B = scored_SB.sum(0, dtype=jnp.int32)
  n_pos_B = positive_SB.sum(0, dtype=jnp.int32)
  total_B = jnp.where(positive_SB, counts_SB, 0).sum(0, dtype=jnp.int32)
  _, width, depth = ranks.shape
  return ranks.reshape(-1)[(n_B * width + n_pos_B) * depth + total_B]
