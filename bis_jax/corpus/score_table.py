"""One row of numbers per rollout, without text: the input of selection.

Source of the statistics: arXiv 2602.04145, the Balanced-Information Score.
"""

import dataclasses
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from bis_jax import files
from bis_jax.errors import UserError

STRICT_OK = 1  # the record passes every check: it may be ranked in `strict` order
PAPER_OK = 2  # the paper's builder writes the record when it is kept in `paper` order
PAPER_SKIPS = 4  # the paper's builder does not rank it: a byte order mark is before it

_COLUMNS = {
  "source": np.int16,
  "line": np.int32,
  "n": np.int16,
  "n_pos": np.int16,
  "score_sum": np.float64,
  "spread_sum": np.float64,
  "flags": np.uint8,
  "rollout": np.int64,
  "offset": np.int64,
  "length": np.int32,
}
_CHUNK = (
  1 << 14
)  # rollouts whose statistics are computed at a time, so that their steps stay in cache


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


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreTable:
  """One row per scorable rollout, sources in file-name order, lines in file order."""

  source_names: tuple[str, ...]  # annotation file stems, sorted by file name
  source: np.ndarray  # int16[rows], index into `source_names`, non-decreasing
  line: np.ndarray  # int32[rows], 0-based, strictly increasing within a source
  n: np.ndarray  # int16[rows], scored steps, at least 1
  n_pos: np.ndarray  # int16[rows], positive ones: MC score above `tau`
  score_sum: np.ndarray  # float64[rows], of the positive steps' MC scores, in step order
  spread_sum: np.ndarray  # float64[rows], of s (1 - s) over the scored steps, in step order
  flags: np.ndarray  # uint8[rows], bits STRICT_OK, PAPER_OK and PAPER_SKIPS
  rollout: np.ndarray  # int64[rows], index in the prepared corpus, -1 if not stored
  offset: np.ndarray  # int64[rows], byte where the line starts, uncompressed; -1 if unknown
  length: np.ndarray  # int32[rows], bytes of the line without its line end, -1 if unknown
  tau: float = 0.0
  unmeasured: str = "negative"  # or "ignore": steps without continuations do not count
  digest: str = ""  # identifies the corpus that the rows describe
  inputs: str = ""  # identifies the files that the table was made from

  def __len__(self) -> int:
    return self.line.size

  @classmethod
  def from_steps(
    cls,
    source_names: tuple[str, ...],
    *,
    lengths: np.ndarray,
    scores: np.ndarray,
    measured: np.ndarray,
    tau: float = 0.0,
    unmeasured: str = "negative",
    digest: str = "",
    **columns: np.ndarray,
  ) -> "ScoreTable":
    """Returns the table of rollouts given as ragged steps.

    Two rollouts with MC scores (1/16, 1/2) and (0, 1/4, 1) have `lengths` [2, 3] and `scores`
    [1/16, 1/2, 0, 1/4, 1]. Raises ScoreTableError for unknown `unmeasured`, arrays of unequal
    length or a rollout of more than 32,767 steps.

    Args:
      lengths: int[rollouts], steps with a numeric score.
      scores: float64[sum(lengths)], MC scores.
      measured: bool[sum(lengths)], False for steps without continuations. If they are ignored, a
        rollout without any other step is left out of the table.
      **columns: source, line, flags and, if known, rollout, offset and length; see the class.
    """
    lengths, scores = np.asarray(lengths), np.asarray(scores, np.float64)
    if scores.size != lengths.sum() or scores.size != len(measured):
      raise ScoreTableError(
        f"{lengths.sum()} steps by their lengths, but {scores.size} scores and {len(measured)} "
        "measured flags"
      )
    positive, counted = positive_and_counted(scores, np.asarray(measured), tau, unmeasured)
    if not counted.all():
      rollout_of = np.repeat(np.arange(lengths.size), lengths)
      lengths = np.bincount(rollout_of[counted], minlength=lengths.size)
      scores, positive = scores[counted], positive[counted]
    rows = lengths.size
    if rows and lengths.max() > np.iinfo(np.int16).max:
      at = int(lengths.argmax())
      raise ScoreTableError(
        f"{source_names[columns['source'][at]]}:{columns['line'][at]} has {lengths[at]} scored steps; a rollout may have "
        "at most 32767: remove the record"
      )
    ends = np.cumsum(lengths)
    parts = [(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))]
    for start in range(0, rows, _CHUNK):
      chunk = lengths[start : start + _CHUNK]
      end = ends[start + chunk.size - 1]
      steps = slice(end - chunk.sum(), end)
      parts.append(_statistics(chunk, scores[steps], positive[steps]))
    n_pos, score_sum, spread_sum = map(np.concatenate, zip(*parts, strict=True))
    values = dict.fromkeys(("rollout", "offset", "length"), np.full(rows, -1)) | columns
    values |= {"n": lengths, "n_pos": n_pos, "score_sum": score_sum, "spread_sum": spread_sum}
    scored = lengths > 0
    kept: dict[str, Any] = {k: np.asarray(values[k])[scored].astype(t) for k, t in _COLUMNS.items()}
    return cls(tuple(source_names), **kept, tau=tau, unmeasured=unmeasured, digest=digest)

  @property
  def is_mixed(self) -> np.ndarray:
    """bool[rows], rollouts with both positive and other steps."""
    return (self.n_pos > 0) & (self.n_pos < self.n)

  def rows_of(self, source: int) -> slice:
    bounds = np.array((source, source + 1), self.source.dtype)  # another dtype copies the column
    return slice(*np.searchsorted(self.source, bounds).tolist())

  def spans(self) -> list[slice]:
    return [self.rows_of(source) for source in range(len(self.source_names))]

  def take(self, rows: slice | np.ndarray) -> "ScoreTable":
    """Returns a table of some rows (slice, mask or increasing indices); slices share memory."""
    columns: dict[str, Any] = {name: getattr(self, name)[rows] for name in _COLUMNS}
    return dataclasses.replace(self, **columns)

  def checksum(self) -> str:
    """Returns 16 hex digits of the statistics that decide what is kept, not of storage columns."""
    return f"{self.row_hash_sum():016x}"

  def row_hash_sum(self) -> int:
    """Returns the sum of the row hashes modulo 2**64: sums over slices of a table add up."""
    names = np.array([_hash(name) for name in self.source_names], np.uint64)
    total = 0
    for start in range(0, len(self), 1 << 20):
      part = self.take(slice(start, start + (1 << 20)))
      state = names[part.source]
      for column in (part.line, part.n, part.n_pos, part.flags):
        state = mix64(state + column.astype(np.uint64))
      for column in (part.score_sum, part.spread_sum):
        state = mix64(state + np.ascontiguousarray(column).view(np.uint64))
      total += int(state.sum(dtype=np.uint64))
    return total % 2**64

  def save(self, path: epath.PathLike) -> None:
    """Writes the table atomically as an .npz file without pickles."""
    rest = ("source_names", "tau", "unmeasured", "digest", "inputs")
    head = json.dumps({name: getattr(self, name) for name in rest})
    columns: dict[str, Any] = {name: getattr(self, name) for name in _COLUMNS}
    with files.replacing(path) as file:
      np.savez(file, head=np.str_(head), **columns)

  @classmethod
  def load(cls, path: epath.PathLike, part: tuple[int, int] = (0, 1)) -> "ScoreTable":
    """Reads a table that `save` wrote, or only the i-th of n equal slices with `part` (i, n).

    Raises ScoreTableError if the file is not a score table of this version.
    """
    try:
      with epath.Path(path).open("rb") as file, zipfile.ZipFile(file) as archive:
        head = np.load(io.BytesIO(archive.read("head.npy")), allow_pickle=False).item()
        columns = {name: _read_rows(archive, f"{name}.npy", *part) for name in _COLUMNS}
      fields: dict[str, Any] = json.loads(head) | columns
      return cls(tuple(fields.pop("source_names")), **fields)
    except OSError:
      raise
    except Exception as error:  # zipfile and NumPy raise many types for damaged files
      raise ScoreTableError(
        f"{path} is not a score table of this version ({error}): delete it and write it again"
      ) from error

  @classmethod
  def concatenate(cls, tables: Sequence["ScoreTable"]) -> "ScoreTable":
    columns: dict[str, Any] = {
      name: np.concatenate([getattr(t, name) for t in tables]) for name in _COLUMNS
    }
    return dataclasses.replace(tables[0], **columns)


