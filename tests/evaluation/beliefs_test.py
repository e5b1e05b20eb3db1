"""Best-of-N that weighs step scores by their concentrations."""

import json

import numpy as np
import pytest

from bis_jax.evaluation import beliefs, best_of_n
from bis_jax.evaluation.json_records import EvaluationError

SURE, UNSURE = 500.0, 0.5


def write(path, rows):
  """Questions with candidates (correct, score of each step, concentration of each step)."""
  lines = []
  for at, row in enumerate(rows):
    candidates = [
      {"correct": correct, "answer": str(k), "scores": scores, "concentrations": concentrations}
      for k, (correct, scores, concentrations) in enumerate(row)
    ]
    lines.append(json.dumps({"id": at, "candidates": candidates}))
  path.write_text("\n".join(lines))
  return str(path)


def test_an_unreliable_high_score_loses_to_a_reliable_lower_one(tmp_path):
  row = [(False, [0.9, 0.9], [UNSURE, UNSURE]), (True, [0.8, 0.85], [SURE, SURE])]
  report = best_of_n.evaluate(best_of_n.load(write(tmp_path / "x.jsonl", [row])))
  assert report["curve"]["min"]["values"] == [0, 0]
  assert report["curve"]["lower_bound"]["values"] == [0, 1]


def test_lower_bounds_are_means_less_a_standard_deviation_of_the_beta():
  mu, kappa = np.array([0.5, 0.9]), np.array([3.0, 8.0])
  got = beliefs.lower_bounds([[mu, None]], [[kappa, None]])
  assert got[0, 0] == pytest.approx(min(0.5 - 0.25, 0.9 - 0.1)) and np.isnan(got[0, 1])


def test_sampling_stops_at_the_first_reliable_candidate():
  values = np.array([[0.2, 0.85, 0.9], [0.95, 0.1, 0.1], [0.2, 0.35, np.nan]])
  correct = np.array([[False, True, False], [True, True, False], [True, False, True]])
  report = {row["threshold"]: row for row in beliefs.stopping(values, correct)}
  assert report[0.8]["candidates"] == pytest.approx((2 + 1 + 3) / 3)
  assert report[0.8]["correct"] == pytest.approx(2 / 3)  # second, first, second of three
  assert report[0.9]["candidates"] == pytest.approx((3 + 1 + 3) / 3)
  assert report[0.9]["correct"] == pytest.approx(1 / 3)
  assert report[0.3]["candidates"] == pytest.approx((2 + 1 + 2) / 3)


def test_concentrations_are_all_or_none(tmp_path):
  path = write(tmp_path / "x.jsonl", [[(True, [0.9, 0.8], [SURE])]])
  with pytest.raises(EvaluationError, match="candidate 0 has 1 `concentrations` for 2 `scores`"):
    best_of_n.load(path)
