"""Selection on devices: 8 devices and 1, 2 or 4 processes give the manifest of one host, as the rule."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bis_jax.corpus import score_table
from bis_jax.corpus.score_table import ScoreTable
from bis_jax.errors import UserError
from bis_jax.selection import blocks, cut
from bis_jax.selection.rule import Rule, select
from bis_jax.selection.strategies import STRATEGIES
from tests.tables import table_from_steps
from tests.xla_flags import FAST_COMPILATION

RULES = [
  {"strategy": "bis", "fraction": 0.1},
  {"strategy": "bis", "fraction": 0.25, "alpha": 0.05, "order": "paper", "tau": 0.5},
  {"strategy": "random", "fraction": 0.1, "seed": 3},
  {"strategy": "mixed", "count": 700, "scope": "global"},
  {"strategy": "low_mc", "fraction": 0.9},
  {"strategy": "bis", "fraction": 0.1, "scope": "global", "unmeasured": "ignore"},
  {"strategy": "bis", "fraction": 0.1, "scope": "global", "reliability_if_no_positive": 0.0},
  {"strategy": "average_stepwise", "fraction": 0.3, "scope": "global", "order": "paper"},
]

WORKER = """
import json, sys
import jax
address, process, processes, path, rules = sys.argv[1:]
jax.distributed.initialize(address, int(processes), int(process))
from bis_jax.corpus.score_table import ScoreTable
from bis_jax.selection import cut
from bis_jax.selection.rule import select
cut.BLOCK = 1000
table = ScoreTable.load(path)
digests = [select(table, devices=True, **rule).digest for rule in json.loads(rules)]
print(json.dumps({"devices": jax.device_count(), "digests": digests}))
"""


@pytest.fixture(scope="module")
def tables(table_of):
  """Tables of the same shape: 8 continuations (some steps unmeasured), 7, and an unknown number."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 6, 5003)
  source = np.sort(rng.integers(0, 7, lengths.size))
  line = np.concatenate([np.arange(c) for c in np.bincount(source, minlength=7)])
  flags = rng.integers(0, 4, lengths.size)
  made = []
  for continuations in (8, 7, -1):
    counts = rng.integers(0, abs(continuations) + 1, lengths.sum())
    totals = np.where(rng.random(counts.size) < 0.1, 0, continuations) if continuations > 0 else -1
    scores = np.where(totals == 0, 0, counts / abs(continuations))
    scores = rng.random(counts.size).round(2) if continuations < 0 else scores
    columns = {"source": source, "line": line, "flags": flags}
    columns["group"] = rng.integers(1, 2000, lengths.size)
    columns["embedding"] = rng.normal(size=(lengths.size, 4))
    totals = np.broadcast_to(totals, counts.shape)
    made.append(
      table_from_steps(tuple("abcdefg"), lengths=lengths, scores=scores, totals=totals, **columns)
    )
  return made


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(cut, "BLOCK", 1000)


