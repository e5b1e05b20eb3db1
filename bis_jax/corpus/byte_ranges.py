"""Where the records of ArrayRecord files are, so that they can be read from an object store.

The ArrayRecord library reads local files only. A shard written with `WRITER_OPTIONS` holds each
record uncompressed in a chunk of its own, so a record is one range of bytes, interrupted by the
headers of Riegeli's blocks (github.com/google/riegeli, doc/riegeli_records_file_format.md):

    chunk: 40 bytes (sizes, hashes, kind), then the data, of which the record is the end
    block header: 24 bytes at every multiple of 65,536, also within a chunk
"""

import dataclasses
import os
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import fsspec
import numpy as np

from bis_jax.corpus.rejections import CorpusError

WRITER_OPTIONS = "group_size:1,uncompressed"
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_GAP = 64 << 10  # bytes between two records that are read too, rather than in two requests
_SPAN = 8 << 20  # bytes of one request


@dataclasses.dataclass(frozen=True, eq=False)
class Ranges:
  """The records of a dataset by number."""

  shard: np.ndarray  # int32[records], number of the file
  start: np.ndarray  # int64[records], first byte there
  size: np.ndarray  # int64[records], bytes of the record
  check: np.ndarray  # uint32[records], its CRC-32

  @classmethod
  def concatenate(cls, parts: Sequence["Ranges"]) -> "Ranges":
    """Returns the ranges of all shards in order; each part is one shard's."""
    shard = np.repeat(np.arange(len(parts), dtype=np.int32), [part.size.size for part in parts])
    rest = [np.concatenate([getattr(p, k) for p in parts]) for k in ("start", "size", "check")]
    return cls(shard, *rest)

  def arrays(self, name: str) -> dict[str, np.ndarray]:
    """Returns the arrays under names that begin with `name`."""
    return {f"{name}_{key}": array for key, array in dataclasses.asdict(self).items()}

  @classmethod
  def of(cls, arrays: dict[str, np.ndarray], name: str) -> "Ranges":
    return cls(*(arrays[f"{name}_{field.name}"] for field in dataclasses.fields(cls)))


def find(path: str, checks: Sequence[int]) -> Ranges:
  """Returns the ranges of a local shard whose records have the CRC-32 `checks`."""
  starts, sizes = [], []
  with open(path, "rb") as file:
    at = 0
    while len(starts) < len(checks):  # the records are first; the library's index is after them
      header_end = _after(at, _CHUNK_HEADER)
      header = _without_block_headers(os.pread(file.fileno(), header_end - at, at), at)
      _, data_size, _, kind, record_size = struct.unpack("<5Q", header)
      if chr(kind & 0xFF) == "r":  # a record, not the signature of the file
        starts.append(_after(header_end, data_size - record_size))
        sizes.append(record_size)
      at = _after(header_end, data_size)
  one = np.array(starts, np.int64), np.array(sizes, np.int64), np.array(checks, np.uint32)
  return Ranges(np.zeros(len(starts), np.int32), *one)


def _after(at: int, size: int) -> int:
  """Returns the position after `size` bytes of chunks from `at` on."""
  while size:
    at += _BLOCK_HEADER if at % _BLOCK == 0 else 0
    step = min(size, _BLOCK - at % _BLOCK)
    at, size = at + step, size - step
  return at


def _without_block_headers(data: bytes, start: int) -> bytes:
  """Returns the bytes of chunks in a part of a file that begins at `start`."""
  first = -start % _BLOCK
  parts = [data[:first]]
  for at in range(first, len(data), _BLOCK):
    parts.append(data[at + _BLOCK_HEADER : at + _BLOCK])
  return b"".join(parts)


def read(
  filesystem: fsspec.AbstractFileSystem,
  shards: Sequence[str],
  ranges: Ranges,
  records: Sequence[int],
) -> list[bytes]:
  """Returns records of the files `shards`, read at the same time, close ones as one range.

  Raises CorpusError if a record is not as it was written.
  """
  chosen = np.asarray(records, np.int64)
  order = np.lexsort((ranges.start[chosen], ranges.shard[chosen])).tolist()
  spans: list[list[int]] = []  # [shard, start, stop]
  span_of = [0] * len(order)
  for place in order:
    record = records[place]
    shard, start = int(ranges.shard[record]), int(ranges.start[record])
    stop = _after(start, int(ranges.size[record]))
    last = spans[-1] if spans else [-1, 0, 0]
    if shard == last[0] and start - last[2] <= _GAP and stop - last[1] <= _SPAN:
      last[2] = max(last[2], stop)
    else:
      spans.append([shard, start, stop])
    span_of[place] = len(spans) - 1
  parts: Any = filesystem.cat_ranges(
    [shards[shard] for shard, _, _ in spans],
    [start for _, start, _ in spans],
    [stop for _, _, stop in spans],
  )
  found = []
  for record, span in zip(records, span_of, strict=True):
    shard, first, _ = spans[span]
    start, size = int(ranges.start[record]), int(ranges.size[record])
    raw = parts[span][start - first : _after(start, size) - first]
    data = _without_block_headers(raw, start)
    if len(data) != size or zlib.crc32(data) != ranges.check[record]:
      raise CorpusError(f"record {record} in {shards[shard]} is not as it was written")
    found.append(data)
  return found
