"""Annotations -> columns: the fast path equals the slow one, line by line, and finds bad lines."""

import gzip
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bis_jax.corpus import columns, reading, records, scan
from bis_jax.corpus.rejections import REASONS, BadRecord
from bis_jax.corpus.score_table import PAPER_OK, PAPER_SKIPS, STRICT_OK


def reference(
  lines: list[bytes], marked: bool = False
) -> tuple[list[tuple], list[tuple[int, str]]]:
  """Line by line with `records`: (line, scores, measured, flags, images), (line, reason)."""
  rows, bad, seen = [], [], set()
  for at, raw in enumerate(lines):
    flags, images = PAPER_SKIPS * (marked and at == 0), None
    try:
      record = records.load_object(raw, order="paper")
    except BadRecord as error:
      bad.append((at, error.reason))
      continue
    try:
      records.load_object(raw)
      images = records.parse_rollout(record, "x", at).images
      if raw in seen:
        raise BadRecord("duplicate_line", "")
      seen.add(raw)
      flags |= STRICT_OK
    except BadRecord as error:
      bad.append((at, error.reason))
    scores, totals = records.paper_scores(record)
    if scores:
      flags |= PAPER_OK * records.paper_writes(record)
      rows.append((at, scores, [n != 0 for n in totals], flags, images))
  return rows, bad


def rows_of(found: scan.Scan) -> list[tuple]:
  c = found.columns
  stops, table = np.cumsum(c.steps), found.table()
  scores = table.mc_scores()
  measured = table.total != 0
  return [
    (
      int(c.line[row]),
      scores[stop - c.steps[row] : stop].tolist(),
      measured[stop - c.steps[row] : stop].tolist(),
      int(c.flags[row]),
      found.image_sets[c.image_set[row]] if c.image_set[row] >= 0 else None,
    )
    for row, stop in enumerate(stops.tolist())
  ]


def test_columns_of_two_files(write_files, record_of, line_of):
  unmeasured = {"step": "x", "score": 0.0, "num_mc_correct": 0, "num_mc_total": 0}
  two_images = record_of((0.5,), image=["images/a.png", "images/b.png"])
  data = {
    "b.jsonl": line_of() + b"\n" + line_of(record_of(steps_with_score=[unmeasured])) + b"\n",
    "a.jsonl": b"oops\n" + line_of(two_images),
  }
  found = scan.scan(write_files(data))
  assert found.records == 4
  assert found.source.tolist() == [0, 1, 1]
  both = STRICT_OK | PAPER_OK
  assert rows_of(found) == [
    (1, [0.5], [True], both, ("images/a.png", "images/b.png")),
    (0, [1.0, 0.5, 0.0], [True] * 3, both, ("VisualPRM400K-v1.1-Raw/geo/1.png",)),
    (1, [0.0], [False], both, ("VisualPRM400K-v1.1-Raw/geo/1.png",)),
  ]
  assert found.columns.offset.tolist() == [5, 0, len(line_of()) + 1]
  assert [r.id for r in found.rejections] == ["a:0"]
  assert list(found.read_lines(np.array([0, 2]))) == [
    line_of(two_images),
    data["b.jsonl"].splitlines()[1],
  ]
  table = found.table()
  assert table.source_names == ("a", "b")
  s = table.statistics()
  assert s.n.tolist() == [1, 3, 1] and s.n_pos.tolist() == [1, 2, 0]
  assert table.statistics(unmeasured="ignore").n.tolist() == [1, 3, 0]


