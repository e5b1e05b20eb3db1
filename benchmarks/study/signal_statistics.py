"""Rank correlations and signal-to-noise of rollout gradients, with bootstrap intervals.

Rollouts of one group (the same pictures) are not independent, so the bootstrap draws groups.
Array names end in their dims: M rollouts, K columns, G bins, I rollouts of a bootstrap draw.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from scipy import stats


def resamples(group_M: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
  """Yields `draws` times int64[I], the rollouts of groups drawn with replacement."""
  order_M = np.argsort(group_M, kind="stable")
  _, starts, counts = np.unique(group_M[order_M], return_index=True, return_counts=True)
  rng = np.random.default_rng(seed)
  for _ in range(draws):
    drawn = rng.integers(0, len(starts), len(starts))
    count = counts[drawn]
    first = np.repeat(starts[drawn] - (np.cumsum(count) - count), count)
    yield order_M[first + np.arange(count.sum())]


def interval(
  statistic: Callable[[np.ndarray], np.ndarray], group_M: np.ndarray, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the 2.5th and 97.5th percentile of statistic(rollouts int64[I]); NaN if any draw is NaN."""
  values = np.stack([statistic(rows) for rows in resamples(group_M, draws, seed)])
  low, high = np.percentile(values, [2.5, 97.5], axis=0)
  return low, high


def rank_correlations(
  measures: Mapping[str, np.ndarray],
  predictors: Mapping[str, np.ndarray],
  group_M: np.ndarray,
  draws: int = 200,
  seed: int = 0,
) -> dict[str, dict[str, dict[str, float | list[float]]]]:
  """Returns Spearman's correlation of every measure with every predictor, float[M] each.

  {measure: {predictor: {"value": 0.4, "interval": [0.3, 0.5]}}} with 95 % intervals. Ties share their
  mean rank; the correlation of a constant is 0.
  """
  columns_MK = np.stack([*measures.values(), *predictors.values()], axis=1)

  def correlations(rows: np.ndarray) -> np.ndarray:
    ranks = stats.rankdata(columns_MK[rows], axis=0)
    ranks -= ranks.mean(axis=0, keepdims=True)
    length_K = np.linalg.norm(ranks, axis=0)
    ranks /= np.where(length_K > 0, length_K, 1.0)[None]
    return ranks[:, : len(measures)].T @ ranks[:, len(measures) :]

  value = correlations(np.arange(len(group_M)))
  low, high = interval(correlations, group_M, draws, seed)
  return {
    measure: {
      predictor: {"value": float(value[i, j]), "interval": [float(low[i, j]), float(high[i, j])]}
      for j, predictor in enumerate(predictors)
    }
    for i, measure in enumerate(measures)
  }


def tenths(score_M: np.ndarray, seed: int = 0) -> np.ndarray:
  """Returns int64[M], 0 (lowest) to 9: the tenth of each score; ties in random order."""
  shuffled = np.random.default_rng(seed).permutation(len(score_M))
  order = shuffled[np.argsort(score_M[shuffled], kind="stable")]
  tenth_M = np.empty(len(score_M), np.int64)
  tenth_M[order] = np.arange(len(score_M)) * 10 // len(score_M)
  return tenth_M


def signal_to_noise(
  aligned_M: np.ndarray,
  bin_M: np.ndarray,
  bins: int,
  group_M: np.ndarray,
  draws: int = 200,
  seed: int = 0,
) -> list[dict[str, float | int | list[float] | None]]:
  """Returns mean / deviation of `aligned_M` per bin, with its interval, mean and deviation.

  "snr" and "interval" are None for fewer than 20 rollouts or a deviation of 0.

  Args:
    aligned_M: component of every rollout's gradient along the teacher.
    bin_M: int[M], 0 .. bins - 1.
    bins: number of bins.
    group_M, draws, seed: of the bootstrap.
  """

  def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    count_G = np.bincount(bin_M[rows], minlength=bins)
    few_G = np.maximum(count_G, 1)
    mean_G = np.bincount(bin_M[rows], aligned_M[rows], bins) / few_G
    centred = aligned_M[rows] - mean_G[bin_M[rows]]
    return count_G, mean_G, np.sqrt(np.bincount(bin_M[rows], centred**2, bins) / few_G)

  def ratio(rows: np.ndarray) -> np.ndarray:
    _, mean_G, deviation_G = moments(rows)
    return np.divide(mean_G, deviation_G, out=np.full(bins, np.nan), where=deviation_G > 0)

  everyone = np.arange(len(aligned_M))
  count_G, mean_G, deviation_G = moments(everyone)
  snr_G = ratio(everyone)
  low_G, high_G = interval(ratio, group_M, draws, seed)
  enough_G = (count_G >= 20) & np.isfinite(low_G)
  return [
    {
      "rollouts": int(count_G[g]),
      "mean": float(mean_G[g]),
      "deviation": float(deviation_G[g]),
      "snr": float(snr_G[g]) if enough_G[g] else None,
      "interval": [float(low_G[g]), float(high_G[g])] if enough_G[g] else None,
    }
    for g in range(bins)
  ]
