"""The row plan: which examples share a packed row, known in full before the first step.

Every example has a token length, a cost in patch slots and a number of step markers; every row has
a budget of each. Norm-based greedy vector bin packing (Panigrahy et al. 2011, "Heuristics for
Vector Bin Packing") over a window of `lookahead` groups: each row starts with the oldest unpacked
group, so that no example starves, and adds the one that leaves the smallest sum of squared rests
of the token and patch budgets, until none fits.

    lengths 60 50 40 30 in this order, rows of 100 tokens:  rows [0, 2] and [1, 3]

Without streams, every example is a group of its own. In rows with streams (see `rows`), examples
with the same prefix are packed as one group, at most as many as there are streams; its prefix takes
room before the streams, and the rest of each example in a stream of its own. The tokens of a group of
one are divided where that fills the row evenly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from bis_jax.console import log
from bis_jax.errors import UserError

# What a row has a budget of, in the order of all costs and budgets, and the key of `config.inputs`.
BUDGETS = {"tokens": "row_tokens", "patch slots": "row_patches", "step markers": "row_markers"}
_PATCH_BLOCK = 64


def row_budgets(inputs: ConfigDict) -> np.ndarray:
  return np.array([inputs[key] for key in BUDGETS.values()], np.int64)


class Layout(NamedTuple):
  """How a row is divided."""

  budgets: np.ndarray  # int64[3]
  streams: tuple[int, int] = (0, 0)  # number, tokens of each

  @property
  def prefix_tokens(self) -> int:
    return int(self.budgets[0]) - self.streams[0] * self.streams[1]

  @property
  def largest(self) -> np.ndarray:
    """int64[3], the budgets of one example."""
    tokens = self.prefix_tokens + (self.streams[1] if self.streams[0] else 0)
    return np.array([tokens, *self.budgets[1:]], np.int64)


@dataclass(frozen=True)
class Plan:
  """The rows of a whole run. Examples are indices into the source of examples."""

  offsets: np.ndarray  # int64[rows + 1]; row r holds examples[offsets[r] : offsets[r + 1]]
  examples: np.ndarray  # int64[...], sorted by row
  places: np.ndarray  # int32[..., 3], the fields of each example's `rows.Place`
  layout: Layout
  padding: np.ndarray  # float64[3], share of the rows' budgets that is unused
  # example -> why it is in no row, such as "9000 tokens, a row holds 8192: raise row_tokens"
  too_long: Mapping[int, str] = field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def row(self, r: int) -> np.ndarray:
    """Returns the examples of row r, int64[...]; empty for rows past the end."""
    return self.examples[self._span(r)]

  def places_of(self, r: int) -> np.ndarray:
    """Returns the places of the examples of row r, int32[..., 3]."""
    return self.places[self._span(r)]

  def _span(self, r: int) -> slice:
    return slice(*self.offsets[r : r + 2]) if r < len(self) else slice(0)


def plan(
  costs: np.ndarray,
  budgets: np.ndarray,
  streams: tuple[int, int] = (0, 0),
  *,
  prefixes: np.ndarray | None = None,
  groups: np.ndarray | None = None,
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
    streams: of a row, (number, tokens of each).
    prefixes: int64[n], tokens that examples of the same group share; used with streams only, as
    groups: int64[n], which also share their images.
    seed: with the epoch, decides the order; every epoch is shuffled and packed anew.
    shuffle: False packs in the order given, as scoring does.
    lookahead: groups that a row may choose from, >= 1.
  """
  if min(budgets[0], budgets[2], lookahead) < 1 or budgets[1] < 0 or budgets[1] % _PATCH_BLOCK:
    raise ValueError(
      f"lookahead {lookahead} and row budgets {dict(zip(BUDGETS, budgets, strict=True))} must be "
      f"positive, and patch slots 0 or a multiple of {_PATCH_BLOCK}"
    )
  layout = Layout(budgets, streams)
  too_long = over_budget(costs, layout.largest)
  fitting = np.setdiff1d(np.arange(len(costs)), np.fromiter(too_long, np.int64, len(too_long)))
  if not len(fitting):
    shown = "; ".join(f"example {i}: {why}" for i, why in list(too_long.items())[:3])
    raise UserError(f"none of {len(costs)} examples fits a row ({shown or 'there are none'})")
  if too_long:
    log.warning("%d of %d examples fit no row and are left out", len(too_long), len(costs))
  packer = _Packer(costs, layout, lookahead, prefixes, groups)
  packed, places, lengths = [], [], []
  for epoch in range(epochs):
    order = fitting[_permutation(seed, epoch, len(fitting))] if shuffle else fitting
    examples, where, sizes = packer.pack(order)
    packed.append(examples)
    places.append(where)
    lengths.append(sizes)
  offsets = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
  slots = budgets * (len(offsets) - 1)
  padding = (slots - packer.used) / np.maximum(slots, 1)
  return Plan(offsets, np.concatenate(packed), np.concatenate(places), layout, padding, too_long)


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


