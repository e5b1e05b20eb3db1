"""Ranges of bytes hold what the ArrayRecord library wrote."""

import random
import zlib

import fsspec
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from bis_jax.corpus import byte_ranges
from bis_jax.corpus.byte_ranges import Ranges
from bis_jax.corpus.rejections import CorpusError

LOCAL = fsspec.filesystem("file")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
  """Two files of records whose sizes end around those of Riegeli's blocks, and the records."""
  rng, folder = random.Random(1), tmp_path_factory.mktemp("shards")
  sizes = [0, 1, 100, 1000, 65_450, 65_496, 65_512, 65_536, 70_000, 200_000]
  paths, parts, records = [], [], []
  for name in "ab":
    written = [rng.randbytes(rng.choice(sizes)) for _ in range(60)]
    path = str(folder / name)
    writer = ArrayRecordWriter(path, byte_ranges.WRITER_OPTIONS)
    for record in written:
      writer.write(record)
    writer.close()
    parts.append(byte_ranges.find(path, list(map(zlib.crc32, written))))
    paths.append(path)
    records += written
  return paths, Ranges.concatenate(parts), records


def test_any_records_in_any_order(shards):
  paths, ranges, records = shards
  chosen = np.random.default_rng(0).integers(0, len(records), 90)
  found = byte_ranges.read(LOCAL, paths, ranges, chosen.tolist())
  assert found == [records[i] for i in chosen]
  assert byte_ranges.read(LOCAL, paths, ranges, range(len(records))) == records
  assert byte_ranges.read(LOCAL, paths, ranges, []) == []


def test_a_changed_byte_is_told(shards, tmp_path):
  paths, ranges, records = shards
  number = max(range(60), key=lambda i: len(records[i]))
  data = bytearray(open(paths[0], "rb").read())
  data[int(ranges.start[number]) + 5] ^= 1
  (tmp_path / "a").write_bytes(data)
  with pytest.raises(CorpusError, match=f"record {number} in .*/a is not as it was written"):
    byte_ranges.read(LOCAL, [str(tmp_path / "a")], ranges, [number])