def test_rollouts_of_one_question_have_one_group(write_files, record_of, line_of):
  """By type or one by one: the records with an answer of NaN."""
  questions = [
    {"question_orig": "Q?", "question": "<image> Q?"},
    {"question_orig": "Q?", "question": "Think. <image> Q?"},
    {"question_orig": "Q?", "image": ["images/a.png"]},
    {"question_orig": "R?"},
    {"question_orig": "Q?", "image": "images/b.png"},
    {"question_orig": "", "question": "S?"},
    {"question_orig": None, "question": "S?"},
    {"question": "T?", "question_orig": ""},
  ]
  records = [record_of(**{"image": "images/a.png"} | question) for question in questions]
  lines = [line_of(record) for record in records]
  lines += [
    line_of(record | {"steps_with_score": [{"step": "s", "score": 1}]}) for record in records
  ]
  lines += [line_of(record | {"id": 10**400}) for record in records]
  found = scan.scan(write_files({"a.jsonl": b"\n".join(lines)}))
  groups = np.unique(found.columns.group, return_inverse=True)[1].reshape(3, -1)
  assert (groups == groups[0]).all()
  same = [[0, 1, 2], [3], [4], [5, 6], [7]]
  for members in same:
    assert len({groups[0][at] for at in members}) == 1
  assert len(set(groups[0].tolist())) == len(same)


_SPOILED = [
  b"",
  b"  ",
  b"[1]",
  b'{"a": ',
  b"{}{}",
  b'{"image": "a.png", "steps_with_score": []}',
  b'{"image": "a.png", "steps_with_score": [{"step": "x", "score": 1e999}]}',
  b'{"image": "a.png", "steps_with_score": [{"step": "x", "score": "0.5"}]}',
  b'{"image": "../a.png", "steps_with_score": [{"step": "x", "score": 0.5}]}',
  b'{"image": "a.png", "steps_with_score": [{"step": " ", "score": 0.5}]}',
  b'{"image": "a.png", "x": "\\ud800", "steps_with_score": [{"step": "x", "score": 0.5}]}',
  b'{"image": "a.png", "x": "\xff", "steps_with_score": [{"step": "x", "score": 0.5}]}',
  b'{"image": "a.png", "x": NaN, "steps_with_score": [{"step": "x", "score": NaN}]}',
  b'{"image": "a.png", "steps_with_score": [{"step": "x", "score": 0.5, "num_mc_total": null}]}',
  b'{"image": "a.png", "steps_with_score": [{"step": "x", "score": 0.5, "num_mc_total": 16}]}',
  b'{"image": "a.png", "steps_with_score": [{"step": "x", "score": 0.3, "num_mc_correct": 3,'
  b' "num_mc_total": 10}]}',
  b'{"image": "a.png", "x": %s, "steps_with_score": [{"step": "x", "score": 0.5}]}' % (b"9" * 5000),
  b'\x0c{"image": "a.png", "steps_with_score": [{"step": "x", "score": 0.5}]}\xc2\xa0',
  b"\xe2\x80\xa8 \xc2\x85",
  # Counts that are -(1 << 40) mean absent ones in the columns.
  b'{"image": "a.png", "steps_with_score": [{"step": "x", "score": 0.5,'
  b' "num_mc_correct": -1099511627776, "num_mc_total": -1099511627776}]}',
  b' {"steps_with_score": [{"score": 0, "step": "x", "num_mc_correct": 0, "num_mc_total": 0}],'
  b' "image": ["\xe6\xb1\x82.png", "b.png"]} ',
]


@st.composite
def _lines(draw):
  lines = []
  for _ in range(draw(st.integers(1, 6))):
    if draw(st.booleans()):
      lines.append(draw(st.sampled_from(_SPOILED)))
      continue
    scores = draw(st.lists(st.integers(0, 16), min_size=1, max_size=4))
    steps = [
      {"step": "é" if s % 2 else "x", "score": s / 16, "num_mc_correct": s, "num_mc_total": 16}
      for s in scores
    ]
    line = bytearray(json.dumps({"image": "a.png", "steps_with_score": steps}).encode())
    if draw(st.booleans()):  # a byte changed anywhere: mostly no JSON, sometimes another record
      line[draw(st.integers(0, len(line) - 1))] = draw(
        st.sampled_from(b' "\\{}[],:019.e-\xc3\x00/')
      )
    lines.append(bytes(line))
  return lines


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_lines(), st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.booleans(), st.booleans())
def test_scan_is_the_line_by_line_reading(tmp_path, lines, newline, ended, marked, tiny_blocks):
  data = newline.join(lines) + newline * ended
  lines = data.split(b"\n")
  lines = [line.removesuffix(b"\r") for line in (lines if lines[-1] else lines[:-1])]
  path = tmp_path / "x.jsonl"
  path.write_bytes(reading.BOM * marked + data)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(reading, "BLOCK", 1 if tiny_blocks else 1 << 20)  # 1: every line on its own
    found = scan.scan(path, format="raw")  # as asked: no line may be recognizable
  rows, bad = reference(lines, marked and bool(data))
  assert repr(rows_of(found)) == repr(rows)  # repr: NaN is NaN
  assert [(rejected.line, rejected.reason) for rejected in found.rejections] == bad
  assert found.records == len(lines)
  raw = list(found.read_lines(np.arange(len(rows))))
  assert raw == [lines[row[0]] for row in rows]


