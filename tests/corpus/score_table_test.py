"""The statistics of a rollout are exact, survive the disk, and add up over slices."""

import itertools
import json

import numpy as np
import pytest

from bis_jax.corpus import score_table
from bis_jax.corpus.score_table import PAPER_OK, STRICT_OK, ScoreTable, ScoreTableError
from bis_jax.selection.rule import Rule, select
from tests.tables import table_from_steps


def table_of(rollouts, *, continuations=-1, source=None, line=None, names=("a",), **rest):
  """A table of rollouts given as lists of MC scores; None is a step without continuations."""
  steps = [s for rollout in rollouts for s in rollout]
  rows = len(rollouts)
  return table_from_steps(
    names,
    source=np.zeros(rows, int) if source is None else np.array(source),
    line=np.arange(rows) if line is None else np.array(line),
    lengths=np.array([len(r) for r in rollouts], int),
    scores=np.array([s or 0.0 for s in steps], float),
    totals=np.array([continuations if s is not None else 0 for s in steps]),
    flags=np.full(rows, STRICT_OK | PAPER_OK),
    **rest,
  )


def test_statistics_of_literal_rollouts():
  table = table_of([[1 / 16, 1 / 2], [0.0, 1 / 4, 1.0], [0.0]]).statistics()
  assert table.n.tolist() == [2, 3, 1]
  assert table.n_pos.tolist() == [2, 2, 0]
  assert table.score_sum.tolist() == [9 / 16, 5 / 4, 0.0]
  assert table.spread_sum.tolist() == [15 / 256 + 1 / 4, 3 / 16, 0.0]


@pytest.mark.parametrize("continuations", [4, 7, 8, 10, 16, 64])
def test_sums_are_those_of_a_plain_loop_bit_for_bit(continuations):
  rng = np.random.default_rng(continuations)
  rollouts = [
    (rng.integers(0, continuations + 1, rng.integers(1, 40)) / continuations).tolist()
    for _ in range(500)
  ]
  stated = table_of(rollouts, continuations=continuations)
  assert stated.scores.size == 0 and table_of(rollouts).correct.max() == 0
  table = table_of(rollouts).statistics()
  assert table.n.tolist() == stated.statistics().n.tolist()
  for column in ("n_pos", "score_sum", "spread_sum"):
    assert (getattr(table, column) == getattr(stated.statistics(), column)).all()
  for row, rollout in enumerate(rollouts):
    score_sum = spread_sum = 0.0
    for s in rollout:
      score_sum += s if s > 0 else 0.0
      spread_sum += s * (1.0 - s)
    assert (table.score_sum[row], table.spread_sum[row]) == (score_sum, spread_sum)


def checksum(table):
  return table.row_hash_sum(table.statistics())


def test_tau_moves_the_positive_steps():
  table = table_of([[1 / 16, 1 / 8, 1.0]])
  s = table.statistics(tau=1 / 8)
  assert (s.n_pos[0], s.score_sum[0], s.n[0]) == (1, 1.0, 3)
  assert table.statistics().n_pos[0] == 3


def test_unmeasured_steps_count_as_negative_or_not_at_all():
  rollouts = [[1.0, None], [None, None], [0.5]]
  table = table_of(rollouts)
  assert table.statistics().n.tolist() == [2, 2, 1]
  ignored = table.statistics(unmeasured="ignore")
  assert ignored.n.tolist() == [1, 0, 1]
  assert Rule("full", fraction=1.0, unmeasured="ignore").ranked(table, ignored).tolist() == [
    *(True, False, True)  # a rollout without a scored step is not scorable
  ]


def test_saved_table_comes_back_whole(tmp_path):
  table = table_of([[0.5], [0.25]], source=[0, 1], names=("a", "ü+"), digest="d")
  table.save(tmp_path / "table.npz")
  loaded = ScoreTable.load(tmp_path / "table.npz")
  assert loaded.source_names == ("a", "ü+")
  assert loaded.digest == "d" and loaded.scores.tolist() == [0.5, 0.25]
  assert checksum(loaded) == checksum(table)
  assert [p.name for p in tmp_path.iterdir()] == ["table.npz"]


