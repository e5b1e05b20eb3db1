"""The statistics of a rollout are exact, survive the disk, and add up over slices."""

import numpy as np
import pytest

from bis_jax.corpus.score_table import PAPER_OK, STRICT_OK, ScoreTable, ScoreTableError


def table_of(rollouts, *, source=None, line=None, names=("a",), **rest):
  """A table of rollouts given as lists of MC scores; None is a step without continuations."""
  steps = [s for rollout in rollouts for s in rollout]
  rows = len(rollouts)
  return ScoreTable.from_steps(
    names,
    source=np.zeros(rows, int) if source is None else np.array(source),
    line=np.arange(rows) if line is None else np.array(line),
    lengths=np.array([len(r) for r in rollouts], int),
    scores=np.array([s or 0.0 for s in steps], float),
    measured=np.array([s is not None for s in steps], bool),
    flags=np.full(rows, STRICT_OK | PAPER_OK),
    **rest,
  )


def test_statistics_of_literal_rollouts():
  table = table_of([[1 / 16, 1 / 2], [0.0, 1 / 4, 1.0], [0.0]])
  assert table.n.tolist() == [2, 3, 1]
  assert table.n_pos.tolist() == [2, 2, 0]
  assert table.score_sum.tolist() == [9 / 16, 5 / 4, 0.0]
  assert table.spread_sum.tolist() == [15 / 256 + 1 / 4, 3 / 16, 0.0]
  assert (table.n.dtype, table.score_sum.dtype) == (np.int16, np.float64)


@pytest.mark.parametrize("continuations", [4, 7, 8, 10, 16, 64])
def test_sums_are_those_of_a_plain_loop_bit_for_bit(continuations):
  rng = np.random.default_rng(continuations)
  rollouts = [
    (rng.integers(0, continuations + 1, rng.integers(1, 40)) / continuations).tolist()
    for _ in range(500)
  ]
  table = table_of(rollouts)
  for row, rollout in enumerate(rollouts):
    score_sum = spread_sum = 0.0
    for s in rollout:
      score_sum += s if s > 0 else 0.0
      spread_sum += s * (1.0 - s)
    assert (table.score_sum[row], table.spread_sum[row]) == (score_sum, spread_sum)


def test_tau_moves_the_positive_steps():
  table = table_of([[1 / 16, 1 / 8, 1.0]], tau=1 / 8)
  assert (table.n_pos[0], table.score_sum[0], table.n[0]) == (1, 1.0, 3)


def test_unmeasured_steps_count_as_negative_or_not_at_all():
  rollouts = [[1.0, None], [None, None], [0.5]]
  negative = table_of(rollouts)
  assert negative.n.tolist() == [2, 2, 1]
  ignored = table_of(rollouts, unmeasured="ignore")
  assert ignored.n.tolist() == [1, 1]
  assert ignored.line.tolist() == [0, 2], "a rollout without a scored step is not scorable"


def test_saved_table_comes_back_whole(tmp_path):
  table = table_of([[0.5], [0.25]], source=[0, 1], names=("a", "ü+"), tau=0.1, digest="d")
  table.save(tmp_path / "table.npz")
  loaded = ScoreTable.load(tmp_path / "table.npz")
  assert loaded.source_names == ("a", "ü+")
  assert (loaded.tau, loaded.unmeasured, loaded.digest) == (0.1, "negative", "d")
  assert loaded.checksum() == table.checksum()
  assert [p.name for p in tmp_path.iterdir()] == ["table.npz"]


def test_slices_of_a_saved_table_make_up_the_whole(tmp_path):
  table = table_of([[i / 16] for i in range(11)], line=[*range(3, 14)], offset=np.arange(11) * 10)
  table.save(tmp_path / "table.npz")
  for parts in (1, 2, 4, 13):
    slices = [ScoreTable.load(tmp_path / "table.npz", part=(i, parts)) for i in range(parts)]
    assert max(map(len, slices)) - min(map(len, slices)) <= 1
    whole = ScoreTable.concatenate(slices)
    assert whole.checksum() == table.checksum()
    assert whole.offset.tolist() == table.offset.tolist()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"text"])
def test_a_file_that_is_no_table_is_named(tmp_path, content):
  (tmp_path / "table.npz").write_bytes(content)
  with pytest.raises(ScoreTableError, match="table.npz is not a score table"):
    ScoreTable.load(tmp_path / "table.npz")


def test_checksum_tells_tables_apart_and_adds_up_over_slices():
  table = table_of([[0.5], [0.25, 1.0], [0.0]], source=[0, 0, 1], names=("a", "b"))
  other = table_of([[0.5], [0.25, 0.5], [0.0]], source=[0, 0, 1], names=("a", "b"))
  moved = table_of([[0.5], [0.25, 1.0], [0.0]], source=[0, 1, 1], names=("a", "b"))
  assert len({table.checksum(), other.checksum(), moved.checksum()}) == 3
  parts = [table.take(slice(0, 1)), table.take(slice(1, 3))]
  assert sum(p.row_hash_sum() for p in parts) % 2**64 == table.row_hash_sum()


def test_rows_of_a_source_stand_together():
  table = table_of([[1.0]] * 4, source=[0, 0, 2, 2], line=[0, 1, 0, 5], names=("a", "b", "c"))
  assert [table.rows_of(i) for i in range(3)] == [slice(0, 2), slice(2, 2), slice(2, 4)]


def test_impossible_statistics_are_refused():
  with pytest.raises(ScoreTableError, match="a:0 has 40000 scored steps"):
    table_of([[1.0] * 40_000])
  with pytest.raises(ScoreTableError, match="'negative' or 'ignore'"):
    table_of([[1.0]], unmeasured="skip")
