"""How rows are divided into prefixes and streams, and whether that pays, from what examples share."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict

from bis_jax.errors import UserError
from bis_jax.inputs import pack
from bis_jax.inputs.pack import Layout

_NUMBERS = (2, 3, 4, 6, 8, 12, 16)  # of streams, that are tried
_LEAST = 0.10  # of the computation must be saved
_SAMPLE = 2000  # groups that are packed to compare layouts
# A patch slot costs about this much of a token: a frozen tower's products against three times the
# decoder's.
_PATCH_TOKENS = 1 / 32
_SLACK = 1.03  # of patch slots: more leave room for the last image of a row
# Kernels of attention read blocks: a layout of smaller blocks must save this much more.
_BLOCKS = {512: 1.0, 128: 1.01, 8: 1.02}
_LENGTHS = (0.94, 1.0, 1.06)  # of streams, times what fills them like the part before them
_STREAMS, _PREFIXES = 8, 0.25  # of rows for solutions that are not known yet: streams, and the rest
_SHORTEST = 128  # tokens of such a stream
_PADDING = 1.15  # times the price without any padding: rows do not often have more


@dataclasses.dataclass(frozen=True)
class Costs:
  """What examples take of a row and share; see `pack.plan`."""

  costs: np.ndarray
  prefixes: np.ndarray
  groups: np.ndarray

  def of(self, chosen: np.ndarray) -> "Costs":
    """Returns the costs of some examples, their groups numbered from 0."""
    _, groups = np.unique(self.groups[chosen], return_inverse=True)
    return Costs(self.costs[chosen], self.prefixes[chosen], groups)

  def sample(self) -> "Costs":
    step = -(-(int(self.groups.max()) + 1) // _SAMPLE)
    return self.of(np.flatnonzero(self.groups % step == 0))

  def rows(self, layout: Layout, lookahead: int) -> int:
    shared = {"prefixes": self.prefixes, "groups": self.groups}
    return len(pack.plan(self.costs, *layout, **shared, lookahead=lookahead, shuffle=False))


def choose(
  costs: Costs,
  inputs: ConfigDict,
  slot_multiple: int,
  *,
  totals: Sequence[int] = (1,),
  shards: int = 1,
  known: Sequence[Layout] = (),
  only_known: bool = False,
) -> tuple[Layout, float]:
  """Returns the layout of rows, as `inputs.row_streams` and `stream_tokens` ask for it.

  With it, the share of the computation that the streams save, or would save if it is too little to
  use any. Raises UserError if the longest example does not fit the streams that are asked for.

  Args:
    costs: of all examples; those that fit no row without streams do not matter.
    slot_multiple: see `ImageProcessor`.
    totals: factors of `inputs.row_tokens` that a row with streams may have.
    shards: rows that are computed together.
    known: layouts to prefer if they leave no more padding than is usual.
    only_known: no other has streams.
  """
  plain = Layout(pack.row_budgets(inputs))
  left_out = pack.over_budget(costs.costs, plain.budgets)
  costs = costs.of(np.setdiff1d(np.arange(len(costs.costs)), [*left_out]))
  if not inputs.row_streams or not len(costs.costs):
    return plain, 0.0
  asked = inputs.row_streams > 0
  of_groups = np.bincount(costs.groups)
  numbers = [inputs.row_streams] if asked else [n for n in _NUMBERS if n < 2 * of_groups.max()]
  tried = [_Streams(costs, of_groups, number) for number in numbers]
  without = _tokens(costs.costs[:, :2].sum(axis=0))
  least = min((streams.price for streams in tried), default=without)
  if not asked and least > (1 - _LEAST) * without:
    return plain, max(0.0, 1 - least / without)
  most, sample = costs.costs.max(axis=0), costs.sample()
  share = _tokens(sample.costs[:, :2].sum(axis=0)) / without
  for layout in known:
    if (most <= layout.largest).all():
      full = sample.rows(layout, inputs.lookahead) - shards  # the last rows are rarely full
      if _price(layout, full, shards) <= _PADDING * least * share:
        return layout, 1 - least / without
  candidates = (
    [*known]
    if only_known
    else [
      layout
      for streams in tried
      if streams.price <= _PADDING * least
      for total in totals
      for layout in streams.layouts(inputs, total, slot_multiple)
    ]
  )
  fitting = [layout for layout in candidates if (most <= layout.largest).all()]
  if not fitting:
    if asked:
      raise UserError(
        f"config.inputs.row_streams is {inputs.row_streams}, but the longest rollout has {most[0]} "
        f"tokens, more than a prefix part and a stream of rows of {inputs.row_tokens} tokens hold: "
        "lower row_streams or max_length, raise row_tokens, or set row_streams to 0"
      )
    return plain, 0.0
  price = {
    id(layout): _price(layout, sample.rows(layout, inputs.lookahead), shards)
    for layout in [plain, *fitting]
  }
  best = min(fitting, key=lambda layout: price[id(layout)])
  saved = 1 - price[id(best)] / price[id(plain)]
  return (best if asked or saved >= _LEAST else plain), saved


def ahead(inputs: ConfigDict, slot_multiple: int) -> list[Layout]:
  """Returns the layouts with streams for solutions that are not known yet; none of short rows."""
  tokens, unit = inputs.row_tokens, int(np.lcm(64, slot_multiple))
  length = int(tokens * (1 - _PREFIXES) / _STREAMS / 8) * 8
  patches = min(-(-inputs.row_patches // (2 * unit)) * unit, inputs.row_patches)
  budgets = np.array([tokens, patches, inputs.row_markers], np.int64)
  return [Layout(budgets, (_STREAMS, length))] if length >= _SHORTEST else []


class _Streams:
  """What groups take of rows with a number of streams, without any padding."""

  def __init__(self, costs: Costs, of_groups: np.ndarray, number: int):
    """`of_groups` int64[...] is the number of examples of each group."""
    parts, many = -(-of_groups // number), of_groups > 1
    first = np.unique(costs.groups, return_index=True)[1]
    own = costs.costs[:, 0] - costs.prefixes
    self.number, self._largest = number, costs.costs.max(axis=0)
    self._prefix = (parts * costs.prefixes[first])[many].sum()
    self._own = own[many[costs.groups]].sum()
    self._tokens = self._prefix + self._own + costs.costs[~many[costs.groups], 0].sum()
    self._slots = (parts * costs.costs[first, 1]).sum()
    self.price = _tokens((self._tokens, self._slots))

  def layouts(self, inputs: ConfigDict, total: int, slot_multiple: int) -> Iterator[Layout]:
    """Yields layouts of rows of `total` times `inputs.row_tokens`."""
    tokens, markers = total * inputs.row_tokens, total * inputs.row_markers
    even = tokens * self._own / max(1, self._prefix + self._own) / self.number
    # The largest example fits before the streams and one of them together.
    even = min(even, (tokens - self._largest[0]) / max(1, self.number - 1))
    lengths = {max(1, round(even / block)) * block for block in _BLOCKS}
    lengths |= {int(even * factor / 8) * 8 for factor in _LENGTHS}
    unit = int(np.lcm(64, slot_multiple))
    needed = max(self._slots / self._tokens * tokens * _SLACK, self._largest[1], 1)
    patches = min(int(-(-needed // unit) * unit), total * inputs.row_patches)
    if inputs.stream_tokens:
      lengths = {inputs.stream_tokens}
      patches = total * inputs.row_patches if inputs.row_streams > 0 else patches
    for length in sorted(lengths):
      if 0 < self.number * length < tokens:
        yield Layout(np.array([tokens, patches, markers], np.int64), (self.number, length))


def _tokens(amount: Sequence[float] | np.ndarray) -> float:
  """Returns about how many tokens (tokens, patch slots, ...) cost."""
  return float(amount[0] + _PATCH_TOKENS * amount[1])


def _price(layout: Layout, rows: int, shards: int) -> float:
  """Returns about how many tokens the computation of rows costs."""
  number, length = layout.streams
  weight = next(
    w for block, w in _BLOCKS.items() if not number or length % block == 0 or block == 8
  )
  return -(-rows // shards) * shards * _tokens(layout.budgets) * weight