def _statistics(
  lengths: np.ndarray, scores: np.ndarray, positive: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns n_pos, score_sum and spread_sum of ragged rollouts; see `ScoreTable`."""
  rows = lengths.size
  with np.errstate(over="ignore", invalid="ignore"):  # scores that only `paper` order accepts
    spread = scores * (1.0 - scores)
  # bincount adds in the order of the steps; np.add.reduceat would not.
  rollout_of = np.repeat(np.arange(rows), lengths)
  return (
    np.bincount(rollout_of[positive], minlength=rows),
    np.bincount(rollout_of, np.where(positive, scores, 0.0), rows),
    np.bincount(rollout_of, spread, rows),
  )


def _read_rows(archive: zipfile.ZipFile, name: str, part: int, parts: int) -> np.ndarray:
  """Returns slice `part` of `parts` of a stored column; other rows are never in memory."""
  with archive.open(name) as member:
    np.lib.format.read_magic(member)
    (rows,), _, dtype = np.lib.format.read_array_header_1_0(member)
    start, stop = rows * part // parts, rows * (part + 1) // parts
    if start:  # a member that is read whole is compared with its checksum
      member.seek(start * dtype.itemsize, os.SEEK_CUR)
    data = member.read((stop - start) * dtype.itemsize)
    if len(data) < (stop - start) * dtype.itemsize:
      raise EOFError(f"{name} is cut short")
    return np.frombuffer(data, dtype)


def _hash(text: str) -> int:
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix64(state: np.ndarray) -> np.ndarray:
  """Returns splitmix64's output function of uint64 states: a bijection that scatters the bits."""
  state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return state ^ (state >> np.uint64(31))