@pytest.fixture(scope="module")
def mixed():
  """Counts of unequal totals, unmeasured steps, and scores without counts, in all orders."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 9, 50_000)
  totals = rng.choice([16, 8, 0, -1, 300], lengths.sum(), p=[0.7, 0.1, 0.1, 0.05, 0.05])
  scores = np.where(totals < 0, rng.random(totals.size), 0.0)
  scores = np.where(totals > 0, rng.integers(0, 1 << 20, totals.size) % (abs(totals) + 1), scores)
  scores /= np.maximum(totals, 1)
  where = {"source": np.zeros(lengths.size), "line": np.arange(lengths.size)}
  where["flags"] = np.full(lengths.size, STRICT_OK)
  table = table_from_steps(("a",), lengths=lengths, scores=scores, totals=totals, **where)
  return table, scores


@pytest.mark.parametrize("mapped", [False, True])
def test_ragged_steps_come_back_from_disk_and_from_slices(tmp_path, mixed, mapped, monkeypatch):
  table, scores = mixed
  assert table.total.dtype == np.uint16 and (table.mc_scores() == scores).all()
  if mapped:
    monkeypatch.setattr(score_table, "_MAPPED_BYTES", 0)
  table.save(tmp_path / "table.npz")
  loaded = ScoreTable.load(tmp_path / "table.npz")
  assert isinstance(loaded.correct.base.base, np.memmap) == mapped
  assert loaded.flags.strides == (0,), "one value"
  bounds = [0, 1, 16_383, 16_384, 40_001, 40_001, 50_000]
  parts = [loaded.take(slice(*pair)) for pair in itertools.pairwise(bounds)]
  assert (np.concatenate([part.mc_scores() for part in parts]) == scores).all()
  assert sum(map(checksum, parts)) % 2**64 == checksum(table)


def test_a_table_of_an_earlier_version_is_read_as_it_was(tmp_path):
  rng = np.random.default_rng(5)
  lengths = rng.integers(1, 6, 12)
  scores = rng.integers(0, 17, lengths.sum()) * rng.integers(0, 2, lengths.sum()) / 16
  new = table_from_steps(
    ("a", "b", "c"),
    lengths=lengths,
    scores=scores,
    totals=np.full(scores.size, 16),
    source=np.sort(rng.integers(0, 3, 12)),
    line=np.arange(12),
    flags=np.full(12, STRICT_OK | PAPER_OK),
    digest="corpus-1",
  )
  head = {"source_names": ["a", "b", "c"], "tau": 0.0, "unmeasured": "negative"}
  head |= {"digest": "corpus-1", "inputs": ""}
  names = ("source", "line", "flags", "rollout", "offset", "length")
  columns = {name: getattr(new, name) for name in names} | vars(new.statistics())
  np.savez(tmp_path / "table.npz", head=np.str_(json.dumps(head)), **columns)
  table = ScoreTable.load(tmp_path / "table.npz")
  rule = {"strategy": "bis", "fraction": 0.4}
  # The digest that the earlier version made of this table.
  expected = "e5d33f760be9a8f4f8287387d82e31dc7070bb728ad1c7610f991377e72beb4a"
  assert select(table, **rule).digest == select(new, **rule).digest == expected
  with pytest.raises(ScoreTableError, match="earlier version, with tau=0 .* delete it"):
    select(table, **rule, tau=0.5)
  with pytest.raises(ScoreTableError, match="without MC counts: delete it"):
    table.mc_scores()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"text"])
def test_a_file_that_is_no_table_is_named(tmp_path, content):
  (tmp_path / "table.npz").write_bytes(content)
  with pytest.raises(ScoreTableError, match="table.npz is not a score table"):
    ScoreTable.load(tmp_path / "table.npz")


def test_checksum_tells_tables_apart_and_adds_up_over_slices():
  table = table_of([[0.5], [0.25, 1.0], [0.0]], source=[0, 0, 1], names=("a", "b"))
  other = table_of([[0.5], [0.25, 0.5], [0.0]], source=[0, 0, 1], names=("a", "b"))
  moved = table_of([[0.5], [0.25, 1.0], [0.0]], source=[0, 1, 1], names=("a", "b"))
  assert len({checksum(table), checksum(other), checksum(moved)}) == 3
  parts = [table.take(slice(0, 1)), table.take(slice(1, 3))]
  assert sum(map(checksum, parts)) % 2**64 == checksum(table)


def test_rows_of_a_source_stand_together():
  table = table_of([[1.0]] * 4, source=[0, 0, 2, 2], line=[0, 1, 0, 5], names=("a", "b", "c"))
  assert [table.rows_of(i) for i in range(3)] == [slice(0, 2), slice(2, 2), slice(2, 4)]


def test_impossible_statistics_are_refused():
  with pytest.raises(ScoreTableError, match="a:0 has 40000 scored steps"):
    table_of([[1.0] * 40_000])
  with pytest.raises(ScoreTableError, match="'negative' or 'ignore'"):
    table_of([[1.0]]).statistics(unmeasured="skip")
  with pytest.raises(ScoreTableError, match="2 steps by their lengths, but 1 and 1 counts"):
    table_from_steps(("a",), lengths=np.array([2]), scores=[1.0], totals=[16])
