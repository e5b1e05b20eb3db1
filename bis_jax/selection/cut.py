"""The cut of every source: histograms of sort keys, added over blocks, devices and processes.

Scores that follow from counts have few values, whose ranks are looked up by (n, n_pos, sum): one
histogram finds the cut. Other scores are 64-bit keys, whose digits take several passes.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bis_jax.corpus.score_table import CHUNK, ScoreTable, Statistics
from bis_jax.errors import UserError
from bis_jax.selection import strategies

if TYPE_CHECKING:
  from bis_jax.selection.rule import Rule

BLOCK = 1 << 18  # rollouts, on devices
_MOST_RANKED = 1 << 22  # triples of (n, n_pos, sum) in a rank table
_HELD = 1 << 25  # rollouts; the keys of longer tables are made again for each pass
_BINS, _DIGIT = 22, 12  # bits of a histogram, all groups together, and of a digit of longer keys


class _Keys(NamedTuple):
  """Of a block: its rows, uint64[rows] keys, and the group of each row, an unused one if it is never kept."""

  rows: slice
  key: np.ndarray
  group: np.ndarray


@dataclasses.dataclass(frozen=True)
class Processes:
  """This process, the number of all, and the sum of equal arrays over them."""

  index: int = 0
  count: int = 1
  add: Callable[[np.ndarray], np.ndarray] = np.asarray

  def each(self, values: np.ndarray) -> np.ndarray:
    """Returns int64[processes, ...], the values of every process."""
    every = np.zeros((self.count, *values.shape), np.int64)
    every[self.index] = values
    return self.add(every)

  def concatenate(self, values: np.ndarray) -> np.ndarray:
    """Returns the values of all processes, in their order."""
    sizes = self.each(np.array(values.size))
    start = sizes[: self.index].sum()
    joined = np.zeros(sizes.sum(), values.dtype)
    joined[start : start + values.size] = values
    return self.add(joined).astype(values.dtype, copy=False)


class Ranking:
  """The rows of a table that this process ranks by a rule; see `rule.select`."""

  def __init__(self, table: ScoreTable, rule: "Rule", *, devices: bool = False):
    self.processes, self._read, self._block = Processes(), None, min(BLOCK, CHUNK)
    if devices:
      import jax  # and Grain: starting them takes longer than a selection from half a million rows

      from bis_jax.selection import blocks

      self._read, self._block = blocks.read, BLOCK
      if jax.process_count() > 1:
        self.processes = Processes(jax.process_index(), jax.process_count(), blocks.over_processes)
    process, processes = self.processes.index, self.processes.count
    self.rows = slice(*(len(table) * at // processes for at in (process, process + 1)))
    self.ranked = np.zeros(len(table.source_names), np.int64)  # of this process
    self.checksum = 0  # of this process's rows
    self._table, self._rule, self._unit = table, rule, table.unit
    self._groups = len(table.source_names) if rule.scope == "per_source" else 1
    self._held: list[_Keys] | None = None
    self._counted = False
    self._strategy = strategies.find(rule.strategy)
    self._ranks = None
    if self._strategy.of_sums:
      self._ranks = rank_table(rule, table.most_steps, self._unit)

  def kept(self) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields the blocks of this process and which rows are kept, before `paper` order drops any."""
    cut, quota = self._cut()
    for rows, key, group in self._blocks():
      cut_of = np.append(cut, np.uint64(0))[group]
      eligible = group < self._groups
      chosen = eligible & (key > cut_of)
      tied = np.flatnonzero(eligible & (key == cut_of))
      of_tied = group[tied]  # non-decreasing
      order = np.arange(tied.size) - np.searchsorted(of_tied, of_tied)
      chosen[tied[order < quota[of_tied]]] = True
      quota -= np.minimum(quota, np.bincount(of_tied, minlength=self._groups))
      yield rows, chosen

  def _cut(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns of each group the lowest key kept, and the number of this process's rows to keep at it."""
    left = 64 if self._ranks is None else max(1, int(self._ranks.max()).bit_length())
    width = max(1, _BINS - self._groups.bit_length())
    width = width if left <= width else min(width, _DIGIT)
    cut, groups = np.zeros(self._groups, np.uint64), np.arange(self._groups)
    quota, here, blocks = None, np.zeros((self._groups, 1), np.int64), None
    while left:
      if not blocks or self._held is None:
        blocks = self._blocks()
      else:
        _, keys, of_keys = zip(*(_inside(block, cut, left) for block in blocks), strict=True)
        blocks = [_Keys(self.rows, np.concatenate(keys), np.concatenate(of_keys))]
      bits = min(width, left)
      left -= bits
      here = _histogram(blocks, cut, left, bits)
      everywhere = self.processes.add(here)
      if quota is None:
        quota = self._quotas(everywhere.sum(1))
      at_least = everywhere[:, ::-1].cumsum(1)[:, ::-1]
      digit = (at_least >= quota[:, None]).sum(1) - 1
      quota = quota - (at_least - everywhere)[groups, digit]
      cut, here = cut << np.uint64(bits) | digit.astype(np.uint64), here[groups, digit]
    # Ties go to the first rows of the file, which the first processes have.
    before = self.processes.each(here)[: self.processes.index].sum(0)
    return cut, np.clip(quota - before, 0, None)

  def _quotas(self, eligible: np.ndarray) -> np.ndarray:
    ranked = self.processes.add(self.ranked)
    per_group = ranked if self._groups == ranked.size else [ranked.sum()]
    return np.minimum([self._rule.quota(int(m)) for m in per_group], eligible)

  def _blocks(self) -> Iterable[_Keys]:
    if self._held is None and len(self._table) <= _HELD:
      self._held = list(self._make_blocks())
    return self._make_blocks() if self._held is None else self._held

  def _make_blocks(self) -> Iterator[_Keys]:
    table, rule, parts = self._table, self._rule, self._parts()
    if self._read and not self._strategy.among:
      slices = [rows for rows, _ in parts]
      read = self._read(table, slices, rule.tau, rule.unmeasured, self._unit)
      made = map(self._make_block, parts, read)
    elif len(table) <= _HELD and rule.strategy in strategies.STRATEGIES:
      with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        made = list(threads.map(self._make_block, parts))
    else:
      made = map(self._make_block, parts)
    for keys, ranked, checksum in made:
      if not self._counted:
        self.ranked += ranked
        self.checksum += checksum
      yield keys
      table.release()
    self._counted = True

  def _parts(self) -> list[tuple[slice, slice]]:
    """Returns the rows of each block, and those that their scores depend on."""
    table, mine, among = self._table, self.rows, self._strategy.among
    if not among:
      starts = range(mine.start, mine.stop, self._block)
      slices = [slice(start, min(start + self._block, mine.stop)) for start in starts]
      return [(rows, rows) for rows in slices]
    spans = table.spans() if among == "source" else [slice(0, len(table))]
    both = [(slice(max(s.start, mine.start), min(s.stop, mine.stop)), s) for s in spans]
    return [(rows, span) for rows, span in both if rows.start < rows.stop]

  def _make_block(
    self, part: tuple[slice, slice], read: tuple[ScoreTable, Statistics] | None = None
  ) -> tuple[_Keys, np.ndarray, int]:
    """Returns the keys of a part, its ranked rollouts by source, and its checksum."""
    rule, (rows, span) = self._rule, part
    block = self._table.take(span) if read is None else read[0]
    s = block.statistics(rule.tau, rule.unmeasured) if read is None else read[1]
    scores = rule.scores(block, s) if self._ranks is None else np.zeros(0)
    if rows != span:
      at = slice(rows.start - span.start, rows.stop - span.start)
      block, s, scores = block.take(at), s.take(at), scores[at]
    ranked = rule.ranked(block, s)
    if self._ranks is None:
      key, possible = sort_keys(scores), scores > -np.inf
    else:
      rank = self._ranks[s.n, s.n_pos, (s.score_sum * self._unit).astype(np.int32)]
      key, possible = rank.astype(np.uint64), ranked & (rank >= 0)
    group = block.source if rule.scope == "per_source" else np.int16(0)
    counts = np.bincount(block.source[ranked], minlength=self.ranked.size)
    checksum = 0 if self._counted else block.row_hash_sum(s)
    return _Keys(rows, key, np.where(possible, group, np.int16(self._groups))), counts, checksum


def _inside(block: _Keys, cut: np.ndarray, shift: int) -> _Keys:
  """Returns the rows whose keys begin as their group's cut."""
  before = np.append(cut, np.uint64(2**64 - 1))  # nothing begins as the unused group
  inside = block.key >> np.uint64(shift) == before[block.group]
  return block if inside.all() else _Keys(block.rows, block.key[inside], block.group[inside])


def _histogram(blocks: Iterable[_Keys], cut: np.ndarray, shift: int, bits: int) -> np.ndarray:
  """Returns int64[groups, 2**bits], the next digits of the keys that begin as their group's cut."""
  counts = np.zeros((cut.size, 1 << bits), np.int64)
  for block in blocks:
    _, key, group = _inside(block, cut, shift + bits)
    if group.size:
      first = int(group.min())  # of few groups in a block
      index = (key >> np.uint64(shift) & np.uint64((1 << bits) - 1)).view(np.int64)
      found = np.bincount(index | (group.astype(np.int64) - first) << bits)
      counts.reshape(-1)[first << bits :][: found.size] += found
  return counts


def rank_table(rule: "Rule", most_steps: int, unit: int) -> np.ndarray | None:
  """Returns the rank of every possible rollout: int32[n, n_pos, sum of units]; None for too many.

  A higher score has a higher rank, and scores that tie in float64 share one; -1 for impossible
  triples and rollouts that are never kept. A step's MC score is a number of units of 1 / `unit`.
  """
  shape = most_steps + 1, most_steps + 1, most_steps * unit + 1
  if not unit or not most_steps or np.prod(shape, dtype=float) > _MOST_RANKED:
    return None
  n, n_pos, total = np.indices(shape, np.int32)
  possible = (n > 0) & (n_pos <= n) & (total <= n_pos * unit)
  s = Statistics(n[possible], n_pos[possible], total[possible] / unit, np.zeros(0))
  scores = strategies.find(rule.strategy).score(s, None, rule)
  values, inverse = np.unique(scores, return_inverse=True)
  ranks = np.full(shape, -1, np.int32)
  ranks[possible] = inverse - (values[0] == -np.inf)
  return ranks


def sort_keys(scores: np.ndarray) -> np.ndarray:
  """Returns uint64[rows] that compare as the float64 scores do; 0.0 and -0.0 share a key."""
  bits = (scores + 0.0).view(np.uint64)
  negative = bits >> np.uint64(63) == 1
  return np.where(negative, ~bits, bits | np.uint64(1 << 63))


def check_same(processes: Processes, text: str) -> None:
  """Raises UserError unless all processes give the same text."""
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint16)
  if (processes.each(digest) != digest).any():
    raise UserError(
      "the processes have different selection rules or score tables: give all the same "
      "parameters and the same score table"
    )