@pytest.mark.parametrize("line", _SPOILED)
def test_a_spoiled_line_beside_good_ones(write_files, line_of, line):
  lines = [line_of(), line, line_of()[:-1] + b', "x": 1}']
  found = scan.scan(write_files({"x.jsonl": b"\n".join(lines)}))
  rows, bad = reference(lines)
  assert repr(rows_of(found)) == repr(rows)
  assert [(rejected.line, rejected.reason) for rejected in found.rejections] == bad


def test_blank_lines_and_rejections_stay_in_bounded_memory(write_files, line_of, monkeypatch):
  """A gzip bomb of blank lines: a thousand times its size. All are counted, few are listed."""
  monkeypatch.setattr(columns, "MOST_LISTED", 10)
  bomb = gzip.compress(line_of() + b"\n" * 5_000_000 + b"oops\n" * 1000 + line_of())
  path = write_files({"x.jsonl.gz": bomb})
  tracemalloc.start()
  found = scan.scan(path)
  most = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert len(bomb) < 15_000 and most < 100 << 20
  assert found.records == 5_001_001
  assert found.columns.line.tolist() == [0, 5_001_000]
  assert found.counts_by_reason() == {
    "blank_line": 4_999_999,
    "not_json": 1000,
    "duplicate_line": 1,
  }
  assert [bad.line for bad in found.rejections] == [*range(1, 11), 5_001_000]


def test_a_longer_line_is_rejected_and_its_neighbours_are_not(write_files, line_of, monkeypatch):
  """Mutation caught: a line of many spans is read again for each of them."""
  for module in (reading, records, columns):
    monkeypatch.setattr(module, "MAX_LINE", 1000)
  monkeypatch.setattr(reading, "BLOCK", 100)
  monkeypatch.setattr(reading, "SPAN", 300)
  long = line_of()[:-1] + b" " * 5000 + b"}"
  data = b"\n".join([line_of(), long, line_of(), long[:-1] + b"x}"]) + b"\n"
  path = write_files({"x.jsonl": data})
  (path / "x.jsonl").rename(path / "y.jsonl")
  (path / "x.jsonl.gz").write_bytes(gzip.compress(data))
  read = []
  whole = reading._rest_of_line
  monkeypatch.setattr(reading, "_rest_of_line", lambda *at: read.append(whole(*at)) or read[-1])
  found = scan.scan(path)
  assert found.records == 8 and found.columns.line.tolist() == [0, 2, 0, 2]
  assert found.counts_by_reason() == {"too_long": 4, "duplicate_line": 2}
  assert sum(read) < 3 * len(data)


def test_blocks_that_are_right_take_the_fast_way(write_files, line_of, monkeypatch):
  def fail(*_):
    raise AssertionError("took the slow way")

  monkeypatch.setattr(columns.BlockReader, "_read_one_by_one", fail)
  path = write_files({"x.jsonl": b"".join(line_of() + b"\r\n" for _ in range(2))})
  assert len(scan.scan(path).columns.line) == 2
  (path / "x.jsonl").write_bytes(b"{}\n")
  with pytest.raises(AssertionError, match="slow way"):
    scan.scan(path)


