"""One row per rollout with the MC counts of its steps, without text: the input of selection.

tau, steps without continuations and strategies are decided when the table is read, not when it is
made. Source of the statistics: arXiv 2602.04145, the Balanced-Information Score.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import mmap
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from bis_jax import files
from bis_jax.errors import UserError

STRICT_OK = 1  # the record passes every check: it may be ranked in `strict` order
PAPER_OK = 2  # the paper's builder writes the record when it is kept in `paper` order
PAPER_SKIPS = 4  # the paper's builder does not rank it: a byte order mark is before it

_OF_ROLLOUTS = {
  "source": np.int16,
  "line": np.int32,
  "steps": np.int16,
  "flags": np.uint8,
  "group": np.uint64,
  "rollout": np.int64,
  "offset": np.int64,
  "length": np.int32,
  "embedding": np.float16,
}
_OF_STEPS = ("correct", "total")
CHUNK = 1 << 14  # rollouts that are worked on at a time: their steps stay in cache
_MAPPED_BYTES = 64 << 20  # larger files are mapped, smaller ones read and compared with checksums


class ScoreTableError(UserError):
  """Statistics that a score table cannot hold, or a file that is not a score table."""


def positive_and_counted(
  scores: np.ndarray, measured: np.ndarray, tau: float, unmeasured: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns bool[n], bool[n]: which steps are positive (score > tau), and which count at all.

  Steps without continuations (not `measured`) count if `unmeasured` is "negative", and do not if it
  is "ignore".
  """
  if unmeasured not in ("negative", "ignore"):
    raise ScoreTableError(f"unmeasured is {unmeasured!r}; it must be 'negative' or 'ignore'")
  counted = measured if unmeasured == "ignore" else np.ones_like(measured)
  return scores > tau, counted


