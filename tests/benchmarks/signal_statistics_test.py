"""Correlations, tenths and intervals against their definitions."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.study import signal_statistics


def test_a_resample_holds_whole_groups():
  group = np.array([5, 2, 5, 9, 2, 2, 7])
  drawn = list(signal_statistics.resamples(group, 50, seed=0))
  assert len(drawn) == 50
  for rows in drawn:
    count = np.bincount(rows, minlength=7)
    for members in (group == 2, group == 5):
      assert len(set(count[members])) == 1  # a group comes as often as each of its rollouts
    assert sum(count[first] for first in (0, 1, 3, 6)) == 4  # as many groups as there are
  assert np.mean([len(rows) for rows in drawn]) == pytest.approx(7, rel=0.1)


def test_rank_correlations_are_spearmans():
  rng = np.random.default_rng(0)
  predictor = rng.integers(0, 4, 300).astype(float)  # many ties
  measure = predictor + rng.normal(size=300)
  found = signal_statistics.rank_correlations(
    {"square": measure, "aligned": -measure}, {"p": predictor}, np.arange(300), draws=100
  )
  expected = stats.spearmanr(measure, predictor).statistic
  assert found["square"]["p"]["value"] == pytest.approx(expected)
  assert found["aligned"]["p"]["value"] == pytest.approx(-expected)
  low, high = found["square"]["p"]["interval"]
  assert low < expected < high and 0.05 < high - low < 0.3


def test_tenths_are_equal_in_size_and_in_order():
  score = np.array([0.0] * 35 + list(range(1, 66)))
  tenth = signal_statistics.tenths(score)
  assert np.bincount(tenth).tolist() == [10] * 10
  assert (tenth[score == 0] <= 3).all() and (tenth[65:] == np.sort(tenth[65:])).all()
  assert len(set(tenth[:35])) == 4 and tenth[:10].std() > 0  # ties are spread at random


def test_signal_to_noise_by_bin():
  rng = np.random.default_rng(0)
  bins = np.repeat([0, 1, 2], [400, 400, 5])
  aligned = rng.normal(size=805) + np.array([0.0, 2.0, 0.0])[bins]
  none, strong, few = signal_statistics.signal_to_noise(aligned, bins, 3, np.arange(805))
  assert strong["snr"] == pytest.approx(aligned[400:800].mean() / aligned[400:800].std())
  assert strong["interval"][0] < 2 < strong["interval"][1]
  assert none["interval"][0] < 0 < none["interval"][1]
  assert few["snr"] is None and few["rollouts"] == 5
