"""Selection over slices of the table: 1, 2 and 4 real processes give the manifest of one host."""

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

from bis_jax.corpus.score_table import ScoreTable
from bis_jax.errors import UserError
from bis_jax.selection import distributed
from bis_jax.selection import rule as one_host
from bis_jax.selection.strategies import STRATEGIES

RULES = [
  {"strategy": "bis", "fraction": 0.1},
  {"strategy": "bis", "fraction": 0.25, "alpha": 0.05, "order": "paper"},
  {"strategy": "random", "fraction": 0.1, "seed": 3},
  {"strategy": "mixed", "count": 700, "scope": "global"},
  {"strategy": "low_mc", "fraction": 0.9},
  {"strategy": "bis", "fraction": 0.1, "scope": "global"},
  {"strategy": "bis", "fraction": 0.1, "scope": "global", "reliability_if_no_positive": 0.0},
  {"strategy": "average_stepwise", "fraction": 0.3, "scope": "global", "order": "paper"},
]

WORKER = """
import json, sys
import jax
address, process, processes, path, rules = sys.argv[1:]
jax.distributed.initialize(address, int(processes), int(process))
from bis_jax.corpus.score_table import ScoreTable
from bis_jax.selection import distributed
table = ScoreTable.load(path, part=(int(process), int(processes)))
digests = [distributed.select(table, **rule).digest for rule in json.loads(rules)]
print(json.dumps({"rows": len(table), "devices": jax.device_count(), "digests": digests}))
"""


@pytest.fixture(scope="module")
def table(table_of):
  rng = np.random.default_rng(0)
  rollouts = [(rng.integers(0, 9, rng.integers(1, 6)) / 8).tolist() for _ in range(5003)]
  source = np.sort(rng.integers(0, 7, len(rollouts)))
  line = np.concatenate([np.arange(c) for c in np.bincount(source, minlength=7)])
  flags = rng.integers(0, 4, len(rollouts))
  return table_of(rollouts, source=source, line=line, names=tuple("abcdefg"), flags=flags)


@pytest.mark.parametrize("processes", [3])  # slices of unequal length
def test_real_processes_agree_with_one_host(tmp_path, table, processes):
  table.save(tmp_path / "table.npz")
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
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
  expected = [one_host.select(table, **rule).digest for rule in RULES]
  assert len(set(expected)) == len(RULES)
  for answer in answers:
    assert answer["digests"] == expected
    assert answer["devices"] == 2 * processes
  assert sum(answer["rows"] for answer in answers) == len(table)
  assert max(answer["rows"] for answer in answers) <= len(table) // processes + 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_over_eight_devices(table, strategy):
  assert jax.device_count() == 8
  for scope in ("per_source", "global"):
    rule = {"strategy": strategy, "fraction": 0.2, "scope": scope}
    assert distributed.select(table, **rule).digest == one_host.select(table, **rule).digest


def test_ties_across_devices_go_to_the_first_in_the_file(table_of):
  table = table_of([[1.0]] * 100)  # one score; the eight devices hold 13 rows each
  manifest = distributed.select(table, strategy="bis", fraction=0.3)
  assert manifest.sources[0].lines.tolist() == list(range(30))


@pytest.mark.parametrize("rows", [1, 9])
def test_a_table_of_fewer_rows_than_devices_or_a_few_more(table_of, rows):
  table = table_of([[i / 16, 0.0] for i in range(rows)])
  rule = {"strategy": "bis", "fraction": 0.5}
  assert distributed.select(table, **rule).digest == one_host.select(table, **rule).digest


def test_the_device_program_holds_no_floating_point():
  rows, groups = jax.ShapeDtypeStruct((80,), np.uint32), jax.ShapeDtypeStruct((3,), np.int32)
  group = jax.ShapeDtypeStruct((80,), np.int32)
  program = distributed._jitted_find_cut(distributed._row_mesh()).lower(rows, rows, group, groups)
  assert "f32" not in program.as_text() and "f64" not in program.as_text()


@settings(max_examples=30, deadline=None)
@given(
  st.lists(st.floats(allow_nan=False) | st.sampled_from([0.0, -0.0, 0.2, np.inf]), max_size=20)
)
def test_sort_keys_order_and_tie_as_the_scores_do(values):
  scores = np.array(values, float)
  keys = distributed.sort_keys(scores)
  assert ((keys[:, None] < keys) == (scores[:, None] < scores)).all()
  assert ((keys[:, None] == keys) == (scores[:, None] == scores)).all()


def test_a_table_with_nothing_to_rank_is_refused(table_of):
  with pytest.raises(UserError, match="no rollout can be ranked in strict order"):
    distributed.select(table_of([[1.0]], flags=[0]), strategy="bis", fraction=0.5)


def test_slices_load_only_their_own_rows(tmp_path, table):
  table.save(tmp_path / "table.npz")
  part = ScoreTable.load(tmp_path / "table.npz", part=(1, 4))
  for column in (part.line, part.score_sum):
    kept = column.nbytes if column.base is None else memoryview(column.base).nbytes
    assert kept == column.nbytes, "a view of the whole column"