def as_counts(scores: np.ndarray, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns MC scores as uint16[n] correct of uint16[n] continuations, and the other scores.

  `totals` int[n] is the number of continuations of each step, 0 for a step that was not measured, -1
  for an unknown number. A score that is no exact fraction of its total has 65535 as total, and
  stands, in order, in the float64 array of other scores.
  """
  with np.errstate(invalid="ignore", over="ignore"):  # infinite scores, which `paper` order takes
    correct = np.rint(scores * totals)
    if totals.size and 0 < totals.min() and totals.max() < 65535:  # as a rule
      if (correct / totals == scores).all() and 0 <= scores.min() and scores.max() <= 1:
        return correct.astype(np.uint16), totals.astype(np.uint16), np.zeros(0)
    exact = (totals >= 0) & (totals < 65535) & (correct >= 0) & (correct <= totals)
    exact &= correct / np.maximum(totals, 1) == scores
  correct = np.where(exact, correct, 0).astype(np.uint16)
  return correct, np.where(exact, totals, 65535).astype(np.uint16), scores[~exact]


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
  """Statistics of rollouts whose steps are positive above `tau`; n is 0 if none counts."""

  n: np.ndarray  # int64[rows], scored steps
  n_pos: np.ndarray  # int64[rows], positive ones: MC score above `tau`
  score_sum: np.ndarray  # float64[rows], of the positive steps' MC scores, in step order
  spread_sum: np.ndarray  # float64[rows], of s (1 - s) over the scored steps, in step order

  @property
  def is_mixed(self) -> np.ndarray:
    """bool[rows], rollouts with both positive and other steps."""
    return (self.n_pos > 0) & (self.n_pos < self.n)

  def take(self, rows: slice) -> "Statistics":
    return Statistics(*(column[rows] for column in vars(self).values()))


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreTable:
  """One row per scorable rollout, sources in file-name order, lines in file order.

  Steps are ragged: two rollouts with 1 and 8 of 16, and 0 of 16, 4 of 16 and a score of 1/3 without
  counts, have `steps` [2, 3], `correct` [1, 8, 0, 4, 0], `total` [16, 16, 16, 16, 255] and `scores`
  [1/3].
  """

  source_names: tuple[str, ...]  # annotation file stems, sorted by file name
  source: np.ndarray  # int16[rows], index into `source_names`, non-decreasing
  line: np.ndarray  # int32[rows], 0-based, strictly increasing within a source
  steps: np.ndarray  # int16[rows], steps with a numeric score, at least 1
  correct: np.ndarray  # uint8 or uint16[sum(steps)], continuations that reach the right answer
  total: np.ndarray  # same type, all of them; 0: not measured; largest value: see `scores`
  scores: np.ndarray  # float64, MC scores of the steps whose counts are unknown, in order
  flags: np.ndarray  # uint8[rows], bits STRICT_OK, PAPER_OK and PAPER_SKIPS
  group: np.ndarray  # uint64[rows], equal for rollouts of the same images and question; 0: unknown
  rollout: np.ndarray  # int64[rows], index in the prepared corpus, -1 if not stored
  offset: np.ndarray  # int64[rows], byte where the line starts, uncompressed; -1 if unknown
  length: np.ndarray  # int32[rows], bytes of the line without its line end, -1 if unknown
  embedding: np.ndarray  # float16[rows, dimensions] of unit length, for `semdedup`; [rows, 0]: none
  digest: str = ""  # identifies the corpus that the rows describe
  inputs: str = ""  # identifies the files that the table was made from
  # A table of an earlier version has statistics of one tau and policy, and no counts.
  earlier: tuple[float, str, Statistics] | None = None

  def __len__(self) -> int:
    return self.line.size

  @classmethod
  def from_counts(
    cls,
    source_names: tuple[str, ...],
    lengths: np.ndarray,
    counts: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    digest: str = "",
    **columns: np.ndarray,
  ) -> "ScoreTable":
    """Returns the table of rollouts of `lengths` steps with `counts` as of `as_counts`.

    `columns` are source, line, flags and, if known, group, rollout, offset and length. Raises
    ScoreTableError for arrays of unequal length or a rollout of more than 32,767 steps.
    """
    correct, total, scores = counts
    rows = len(lengths)
    if correct.size != np.sum(lengths) or correct.size != total.size:
      raise ScoreTableError(
        f"{np.sum(lengths)} steps by their lengths, but {correct.size} and {total.size} counts"
      )
    if rows and np.max(lengths) > np.iinfo(np.int16).max:
      at = int(np.argmax(lengths))
      raise ScoreTableError(
        f"{source_names[columns['source'][at]]}:{columns['line'][at]} has {lengths[at]} scored steps; a rollout may have "
        "at most 32767: remove the record"
      )
    if not ((total >= 255) & (total != 65535)).any():
      correct, total = (column.astype(np.uint8) for column in (correct, total))  # 65535: 255
    unknown = dict.fromkeys(("rollout", "offset", "length"), np.full(rows, -1))
    unknown |= {"group": np.zeros(rows), "embedding": np.zeros((rows, 0))}
    values = unknown | columns | {"steps": lengths}
    kept: dict[str, Any] = {k: np.asarray(values[k]).astype(t) for k, t in _OF_ROLLOUTS.items()}
    return cls(
      tuple(source_names), **kept, correct=correct, total=total, scores=scores, digest=digest
    )

  def statistics(self, tau: float = 0.0, unmeasured: str = "negative") -> Statistics:
    """Returns the statistics of all rows; ScoreTableError if the table lacks counts for them."""
    if self.earlier:
      if self.earlier[:2] != (tau, unmeasured):
        raise ScoreTableError(
          f"the score table is of an earlier version, with tau={self.earlier[0]:g} and "
          f"unmeasured={self.earlier[1]} and without MC counts: delete it, or the prepared corpus that "
          "holds it, and make it again for other values"
        )
      return self.earlier[2]
    if len(self) <= CHUNK:
      return Statistics(*_statistics(self, tau, unmeasured))
    parts = [_statistics(self.take(rows), tau, unmeasured) for rows in self.chunks()]
    return Statistics(*map(np.concatenate, zip(*parts, strict=True)))

  @functools.cached_property
  def unit(self) -> int:
    """The power of two up to 128 whose fractions all MC scores are, 0 if there is none."""
    if self.earlier or self.scores.size or self.total.dtype != np.uint8:
      return 0
    seen = np.zeros(256, bool)
    for start in range(0, self.total.size if any(self.total.strides) else 1, CHUNK):
      seen[self.total[start : start + CHUNK]] = True
    totals = np.flatnonzero(seen)
    return int(totals.max(initial=1)) if set(totals) <= {0, *(1 << np.arange(8)).tolist()} else 0

  def counts(self, unmeasured: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns correct and all continuations of the steps that count, and their number per rollout.

    A step whose continuations are unknown has its MC score as count, of 1.
    """
    scores, correct, total = self.mc_scores(), self.correct, self.total
    lengths = self.steps.astype(np.int64)
    if self.scores.size:
      unstated = self.is_unstated
      correct, total = np.where(unstated, scores, correct), np.where(unstated, 1, total)
    if unmeasured == "ignore" and (total == 0).any():
      rollout_of = np.repeat(np.arange(len(self)), lengths)[total != 0]
      lengths = np.bincount(rollout_of, minlength=len(self))
      correct, total = correct[total != 0], total[total != 0]
    return correct, total, lengths

  def mc_scores(self) -> np.ndarray:
    """Returns float64[sum(steps)]; 0 for a step that was not measured."""
    self._require_counts()
    if self.total.size and self.total.min() == (most := self.total.max()) and not self.scores.size:
      return self.correct / np.float64(max(most, 1))
    scores = self.correct / np.maximum(self.total, 1, dtype=np.float64)
    scores[self.is_unstated] = self.scores
    return scores

  def starts(self) -> np.ndarray:
    """Returns int64[rows], the index of each rollout's first step."""
    self._require_counts()
    lengths = self.steps.astype(np.int64)
    return np.cumsum(lengths) - lengths

  def _require_counts(self) -> None:
    if self.earlier:
      raise ScoreTableError(
        "the score table is of an earlier version, without MC counts: delete it, or the prepared corpus "
        "that holds it, and make it again"
      )

  @property
  def is_unstated(self) -> np.ndarray:
    """bool[sum(steps)], steps whose counts are unknown: their scores are those of `scores`."""
    return self.total == np.iinfo(self.total.dtype).max

  def rows_of(self, source: int) -> slice:
    return self.spans()[source]

  def spans(self) -> list[slice]:
    # Another dtype would copy the column.
    bounds = np.arange(len(self.source_names) + 1).astype(self.source.dtype)
    return list(
      itertools.starmap(slice, itertools.pairwise(self.source.searchsorted(bounds).tolist()))
    )

  def take(self, rows: slice) -> "ScoreTable":
    """Returns a table of consecutive rows that shares this one's memory."""
    start, stop, _ = rows.indices(len(self))
    (first, odd), (last, odd_last) = self._steps_before(start), self._steps_before(stop)
    columns: dict[str, Any] = {name: getattr(self, name)[rows] for name in _OF_ROLLOUTS}
    columns |= {name: getattr(self, name)[first:last] for name in _OF_STEPS}
    earlier = self.earlier
    if earlier:
      earlier = (*earlier[:2], earlier[2].take(rows))
    return dataclasses.replace(self, **columns, scores=self.scores[odd:odd_last], earlier=earlier)

  def release(self) -> None:
    """Gives back the memory of a mapped table's pages; they are read again when they are used."""
    for pages in self._mapped:
      pages.madvise(mmap.MADV_DONTNEED)

  @functools.cached_property
  def _mapped(self) -> list[mmap.mmap]:
    found = []
    for column in (getattr(self, name) for name in (*_OF_ROLLOUTS, *_OF_STEPS, "scores")):
      while isinstance(column.base, np.ndarray):
        column = column.base
      if isinstance(column.base, mmap.mmap):
        found.append(column.base)
    return found

  @functools.cached_property
  def most_steps(self) -> int:
    """The largest number of steps of a rollout."""
    return max((int(self.steps[rows].max()) for rows in self.chunks()), default=0)

  def chunks(self) -> Iterator[slice]:
    """Yields slices of all rows; what is read of a mapped table is released after each."""
    for start in range(0, len(self), CHUNK):
      yield slice(start, start + CHUNK)
      self.release()

  @functools.cached_property
  def _before_chunks(self) -> np.ndarray:
    """int64[chunks + 1, 2], steps, and steps of `scores`, before each chunk of rows."""
    before = np.zeros((-(-len(self) // CHUNK) + 1, 2), np.int64)
    if not self.earlier:
      sums = [self.steps[rows].sum(dtype=np.int64) for rows in self.chunks()]
      before[1:, 0] = np.cumsum(sums)
    if self.scores.size:
      for chunk, (start, stop) in enumerate(zip(before[:-1, 0], before[1:, 0], strict=True)):
        unstated = self.total[start:stop] == np.iinfo(self.total.dtype).max
        before[chunk + 1, 1] = before[chunk, 1] + np.count_nonzero(unstated)
    return before

  def _steps_before(self, row: int) -> tuple[int, int]:
    if self.earlier:
      return 0, 0
    chunk = row // CHUNK
    start, odd = self._before_chunks[chunk].tolist()
    stop = start + int(self.steps[chunk * CHUNK : row].sum(dtype=np.int64))
    if self.scores.size:
      odd += np.count_nonzero(self.total[start:stop] == np.iinfo(self.total.dtype).max)
    return stop, odd

  def row_hash_sum(self, statistics: Statistics) -> int:
    """Returns the sum of hashes of the rows with scored steps, modulo 2**64.

    The hashes are of what decides what is kept, not of storage columns. Sums over slices of a table
    add up.
    """
    names = np.array(list(map(_hash, self.source_names)), np.uint64)
    s, total = statistics, 0
    for start in range(0, len(self), CHUNK):
      rows = slice(start, start + CHUNK)
      state = names[self.source[rows]]
      for column in (self.line, s.n, s.n_pos, self.flags):
        state = mix64(state + column[rows].astype(np.uint64))
      for column in (s.score_sum, s.spread_sum):
        state = mix64(state + np.ascontiguousarray(column[rows]).view(np.uint64))
      total += int(state[s.n[rows] > 0].sum(dtype=np.uint64))
    return total % 2**64

  def save(self, path: epath.PathLike) -> None:
    """Writes the table atomically as an .npz file without pickles; equal values are one value."""
    head: dict[str, Any] = {k: getattr(self, k) for k in ("source_names", "digest", "inputs")}
    head |= {"rows": len(self), "steps": self.correct.size}
    columns = {name: getattr(self, name) for name in (*_OF_ROLLOUTS, *_OF_STEPS)}
    columns = {k: v[:1] if v.size and (v == v[0]).all() else v for k, v in columns.items()}
    with files.replacing(path) as file:
      np.savez(file, head=np.str_(json.dumps(head)), scores=self.scores, **columns)

  @classmethod
  def load(cls, path: epath.PathLike) -> "ScoreTable":
    """Reads a table that `save` wrote, of this version or an earlier one.

    A large local file is mapped: its rows are in memory while they are used. Raises ScoreTableError if
    the file is not a score table.
    """
    path = epath.Path(path)
    try:
      with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        head = json.loads(np.load(io.BytesIO(archive.read("head.npy")), allow_pickle=False).item())
        columns: dict[str, Any] = {
          info.filename.removesuffix(".npy"): _read_column(path, archive, info)
          for info in archive.infolist()
          if info.filename != "head.npy"
        }
      head["source_names"] = tuple(head["source_names"])
      if "n_pos" in columns:
        return cls(**_of_earlier_version(head, columns))
      rows, steps = head.pop("rows"), head.pop("steps")
      for name in _OF_ROLLOUTS:
        columns[name] = np.broadcast_to(columns[name], (rows, *columns[name].shape[1:]))
      for name in _OF_STEPS:
        columns[name] = np.broadcast_to(columns[name], steps)
      return cls(**head, **columns)
    except OSError:
      raise
    except Exception as error:  # zipfile and NumPy raise many types for damaged files
      raise ScoreTableError(
        f"{path} is not a score table of this version ({error}): delete it and write it again"
      ) from error


def _statistics(table: ScoreTable, tau: float, unmeasured: str) -> tuple[np.ndarray, ...]:
  """Returns the columns of `Statistics` of a few rows."""
  rows, lengths = len(table), table.steps.astype(np.int64)
  if rows and lengths.max() <= 64 and 0 < table.unit == table.total.min():  # all of the same N
    return _integer_statistics(table, lengths, tau)
  scores = table.mc_scores()
  positive, counted = positive_and_counted(scores, table.total != 0, tau, unmeasured)
  positive &= counted
  with np.errstate(over="ignore", invalid="ignore"):  # scores that only `paper` order accepts
    spread = scores * (1.0 - scores)  # 0 of a step that was not measured
  # bincount adds in the order of the steps; np.add.reduceat would not.
  rollout_of = np.repeat(np.arange(rows), lengths)
  return (
    lengths if counted.all() else np.bincount(rollout_of[counted], minlength=rows),
    np.bincount(rollout_of[positive], minlength=rows),
    np.bincount(rollout_of, np.where(positive, scores, 0.0), rows),
    np.bincount(rollout_of, spread, rows),
  )


def _integer_statistics(
  table: ScoreTable, lengths: np.ndarray, tau: float
) -> tuple[np.ndarray, ...]:
  """Returns what `_statistics` does, of steps with the same power of two as N."""
  unit, units = table.unit, np.arange(256)
  positive = units / unit > tau
  # Three sums in one: at most 64 positive steps, 64 x 128 units and 64 x 64 x 64 units squared.
  packed = positive + (units * positive << 16) + (units * (unit - units) << 40)
  sums = np.add.reduceat(packed[table.correct], table.starts())
  return lengths, sums & 0xFFFF, (sums >> 16 & 0xFFFFFF) / unit, (sums >> 40) / unit**2


def _of_earlier_version(head: dict[str, Any], columns: dict[str, np.ndarray]) -> dict[str, Any]:
  names = [field.name for field in dataclasses.fields(Statistics)]
  statistics = Statistics(*(columns.pop(name) for name in names))
  none = {name: np.zeros(0, np.uint8) for name in _OF_STEPS}
  columns |= none | {"scores": np.zeros(0), "steps": statistics.n}
  columns["group"] = np.zeros(statistics.n.size, np.uint64)
  columns["embedding"] = np.zeros((statistics.n.size, 0), np.float16)
  earlier = head.pop("tau"), head.pop("unmeasured"), statistics
  return head | columns | {"earlier": earlier}


def _read_column(path: epath.Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
  with archive.open(info) as member:
    np.lib.format.read_magic(member)
    shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    if info.file_size > _MAPPED_BYTES and "://" not in str(path):
      return np.asarray(np.memmap(path, dtype, "r", _data_start(path, info) + member.tell(), shape))
    data = member.read()  # and compares them with their checksum
  if len(data) != np.prod(shape, dtype=int) * dtype.itemsize:
    raise EOFError(f"{info.filename} is cut short")
  return np.frombuffer(data, dtype).reshape(shape)


def _data_start(path: epath.Path, info: zipfile.ZipInfo) -> int:
  """Returns the byte of the file where a stored member begins, after its name and extra field."""
  with path.open("rb") as file:
    file.seek(info.header_offset + 26)
    name, extra = np.frombuffer(file.read(4), "<u2").tolist()
  return info.header_offset + 30 + name + extra


@functools.cache
def _hash(text: str) -> int:
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix64(state: np.ndarray) -> np.ndarray:
  """Returns splitmix64's output function of uint64 states: a bijection that scatters the bits."""
  state = state ^ (state >> np.uint64(30))
  state *= np.uint64(0xBF58476D1CE4E5B9)
  state ^= state >> np.uint64(27)
  state *= np.uint64(0x94D049BB133111EB)
  state ^= state >> np.uint64(31)
  return state