class _Packer:
  """Packs one order of examples after the other; `used` int64[3] counts what all of them take."""

  def __init__(
    self,
    costs: np.ndarray,
    layout: Layout,
    lookahead: int,
    prefixes: np.ndarray | None,
    groups: np.ndarray | None,
  ):
    self.used = np.zeros(3, np.int64)
    self._costs, self._layout, self._lookahead = costs, layout, lookahead
    number, length = layout.streams
    self._prefixes = np.zeros(len(costs), np.int64) if prefixes is None else prefixes
    own = costs[:, 0] - self._prefixes
    shares = (self._prefixes <= layout.prefix_tokens) & (own <= length)
    self._groups = np.arange(len(costs)) if groups is None or not number else groups
    self._shares = shares & (number > 0) & (groups is not None)

  def pack(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (examples in row order, their places int32[n, 3], examples per row)."""
    examples, offsets = self._grouped(order)
    sizes = np.diff(offsets)
    costs, leads = self._costs[examples], offsets[:-1]
    alone = sizes == 1
    shared = np.where(alone, 0, self._prefixes[examples[leads]])
    own = np.zeros((len(sizes), self._layout.streams[0]), np.int64)  # of groups, the longest first
    unit = np.repeat(np.arange(len(sizes)), sizes)
    lengths = np.where(alone[unit], 0, costs[:, 0] - shared[unit])
    by_length = np.lexsort((-lengths, unit))
    examples = examples[by_length]
    rank = np.arange(len(examples)) - leads[unit]
    many = ~alone[unit]
    own[unit[many], rank[many]] = lengths[by_length][many]
    tokens, patches = np.where(alone, costs[leads, 0], 0), costs[leads, 1]
    markers = np.add.reduceat(costs[:, 2], leads)
    # Tokens before the streams, patches, tokens of all streams, markers, tokens of groups of one that
    # streams divide, and tokens of each stream. As floats, which are exact here.
    before, divided = (shared, tokens) if self._layout.streams[0] else (tokens, shared)
    waiting = [before, patches, own.sum(axis=1), markers, divided, *own.T]
    waiting = np.stack(waiting, axis=1, dtype=np.float64)
    units, splits, streams, row_units = self._fill(waiting)
    self.used += [tokens.sum() + shared.sum() + own.sum(), patches.sum(), markers.sum()]
    number = np.arange(len(units)) - np.repeat(np.cumsum(row_units) - row_units, row_units)
    placed = np.repeat(np.arange(len(units)), sizes[units])
    order = np.arange(len(placed)) + (leads[units] - np.cumsum(sizes[units]) + sizes[units])[placed]
    places = np.stack(
      [splits[placed], streams[placed, rank[order]], number[placed]], axis=1, dtype=np.int32
    )
    rows = np.repeat(np.arange(len(row_units)), row_units)
    return examples[order], places, np.bincount(rows, sizes[units]).astype(np.int64)

  def _grouped(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (examples, offsets of groups), in the order of the groups' first examples."""
    # A group with more examples than streams is divided into parts of nearly the same size.
    n, most = len(order), max(1, self._layout.streams[0])
    key = np.where(self._shares[order], self._groups[order], -1 - np.arange(n))
    _, first, key, size = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    by_first = np.argsort(first[key], kind="stable")
    size = size[key][by_first]
    rank = np.arange(n) - np.maximum.accumulate(
      np.where(np.diff(first[key][by_first], prepend=-1), np.arange(n), 0)
    )
    part = -(-size // -(-size // most))
    starts = rank % part == 0
    group = np.cumsum(starts) - 1
    markers = np.bincount(group, self._costs[order[by_first], 2])
    starts |= (markers > self._layout.budgets[2])[group]  # too many together
    return order[by_first], np.append(np.flatnonzero(starts), n)

  def _fill(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns (groups in row order, their splits and streams, groups per row)."""
    number, length = self._layout.streams
    first, (_, of_patches, of_markers) = self._layout.prefix_tokens, self._layout.budgets.tolist()
    n = len(units)
    size = min(self._lookahead, n)
    window = np.arange(size)
    waiting = window.copy()  # indices into the order; n if none is left
    near = units[:size].T.copy()
    order, splits = np.empty(n, np.int64), np.empty(n, np.int64)
    streams, row_sizes = np.full((n, max(1, number)), -1, np.int64), []
    upcoming, in_row, placed = size, 0, 0
    whole = np.array([first, of_patches, number * length]).clip(1)[:, None]
    left, room, room_patches, room_markers = [length] * number, first, of_patches, of_markers
    at, fitting = window, near  # where those are that may fit the row, and what they take
    while placed < n:
      deepest = sorted(left, reverse=True)
      one = room + sum(deepest[:1])  # tokens of a group of one
      limits = np.array([[room, room_patches, sum(left), room_markers, one, *deepest]]).T
      if in_row == 0:
        at = np.array([waiting.argmin()])
        fitting = near.take(at, axis=1)
      else:
        if in_row == 1:
          at, fitting = window, near
        still = np.flatnonzero(np.all(fitting <= limits, axis=0))
        if not len(still):
          row_sizes.append(in_row)
          in_row, left = 0, [length] * number
          room, room_patches, room_markers = first, of_patches, of_markers
          continue
        if len(still) < len(at):
          at, fitting = at.take(still), fitting.take(still, axis=1)
      taken = self._divided(fitting, room, left) if number else fitting[:3]
      rest = (limits[:3] - taken) / whole
      best = int(np.add.reduce(rest * rest).argmin())
      place, split = int(at[best]), int(taken[0, best])
      order[placed], splits[placed] = waiting[place], split
      _, patches, _, markers, divided, *lengths = fitting[:, best].astype(int).tolist()
      if number:
        lengths = [divided - split] if divided else lengths
        by_left = sorted(range(number), key=lambda stream: -left[stream])
        into = by_left[: np.count_nonzero(lengths)]
        streams[placed, : len(into)] = into
        for stream, tokens in zip(into, lengths, strict=False):
          left[stream] -= tokens
      room -= split
      room_patches -= patches
      room_markers -= markers
      placed, in_row = placed + 1, in_row + 1
      if upcoming < n:
        waiting[place] = upcoming
        near[:, place] = fitting[:, best] = units[upcoming]
        upcoming += 1
      else:
        waiting[place] = n
        near[0, place] = fitting[0, best] = np.inf  # fits nowhere
    row_sizes.append(in_row)
    return order, splits, streams, np.array(row_sizes, np.int64)

  def _divided(self, units: np.ndarray, room: int, left: list[int]) -> np.ndarray:
    """Returns what groups take of a row: tokens before its streams, patches, tokens in them."""
    (number, length), first = self._layout.streams, self._layout.prefix_tokens
    taken = units[:3].copy()
    alone = units[4].nonzero()[0]
    # What a group of one has before the streams: as full as the streams, if it can.
    tokens = units[4].take(alone)
    even = (room * number * length - (sum(left) - tokens) * first) / (first + number * length)
    least, most = np.maximum(tokens - max(left), 0), np.minimum(tokens, room)
    before = np.minimum(np.maximum(np.floor(even), least), most)
    taken[0, alone], taken[2, alone] = before, tokens - before
    return taken
