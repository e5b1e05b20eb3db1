"""The row plan: which examples share a packed row, known in full before the first step.

Every example has a token length, a cost in patch slots and a number of step markers; every row has
a budget of each. Norm-based greedy vector bin packing (Panigrahy et al. 2011, "Heuristics for
Vector Bin Packing") over a window of `lookahead` examples: each row starts with the oldest unpacked
example, so that no example starves, and adds the one that leaves the smallest sum of squared rests
of the token and patch budgets, until none fits.

    lengths 60 50 40 30 in this order, rows of 100 tokens:  rows [0, 2] and [1, 3]
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from ml_collections import ConfigDict

from bis_jax.console import log
from bis_jax.errors import UserError

# What a row has a budget of, in the order of all costs and budgets, and the key of `config.inputs`.
BUDGETS = {"tokens": "row_tokens", "patch slots": "row_patches", "step markers": "row_markers"}
_PATCH_BLOCK = 64


def row_budgets(inputs: ConfigDict) -> np.ndarray:
  return np.array([inputs[key] for key in BUDGETS.values()], np.int64)


@dataclass(frozen=True)
class Plan:
  """The rows of a whole run. Examples are indices into the source of examples."""

  offsets: np.ndarray  # int64[rows + 1]; row r holds examples[offsets[r] : offsets[r + 1]]
  examples: np.ndarray  # int64[...], sorted by row
  budgets: np.ndarray  # int64[3], of a row
  padding: np.ndarray  # float64[3], share of the rows' budgets that is unused
  # example -> why it is in no row, such as "9000 tokens, a row holds 8192: raise row_tokens"
  too_long: Mapping[int, str] = field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def row(self, r: int) -> np.ndarray:
    """Returns the examples of row r, int64[...]; empty for rows past the end."""
    return self.examples[self.offsets[r] : self.offsets[r + 1]] if r < len(self) else _NONE


_NONE = np.zeros(0, np.int64)


def plan(
  costs: np.ndarray,
  budgets: np.ndarray,
  *,
  seed: int = 0,
  epochs: int = 1,
  shuffle: bool = True,
  lookahead: int = 512,
) -> Plan:
  """Returns the plan of `epochs` passes over all examples, a pure function of its arguments.

  Raises UserError if no example fits a row (the first few are listed).

  Args:
    costs: int64[n, 3], what each example takes of a row; see `BUDGETS`.
    budgets: int64[3], of a row.
    seed: with the epoch, decides the order; every epoch is shuffled and packed anew.
    shuffle: False packs in the order given, as scoring does.
    lookahead: examples that a row may choose from, >= 1.
  """
  if min(*budgets, lookahead) < 1 or budgets[1] % _PATCH_BLOCK:
    raise ValueError(
      f"lookahead {lookahead} and row budgets {dict(zip(BUDGETS, budgets, strict=True))} must be "
      f"positive, and patch slots a multiple of {_PATCH_BLOCK}"
    )
  too_long = over_budget(costs, budgets)
  fitting = np.setdiff1d(np.arange(len(costs)), np.fromiter(too_long, np.int64, len(too_long)))
  if not len(fitting):
    shown = "; ".join(f"example {i}: {why}" for i, why in list(too_long.items())[:3])
    raise UserError(f"none of {len(costs)} examples fits a row ({shown or 'there are none'})")
  if too_long:
    log.warning("%d of %d examples fit no row and are left out", len(too_long), len(costs))
  packed, lengths = [], []
  for epoch in range(epochs):
    order = fitting[_permutation(seed, epoch, len(fitting))] if shuffle else fitting
    members, sizes = _pack(costs[order], budgets, lookahead)
    packed.append(order[members])
    lengths.append(sizes)
  offsets = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
  used = costs[fitting].sum(axis=0) * epochs / (budgets * (len(offsets) - 1))
  return Plan(offsets, np.concatenate(packed), budgets, 1 - used, too_long)


def over_budget(costs: np.ndarray, budgets: np.ndarray) -> dict[int, str]:
  """Returns {example: why it fits no row}; see `plan`."""
  reasons = {}
  for i in np.flatnonzero((costs > budgets).any(axis=1) | (costs[:, 2] == 0)):
    over = [
      f"{cost} {name}, a row holds {budget}: raise {key}"
      for cost, budget, (name, key) in zip(costs[i], budgets, BUDGETS.items(), strict=True)
      if cost > budget
    ]
    reasons[int(i)] = "; ".join(over) or "no step fits behind its images and question"
  return reasons


def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
  # Raw Philox bits, sorted: the same permutation with every version of NumPy.
  bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
  return np.argsort(bits, kind="stable")


def _pack(costs: np.ndarray, budgets: np.ndarray, lookahead: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (examples in row order, examples per row) for int64[n, 3] costs that all fit a row."""
  n = len(costs)
  size = min(lookahead, n)
  waiting = np.arange(size)  # indices into the order; n if none is left
  tokens, patches, markers = costs[:size].T.copy()
  members, row_sizes = np.empty(n, np.int64), []
  upcoming, in_row, left = size, 0, budgets.copy()
  placed = 0
  while placed < n:
    if in_row == 0:
      place = int(waiting.argmin())
    else:
      fits = (tokens <= left[0]) & (patches <= left[1]) & (markers <= left[2])
      rest = ((left[0] - tokens) / budgets[0]) ** 2 + ((left[1] - patches) / budgets[1]) ** 2
      place = int(np.where(fits, rest, np.inf).argmin())
      if not fits[place]:
        row_sizes.append(in_row)
        in_row, left = 0, budgets.copy()
        continue
    members[placed] = waiting[place]
    left -= (tokens[place], patches[place], markers[place])
    placed, in_row = placed + 1, in_row + 1
    if upcoming < n:
      waiting[place] = upcoming
      tokens[place], patches[place], markers[place] = costs[upcoming]
      upcoming += 1
    else:
      waiting[place] = n
      tokens[place] = budgets[0] + 1  # fits nowhere
  row_sizes.append(in_row)
  return members, np.array(row_sizes, np.int64)