@pytest.mark.parametrize("processes", [2, 4])
def test_real_processes_agree_with_one_host(tmp_path, tables, processes):
  tables[0].save(tmp_path / "table.npz")
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {FAST_COMPILATION}"}
  started = [
    subprocess.Popen(
      [sys.executable, "-c", WORKER, address, str(i), str(processes)]
      + [str(tmp_path / "table.npz"), json.dumps(RULES)],
      env=env | {"PYTHONPATH": os.pathsep.join(sys.path)},
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(processes)
  ]
  answers = [json.loads(p.communicate(timeout=120)[0].splitlines()[-1]) for p in started]
  expected = [select(tables[0], **rule).digest for rule in RULES]
  assert len(set(expected)) == len(RULES)
  for answer in answers:
    assert answer["digests"] == expected
    assert answer["devices"] == 2 * processes


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_over_eight_devices(tables, strategy):
  assert jax.device_count() == 8
  for table in tables:
    for scope in ("per_source", "global"):
      rule = {"strategy": strategy, "fraction": 0.2, "scope": scope, "unmeasured": "ignore"}
      assert select(table, devices=True, **rule).digest == select(table, **rule).digest


@pytest.mark.parametrize("strategy", ["bis", "average_stepwise", "bis_grouped", "semdedup"])
def test_a_mapped_table_too_long_to_hold_is_read_and_released_by_block(
  tables, strategy, tmp_path, monkeypatch
):
  rule = {"strategy": strategy, "fraction": 0.2, "scope": "global", "unmeasured": "ignore"}
  expected = [select(table, **rule).digest for table in tables]
  released = []
  monkeypatch.setattr(cut, "_HELD", 0)
  monkeypatch.setattr(score_table, "_MAPPED_BYTES", 0)
  monkeypatch.setattr(ScoreTable, "release", lambda table: released.append(len(table)))
  for table, digest in zip(tables, expected, strict=True):
    table.save(tmp_path / "table.npz")
    mapped = ScoreTable.load(tmp_path / "table.npz")
    assert isinstance(mapped.correct.base.base, np.memmap)
    assert select(mapped, **rule).digest == digest
  blocks = {"bis_grouped": 7, "semdedup": 1}.get(strategy, 6)
  assert released.count(len(tables[0])) >= 2 * blocks * len(tables), "in both passes"


@pytest.mark.parametrize(
  ("tau", "unmeasured"), [(0, "negative"), (0.3, "ignore"), (-1, "negative")]
)
def test_counts_of_the_devices_are_the_statistics_of_the_host(tables, tau, unmeasured):
  (table, *others) = tables
  assert [t.unit for t in tables] == [8, 0, 0]
  slices = [slice(0, 999), slice(999, 1998), slice(1998, 2000)]
  for block, found in blocks.read(table, slices, tau, unmeasured, table.unit):
    for name, column in vars(block.statistics(tau, unmeasured)).items():
      assert (getattr(found, name) == column).all(), name


def test_ties_across_devices_go_to_the_first_in_the_file(table_of):
  table = table_of([[1.0]] * 2100, continuations=16)  # one score in three blocks
  manifest = select(table, devices=True, strategy="bis", fraction=0.7)
  assert manifest.sources[0].lines.tolist() == list(range(1470))


@pytest.mark.parametrize("rows", [1, 9])
def test_a_table_of_fewer_rows_than_devices_or_a_few_more(table_of, rows):
  table = table_of([[i / 16, 0.0] for i in range(rows)], continuations=16)
  rule = {"strategy": "bis", "fraction": 0.5}
  assert select(table, devices=True, **rule).digest == select(table, **rule).digest


def test_the_device_program_holds_no_floating_point():
  block, column = jax.ShapeDtypeStruct((80, 4), np.uint8), jax.ShapeDtypeStruct((80,), np.int16)
  number = jax.ShapeDtypeStruct((), np.int32)
  text = blocks.count.lower(block, block, column, number, number, ignore=True).as_text()
  assert "f32" not in text and "f64" not in text


@settings(max_examples=30)
@given(
  st.lists(st.floats(allow_nan=False) | st.sampled_from([0.0, -0.0, 0.2, np.inf]), max_size=20)
)
def test_sort_keys_order_and_tie_as_the_scores_do(values):
  scores = np.array(values, float)
  keys = cut.sort_keys(scores)
  assert ((keys[:, None] < keys) == (scores[:, None] < scores)).all()
  assert ((keys[:, None] == keys) == (scores[:, None] == scores)).all()


def test_a_table_with_nothing_to_rank_is_refused(table_of):
  with pytest.raises(UserError, match="no rollout can be ranked in strict order"):
    select(table_of([[1.0]], flags=[0]), devices=True, strategy="bis", fraction=0.5)


def test_rollouts_tie_exactly_where_their_scores_do():
  ranks = cut.rank_table(Rule("bis", fraction=0.1), 8, 16)
  pure, all_right, half = ranks[5, 0, 0], ranks[6, 6, 96], ranks[8, 4, 32]
  assert pure == all_right
  assert half > pure
  assert ranks[0, 0, 0] == ranks[3, 2, 33] == -1
  assert cut.rank_table(Rule("bis", fraction=0.1), 8, 0) is None, "no counts"
  assert cut.rank_table(Rule("bis", fraction=0.1), 40_000, 16) is None, "too long"