@pytest.mark.parametrize("whole_lines", [False, True])
def test_duplicates_are_found_anywhere_in_a_file(write_files, record_of, line_of, whole_lines):
  one, two = line_of(), line_of(record_of((0.25,)))
  alike = one.replace(b"How long is AB", b"How long is AC")  # same length, one byte apart
  path = write_files({"a.jsonl": b"\n".join([one, two, alike, one, one]), "b.jsonl": one})
  found = scan.scan(path, whole_lines=whole_lines)
  assert [(r.id, r.reason, r.detail) for r in found.rejections] == [
    ("a:3", "duplicate_line", "the same as line 0"),
    ("a:4", "duplicate_line", "the same as line 0"),
  ]
  assert found.columns.flags.tolist() == [3, 3, 3, PAPER_OK, PAPER_OK, 3]


def test_whole_line_fingerprints_see_every_byte(write_files, line_of):
  line = line_of()
  for at in range(0, len(line), 7):
    changed = bytearray(line)
    changed[at] ^= 1
    path = write_files({"a.jsonl": line + b"\n" + bytes(changed) + b"\n"})
    marks = scan.scan(path, whole_lines=True).columns.fingerprint
    assert marks.size < 2 or marks[0] != marks[1]


def test_processes_and_spans_change_nothing(write_files, record_of, line_of, monkeypatch):
  lines = [line_of(record_of((at % 17 / 16, 1.0), answer=f"求 {at}")) for at in range(300)]
  lines[7] = lines[200] = b"oops"
  path = write_files({"a.jsonl": b"\n".join(lines), "b.jsonl": b"\n".join(lines[:50])})
  whole = scan.scan(path)
  monkeypatch.setattr(scan, "_SMALL", 0)
  monkeypatch.setattr(reading, "SPAN", 4000)
  spread = scan.scan(path, workers=2)
  assert rows_of(spread) == rows_of(whole)
  assert spread.rejections == whole.rejections
  assert whole.counts_by_reason() == {"not_json": 3}
  np.testing.assert_array_equal(spread.columns.offset, whole.columns.offset)


def test_memory_does_not_grow_with_the_file(write_files, record_of, line_of):
  import tracemalloc

  huge = {"step": "word " * 60_000, "score": 1.0}
  line = line_of(record_of(steps_with_score=[huge])) + b"\n"
  path = write_files({"x.jsonl": line * 100})  # 30 MB
  tracemalloc.start()
  found = scan.scan(path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert found.records == 100 and len(found.rejections) == 99
  assert peak < 12e6


# What the shared generator plants, and the reason that strict order gives. None: the record is
# right; what is special about its text is for `notes` (see preparation_test).
PLANTED = {
  "bad_json": "not_json",
  "truncated_json": "not_json",
  "blank_line": "blank_line",
  "no_steps": "no_steps",
  "empty_steps": "no_steps",
  "empty_step_text": "empty_step",
  "missing_score": "missing_score",
  "null_score": "missing_score",
  "string_score": "score_not_a_number",
  "nan_score": "score_not_finite",
  "score_above_one": "score_out_of_range",
  "negative_score": "score_out_of_range",
  "no_image": "no_image",
  "empty_image": "no_image",
  "missing_image_file": None,  # found once there is an image root
  "path_traversal": "image_outside_root",
  "absolute_path": "image_outside_root",
  "marker_in_step": None,
  "image_token_in_step": None,
  "chat_token_in_step": None,
  "count_mismatch": "count_mismatch",
  "not_an_object": "not_an_object",
  "huge_step": None,
  "invalid_utf8": "invalid_utf8",
  "duplicate_line": "duplicate_line",  # the second of the two
}


def test_planted_records_get_their_reason_and_no_other(dirty_corpus):
  planted = json.loads((dirty_corpus / "dirty.json").read_text())
  assert {bad["kind"] for bad in planted} == set(PLANTED)
  expected = {
    (bad["file"], bad["line"] + (bad["kind"] == "duplicate_line"), PLANTED[bad["kind"]])
    for bad in planted
    if PLANTED[bad["kind"]]
  }
  found = scan.scan(dirty_corpus / "annotations")
  assert {(f"{r.source}.jsonl", r.line, r.reason) for r in found.rejections} == expected
  assert len(found.rejections) == len(expected)
  assert {r.reason for r in found.rejections} <= set(REASONS)
