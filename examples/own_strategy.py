"""A selection strategy of your own: rollouts in which one step loses the most.

  python -m bis_jax.select --annotations=DIR --strategy=examples.own_strategy:largest_fall --out=subset.jsonl

In a training config: `--config.selection.strategy=examples.own_strategy:largest_fall`.
"""

import numpy as np


def largest_fall(counts: np.ndarray, continuations: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """Returns the largest fall of the MC score from a step to the next one, 0 if there is none.

  Two rollouts with 16, 4 and 5 of 16, and 8 of 16 are counts [16, 4, 5, 8], continuations
  [16, 16, 16, 16] and lengths [3, 1]; their scores are [0.75, 0].
  """
  scores = counts / np.maximum(continuations, 1)  # 0 of 0: not measured, counts as 0
  fall = scores - np.append(scores[1:], 0)
  ends = np.cumsum(lengths)
  fall[ends - 1] = 0  # the next step is of another rollout
  return np.maximum.reduceat(fall, ends - lengths)
