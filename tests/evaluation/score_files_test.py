"""Scores as JSON lines: read back exactly, and every fault named with its line and item."""

import types

import numpy as np
import pytest

from bis_jax.evaluation import score_files
from bis_jax.evaluation.json_records import EvaluationError

ITEMS = [types.SimpleNamespace(steps=("a",) * n) for n in (2, 1, 3)]
GOOD = ['{"index": 1, "scores": [1]}', '{"index": 0, "scores": [0.5, 0]}']


def test_scores_come_back_bit_for_bit(tmp_path):
  rng = np.random.default_rng(0)
  scores = [rng.uniform(size=len(item.steps)) for item in ITEMS]
  scores[2] = scores[2].astype(np.float32)
  score_files.write_scores(tmp_path / "scores.jsonl", scores)
  back = score_files.read_scores(tmp_path / "scores.jsonl", ITEMS)
  for want, got in zip(scores, back, strict=True):
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"index": 2, "scores": [0, 0]}', "line 4: item 2 has 3 steps but 2 scores"),
    ('{"index": 2, "scores": []}', "line 4: item 2 has 3 steps but 0 scores"),
    ('{"index": 1, "scores": [1]}', "line 4: item 1 was scored before"),
    ('{"index": 3, "scores": [1]}', "line 4: `index` is 3; it must be an item's, 0 to 2"),
    ('{"index": true, "scores": [1]}', r"line 4: Expected `int`, got `bool` - at `\$.index`"),
    ('{"scores": [1]}', "missing required field `index`"),
    (
      '{"index": 2, "scores": [0, 1, 1.01]}',
      r"line 4: Expected `float` <= 1.0 - at `\$.scores\[2\]`",
    ),
    ('{"index": 2, "scores": [0, 1, NaN]}', r"at `\$.scores\[2\]`"),
    ('{"index": 2, "scores": [0, 1, "1"]}', r"got `str` - at `\$.scores\[2\]`"),
    ('{"index": 2, "scores": {}}', r"got `object` - at `\$.scores`"),
    ('{"index": 2, "score": [1, 1, 1]}', "unknown key `score`; the nearest known key is `scores`"),
    ("[2]", "line 4: Expected `object`, got `array`"),
    ("{", "line 4 is not valid JSON"),
    ("", "no scores for 1 of 3 items: 2"),
  ],
)
def test_a_fault_is_named(tmp_path, line, message):
  (tmp_path / "s").write_text("\n".join([GOOD[0], "", GOOD[1], line]))
  with pytest.raises(EvaluationError, match=message):
    score_files.read_scores(tmp_path / "s", ITEMS)


def test_held_out_rollouts_are_read_with_their_labels(tmp_path):
  (tmp_path / "dev").write_text(
    '{"scores": [0.9, 0.5], "labels": [1, 0], "data_source": "b"}\n'
    '{"scores": [0.1], "labels": [-1], "data_source": "a"}\n'
  )
  steps = score_files.read_held_out(tmp_path / "dev")
  assert steps.labels.tolist() == [1, -1]
  assert steps.scores.tolist() == [0.9, 0.1]
  assert steps.group_names == ("b", "a")


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (
      '{"scores": [1], "labels": [2], "data_source": "a"}',
      r"line 1: Expected `int` <= 1 - at `\$.labels\[0\]`",
    ),
    ('{"scores": [1], "labels": [1, 1], "data_source": "a"}', "line 1: 2 labels but 1 scores"),
    ('{"scores": [1], "labels": [1]}', "line 1: .*field `data_source`"),
    (
      '{"scores": [1], "labels": [1], "data_sources": "a"}',
      "line 1: unknown key `data_sources`; the nearest known key is `data_source`",
    ),
    ("", "holds no rollout"),
  ],
)
def test_a_fault_among_held_out_rollouts_is_named(tmp_path, line, message):
  (tmp_path / "dev").write_text(line)
  with pytest.raises(EvaluationError, match=message):
    score_files.read_held_out(tmp_path / "dev")
