"""Rows have streams where that pays, and every example still fits."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from bis_jax.errors import UserError
from bis_jax.inputs import layout, pack

INPUTS = dict(
  row_tokens=2048, row_patches=4096, row_markers=128, lookahead=64, row_streams=-1, stream_tokens=0
)


def costs_of(sizes, prefix=175, own=135, patches=512):
  """Groups of these sizes; lengths vary by a third."""
  rng = np.random.default_rng(0)
  groups = np.repeat(np.arange(len(sizes)), sizes)
  prefixes = rng.integers(prefix * 2 // 3, prefix * 4 // 3, len(sizes))[groups]
  lengths = prefixes + rng.integers(own * 2 // 3, own * 4 // 3, len(groups))
  costs = np.stack([lengths, np.full(len(groups), patches), np.full(len(groups), 4)], axis=1)
  return layout.Costs(costs, prefixes, groups)


def choose(costs, **options):
  keys = {key: options.pop(key) for key in [*options] if key in INPUTS}
  return layout.choose(costs, ConfigDict(INPUTS | keys), 64, **options)


def test_groups_of_three_are_shared_and_save_what_is_said():
  costs = costs_of([3] * 200)
  rows, saved = choose(costs)
  assert rows.streams[0] >= 3 and 0.2 < saved < 0.6
  assert rows.budgets[1] < 0.6 * INPUTS["row_patches"]  # images are there once
  options = dict(prefixes=costs.prefixes, groups=costs.groups)
  shared, alone = (
    pack.plan(costs.costs, *each, **options)
    for each in (rows, pack.Layout(pack.row_budgets(ConfigDict(INPUTS))))
  )
  assert not shared.too_long and len(shared) < 0.8 * len(alone)


def test_a_tenth_by_bis_keeps_its_rows():
  """1.15 rollouts per group."""
  rows, saved = choose(costs_of([2] * 15 + [1] * 100))
  assert rows.streams == (0, 0) and saved < 0.1
  assert rows.budgets.tolist() == [2048, 4096, 128]
  assert choose(costs_of([3] * 9), row_streams=0)[0].streams == (0, 0)
  assert choose(costs_of([1]))[0].streams == (0, 0)


def test_the_longest_example_fits_or_the_keys_are_named():
  """Mutation caught: rows whose streams are too short for one rollout, which is left out."""
  costs = costs_of([3] * 60)
  costs.costs[7, 0] = 1500
  rows, _ = choose(costs)
  assert rows.largest[0] >= 1500
  costs.costs[7, 0] = 2040
  assert choose(costs)[0].streams == (0, 0)
  with pytest.raises(UserError, match="row_streams is 4, but the longest rollout has 2040 tokens"):
    choose(costs, row_streams=4)
  costs.costs[7, 0] = 9999  # fits no row at all
  assert choose(costs)[0].streams[0]


def test_what_is_asked_for_is_used():
  rows, _ = choose(costs_of([2] * 15 + [1] * 100), row_streams=2, stream_tokens=600)
  assert rows.streams == (2, 600) and rows.prefix_tokens == 848
  assert rows.budgets.tolist() == [2048, 4096, 128]
  rows, _ = choose(costs_of([3] * 50), row_streams=3)
  assert rows.streams[0] == 3


def test_a_scorer_keeps_its_compiled_layouts():
  first, _ = choose(costs_of([16] * 20), totals=(1, 2, 4))
  assert first.streams[0] >= 8
  again, _ = choose(costs_of([15, 16, 14] * 9), totals=(1, 2, 4), known=[first])
  assert again is first


def test_a_server_uses_only_the_rows_that_it_compiled():
  """Requests for one question share them, others do not, and large ones fit rows without."""
  (rows,) = layout.ahead(ConfigDict(INPUTS), 64)
  assert rows.streams == (8, 192) and rows.budgets.tolist() == [2048, 2048, 128]
  options = dict(totals=(1, 2), known=[rows], only_known=True)
  assert choose(costs_of([16, 16]), **options)[0] is rows
  assert choose(costs_of([1] * 20), **options)[0].streams == (0, 0)
  large = costs_of([8, 8])
  large.costs[0, 0] = 900
  assert choose(large, **options)[0].streams == (0, 0)
  assert layout.ahead(ConfigDict(INPUTS | {"row_tokens": 256}), 64) == []
