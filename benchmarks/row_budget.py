"""Balances the token and patch budgets of packed rows."""

import numpy as np


def balanced_row_patches(
  token_lengths: np.ndarray, patch_costs: np.ndarray, row_tokens: int, *, slack: float = 1.03
) -> int:
  """Returns the `row_patches` that fill tokens and patches equally, a multiple of 64.

  `slack` > 1 trades patch padding for less token padding.
  """
  share = np.sum(patch_costs, dtype=np.float64) / max(1, np.sum(token_lengths, dtype=np.float64))
  wanted = max(share * row_tokens * slack, np.max(patch_costs, initial=0), 1)
  return int(np.ceil(wanted / 64)) * 64
