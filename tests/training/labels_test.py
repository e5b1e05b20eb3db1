"""Labels against their definitions."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from bis_jax.training.labels import step_labels

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
