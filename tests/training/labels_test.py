"""Labels against their definitions."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from bis_jax.training.labels import step_labels, with_policy

SCORES = np.array([0.0, 1 / 16, 0.5, 9 / 16, 1.0])
MEASURED = np.array([False, True, True, True, True])


def _labels(kind: str) -> ConfigDict:
  return ConfigDict({"kind": kind, "band_low": 1 / 16, "band_high": 0.5})


@pytest.mark.parametrize(
  "kind, tau, targets, weights",
  [
    ("hard", 0.0, [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
    ("hard", 0.5, [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]),
    ("soft", 0.0, SCORES, [1, 1, 1, 1, 1]),
    ("banded", 0.0, [0, 0, 0, 1, 1], [1, 1, 0, 1, 1]),
  ],
)
def test_labels(kind, tau, targets, weights):
  got = step_labels(SCORES, MEASURED, _labels(kind), tau, "negative")
  np.testing.assert_array_equal(got[0], np.float32(targets))
  np.testing.assert_array_equal(got[1], np.float32(weights))


def test_the_truth_labels_every_step_whatever_its_score():
  truth = [1, 0, 1, 0, 1]
  for unmeasured in ("negative", "ignore"):
    targets, weights = step_labels(SCORES, MEASURED, _labels("truth"), 0.0, unmeasured, truth)
    assert (targets.tolist(), weights.tolist()) == (truth, [1] * 5)
    assert targets.dtype == weights.dtype == np.float32


def test_unmeasured_steps_can_be_ignored():
  _, weights = step_labels(SCORES, MEASURED, _labels("hard"), 0.0, "ignore")
  np.testing.assert_array_equal(weights, [0, 1, 1, 1, 1])


POLICIES = {"neutral": "by_score", "min_continuations": 0, "until_first_wrong": False}


@pytest.mark.parametrize(
  ("policy", "targets", "weights"),
  [
    ({}, [1, 1, 0, 1, 1], [1, 1, 1, 1, 1]),
    ({"neutral": "negative"}, [1, 0, 0, 1, 1], [1, 1, 1, 1, 1]),
    ({"neutral": "ignore"}, [1, 0, 0, 1, 1], [1, 0, 1, 1, 1]),
    ({"min_continuations": 8}, [1, 1, 0, 1, 1], [1, 1, 1, 0, 1]),
    ({"until_first_wrong": True}, [1, 1, 0, 1, 1], [1, 1, 1, 0, 0]),
    ({"until_first_wrong": True, "neutral": "negative"}, [1, 0, 0, 1, 1], [1, 1, 0, 0, 0]),
  ],
)
def test_policies(policy, targets, weights):
  """A measured step, a neutral one, a wrong one, one of few continuations, and 0.5 that is 8 of 16."""
  scores, counts = np.array([1.0, 0.5, 0.0, 1.0, 0.5]), np.array([16, -1, 16, 4, 16])
  hard = step_labels(scores, np.ones(5, bool), _labels("hard"), 0.0, "negative")
  got = with_policy(*hard, scores, counts, ConfigDict(POLICIES | policy))
  np.testing.assert_array_equal(got[0], np.float32(targets))
  np.testing.assert_array_equal(got[1], np.float32(weights))
  assert got[0].dtype == got[1].dtype == np.float32
