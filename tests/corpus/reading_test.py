"""Files of lines: every form, every split, and files that are damaged."""

import gzip
import itertools
import tracemalloc
import zipfile

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from bis_jax.corpus import reading
from bis_jax.corpus.reading import AnnotationError, AnnotationFile, annotation_files

LINES = b'{"a": 1}\n\n  \n{"b": "\xe6\xb1\x82"}\r\n{"c": 3}'


def read(file: AnnotationFile, start=0, stop=None) -> bytes:
  return b"".join(block for _, block in file.blocks(start, stop))


def test_files_in_name_order(write_files):
  folder = write_files(
    {"a.jsonl": b"", "a-b.jsonl": b"", "B.jsonl.gz": b"", "c.jsonl.zst": b"", "notes.txt": b""}
    | {".hidden.jsonl": b"", ".cache/d.jsonl": b"", "deep/notes.txt": b""}
  )
  files = annotation_files(folder)
  assert [file.name for file in files] == ["B.jsonl.gz", "a-b.jsonl", "a.jsonl", "c.jsonl.zst"]
  assert [file.source for file in files] == ["B", "a-b", "a", "c"]
  assert [file.name for file in annotation_files(folder / "a.jsonl")] == ["a.jsonl"]


@pytest.mark.parametrize(
  ("files", "path", "message"),
  [
    ({"x.txt": b""}, "", "holds no annotation file"),
    ({"x.txt": b""}, "nowhere", "no annotations at .*nowhere"),
    ({"x.txt": b"text"}, "x.txt", "neither a folder, nor a zip"),
    ({"x.jsonl": b"", "x.jsonl.gz": b""}, "", "x.jsonl and x.jsonl.gz are one source"),
    ({"x.jsonl": b"", "Y.JSONL": b""}, "", "'Y.JSONL': rename it to one of "),
    ({"x.jsonl": b"", "y.jsonl.bz2": b""}, "", "'y.jsonl.bz2': rename it"),
    ({"x.jsonl": b"", "deep/y.jsonl": b""}, "", "deep/y.jsonl is in a subfolder: name that folder"),
    ({"x.jsonl": b"", "\udcff.jsonl": b""}, "", r"'.udcff.jsonl', which is not UTF-8: rename it"),
  ],
)
def test_what_is_no_annotations(write_files, files, path, message):
  with pytest.raises(AnnotationError, match=message):
    annotation_files(write_files(files) / path)


@pytest.mark.parametrize("form", ["plain", "gz", "zst", "zip", "gz in zip"])
def test_every_form_gives_the_same_bytes(write_files, form):
  data = LINES * 50_000
  packed = {
    "gz": lambda: gzip.compress(data[:1000]) + gzip.compress(data[1000:]),
    "zst": lambda: zstandard.compress(data[:1000]) + zstandard.compress(data[1000:]),
    "gz in zip": lambda: gzip.compress(data),
  }.get(form, lambda: data)()
  suffix = {"gz": ".gz", "zst": ".zst", "gz in zip": ".gz"}.get(form, "")
  path = write_files({f"x.jsonl{suffix}": packed})
  if "zip" in form:
    with zipfile.ZipFile(path / "annotations.zip", "w", zipfile.ZIP_DEFLATED) as archive:
      archive.write(path / f"x.jsonl{suffix}", f"annotations/x.jsonl{suffix}")
      archive.writestr("__MACOSX/annotations/._x.jsonl", b"no JSON")
    path = path / "annotations.zip"
  (file,) = annotation_files(path)
  assert file.source == "x"
  at = 0
  for offset, block in file.blocks():
    assert offset == at and len(block) < 2 * reading.BLOCK
    assert block.endswith(b"\n") or offset + len(block) == len(data)
    at += len(block)
  assert read(file) == data
  places = [0, 9, 300_000, len(data) - 8]
  assert list(file.read_lines(places, [8] * 4)) == [data[at : at + 8] for at in places]


def test_a_byte_order_mark_is_skipped_once(write_files):
  (file,) = annotation_files(write_files({"x.jsonl": reading.BOM + b"a\n" + reading.BOM + b"b"}))
  assert list(file.blocks()) == [(3, b"a\n" + reading.BOM + b"b")]


@given(
  st.lists(st.sampled_from([b"", b"a", b"bc", b"d" * 9]), max_size=12),
  st.booleans(),
  st.lists(st.integers(0, 60), max_size=4),
  st.integers(1, 9),
)
def test_any_split_gives_every_line_once(tmp_path_factory, lines, ended, cuts, block):
  data = b"\n".join(lines) + b"\n" * ended
  path = tmp_path_factory.mktemp("split") / "x.jsonl"
  path.write_bytes(data)
  (file,) = annotation_files(path)
  bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(reading, "BLOCK", block)
    parts = [list(file.blocks(*span)) for span in itertools.pairwise(bounds)]
  found = list(itertools.chain.from_iterable(parts))
  assert b"".join(block for _, block in found) == data
  assert all(data[at : at + len(block)] == block for at, block in found)
  assert all(block.endswith(b"\n") for _, block in found[:-1])


@pytest.mark.parametrize("form", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_files_are_named(write_files, form, damage):
  data = bytes(range(33, 100)) * 9000
  packed = (
    gzip.compress(data)
    if form == "gz"
    else zstandard.ZstdCompressor(write_checksum=True).compress(data)
  )
  packed = packed[:-9] if damage == "cut" else packed[:30] + b"\0\0\0\0" + packed[34:]
  (file,) = annotation_files(write_files({f"x.jsonl.{form}": packed}))
  with pytest.raises(AnnotationError, match=rf"x\.jsonl\.{form} is damaged"):
    read(file)


def test_a_link_to_nothing_is_told(write_files):
  path = write_files({"x.jsonl": b""})
  (path / "y.jsonl").symlink_to("gone.jsonl")
  with pytest.raises(AnnotationError, match="y.jsonl is not a file, or a broken link: remove it"):
    annotation_files(path)


@pytest.mark.parametrize("kind", ["encrypted", "deflate64", "cut"])
def test_zips_that_cannot_be_read_are_told(write_files, kind):
  path = write_files({"x.txt": b""}) / "x.zip"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("x.jsonl", LINES)
  data = bytearray(path.read_bytes())
  for header, flags, method in ((b"PK\3\4", 6, 8), (b"PK\1\2", 8, 10)):
    at = data.index(header)
    if kind == "encrypted":
      data[at + flags] |= 1
    elif kind == "deflate64":
      data[at + method] = 9
    elif header == b"PK\1\2":
      data[at] = 0
  path.write_bytes(data)
  remedy = "is damaged" if kind == "cut" else "member x.jsonl can't be read .*: extract the zip"
  with pytest.raises(AnnotationError, match=remedy):
    read(*annotation_files(path))


def test_a_zstd_bomb_is_read_in_pieces(write_files):
  bomb = zstandard.compress(b"\n" * (200 << 20))
  (file,) = annotation_files(write_files({"x.jsonl.zst": bomb}))
  tracemalloc.start()
  size = sum(len(block) for _, block in file.blocks())
  most = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert size == 200 << 20 and most < 150 << 20


def test_a_file_that_shrinks_is_told(write_files):
  (file,) = annotation_files(write_files({"x.jsonl": LINES}))
  with pytest.raises(AnnotationError, match="changed while it was read"):
    list(file.read_lines([len(LINES) - 2], [8]))
