"""Every measure against scikit-learn or a plain loop written from its definition."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from bis_jax.evaluation import step_metrics

EXACT = {"rtol": 0, "atol": 1e-12}
# Items as (source, [(label, score), ...]); scores from a small set make ties common.
STEP = st.tuples(st.sampled_from([1, -1, 0]), st.sampled_from([0, 0.25, 0.5, 0.75, 1]))
FINE_STEP = st.tuples(st.sampled_from([1, -1, 0]), st.floats(0, 1))
ITEMS = st.lists(
  st.tuples(st.sampled_from("abc"), st.lists(STEP | FINE_STEP, min_size=1, max_size=6)),
  min_size=1,
  max_size=12,
)


def scored(items):
  """ScoredSteps of items given as (source, [(label, score), ...])."""
  return step_metrics.scored_steps(
    [[label for label, _ in steps] for _, steps in items],
    [np.array([score for _, score in steps]) for _, steps in items],
    [source for source, _ in items],
  )


def group_counts(steps, threshold):
  return step_metrics.outcome_counts(steps, threshold).sum(0)


def labelled(items):
  """Lists (source, label, score) of the non-neutral steps."""
  return [(g, y, s) for g, steps in items for y, s in steps if y != 0]


@settings(max_examples=100)
@given(ITEMS, st.sampled_from([0, 0.5, 0.75, 1]))
def test_overall_measures_are_scikit_learns(items, threshold):
  flat = labelled(items)
  counts = group_counts(scored(items), threshold)
  got = step_metrics.overall_measures(counts)

  def macro(rows):
    labels, called = [y for _, y, _ in rows], [1 if s >= threshold else -1 for _, _, s in rows]
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      return sk.f1_score(labels, called, labels=[1, -1], average=None, zero_division=0.0)

  if not flat:
    assert all(value == 0 for value in got.values())
    return
  by_source = {g: [row for row in flat if row[0] == g] for g, _, _ in flat}
  of_source = {g: macro(rows).mean() for g, rows in by_source.items()}
  right = [(s >= threshold) == (y == 1) for _, y, s in flat]
  want = {
    "overall_source_weighted": sum(of_source[g] * len(by_source[g]) for g in by_source) / len(flat),
    "macro_f1_pooled": macro(flat).mean(),
    "macro_f1_source_mean": np.mean(list(of_source.values())),
    "accuracy": np.mean(right),
    "f1_correct": macro(flat)[0],
    "f1_error": macro(flat)[1],
  }
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(got[name], want[name], **EXACT, err_msg=name)


@settings(max_examples=100)
@given(ITEMS)
def test_ranking_measures_are_scikit_learns(items):
  steps = scored(items)
  tied = step_metrics.tied_counts(steps.labels, steps.scores)
  auc, precision = step_metrics.roc_auc(*tied), step_metrics.average_precision_error(*tied)
  if len(set(steps.labels)) == 2:
    np.testing.assert_allclose(auc, sk.roc_auc_score(steps.labels, steps.scores), **EXACT)
  else:
    assert np.isnan(auc)
  if -1 in steps.labels:
    want = sk.average_precision_score(steps.labels == -1, -steps.scores)
    np.testing.assert_allclose(precision, want, **EXACT)
  else:
    assert np.isnan(precision)


@settings(max_examples=100)
@given(ITEMS)
def test_calibration_is_the_definition(items):
  flat = [(y == 1, s) for _, y, s in labelled(items)]
  got = step_metrics.calibration_measures(step_metrics.calibration_sums(scored(items)).sum(0))
  if not flat:
    assert np.isnan(got["ece"]) and np.isnan(got["brier"])
    return
  bins = step_metrics.ECE_BINS
  gaps = 0.0
  for b in range(bins):
    last = b == bins - 1
    inside = [(y, s) for y, s in flat if b / bins <= s and (last or s < (b + 1) / bins)]
    gaps += abs(sum(y for y, _ in inside) - sum(s for _, s in inside))
  np.testing.assert_allclose(got["ece"], gaps / len(flat), **EXACT)
  want = sk.brier_score_loss([y for y, _ in flat], [s for _, s in flat], pos_label=True)
  np.testing.assert_allclose(got["brier"], want, **EXACT)


@settings(max_examples=100)
@given(ITEMS, st.sampled_from([0, 0.5, 1]))
def test_first_error_is_process_benchs(items, threshold):
  found, clean = [], []
  for _, steps in items:
    kept = [(y, s) for y, s in steps if y != 0]
    if not kept:
      continue
    truth = next((j for j, (y, _) in enumerate(kept) if y == -1), None)
    called = next((j for j, (_, s) in enumerate(kept) if s < threshold), None)
    (clean if truth is None else found).append(truth == called)
  on_error, on_clean = (sum(x) / len(x) if x else 0.0 for x in (found, clean))
  want = 2 * on_error * on_clean / (on_error + on_clean) if on_error + on_clean else 0.0
  counts = step_metrics.first_error_counts(scored(items), threshold).sum(0)
  got = step_metrics.first_error_measures(counts)
  np.testing.assert_allclose(got["first_error_f1"], want, **EXACT)
  np.testing.assert_allclose(got["first_error_accuracy_on_error"], on_error, **EXACT)
  np.testing.assert_allclose(got["first_error_accuracy_on_clean"], on_clean, **EXACT)


def tuned_by_loops(flat, at_most=1000):
  """The released rule in plain Python floats: (threshold, overall_source_weighted there)."""
  candidates = sorted({round(s, 4) for _, _, s in flat})
  if len(candidates) > at_most:
    candidates = candidates[:: len(candidates) // at_most]
  sources = list(dict.fromkeys(g for g, _, _ in flat))
  best = (-1.0, 0.5)
  for t in candidates:
    weighted, counted = 0.0, 0
    for source in sources:
      rows = [(y, s >= t) for g, y, s in flat if g == source]
      tp = sum(y == 1 and called for y, called in rows)
      tn = sum(y == -1 and not called for y, called in rows)
      wrong = len(rows) - tp - tn
      f1s = [2 * hit / (2 * hit + wrong) if hit + wrong else 0.0 for hit in (tp, tn)]
      weighted += sum(f1s) / 2.0 * len(rows)
      counted += len(rows)
    if weighted / counted > best[0]:
      best = (weighted / counted, t)
  return best[1], best[0]


@settings(max_examples=100)
@given(ITEMS)
def test_tuned_threshold_is_the_released_rules_to_the_last_bit(items):
  steps = scored(items)
  got = step_metrics.tune_threshold(steps)
  if not len(steps.labels):
    assert got == 0.5
    return
  want, best = tuned_by_loops(labelled(items))
  assert got == want
  counts = group_counts(steps, got)
  assert step_metrics.overall_measures(counts)["overall_source_weighted"] == best


def test_tuned_threshold_with_thinned_candidates_is_the_released_rules():
  rng = np.random.default_rng(3)
  items = []
  for i in range(450):
    labels = rng.choice([1, -1], 6)
    scores = np.clip(0.5 + 0.1 * labels + rng.normal(0, 0.2, 6), 0, 1)
    steps = list(zip(labels.tolist(), scores.tolist(), strict=True))
    items.append(("abcde"[i % 5], steps))
  assert len({round(s, 4) for _, _, s in labelled(items)}) > 2000
  steps = scored(items)
  assert step_metrics.tune_threshold(steps) == tuned_by_loops(labelled(items))[0]


@pytest.mark.parametrize(
  ("distinct", "kept"), [(999, 999), (1000, 1000), (1001, 1001), (1999, 1999), (2000, 1000)]
)
def test_candidates_are_thinned_by_a_constant_stride(distinct, kept):
  scores = np.arange(distinct) / 10_000
  candidates = step_metrics.candidate_thresholds(scores)
  assert len(candidates) == kept
  np.testing.assert_array_equal(candidates, scores[:: distinct // kept])


def test_candidates_are_rounded_as_decimals_are():
  # numpy multiplies by 10^4, rounds and divides, which gives another threshold here.
  score = 0.98765
  assert np.round(score, 4) != round(score, 4)
  assert step_metrics.candidate_thresholds(np.array([score])).tolist() == [round(score, 4)]


def test_a_threshold_calls_equal_scores_correct():
  steps = scored([("a", [(1, 0.5), (-1, 0.5)])])
  assert group_counts(steps, 0.5).tolist() == [[1, 1, 0, 0]]


def test_sources_stand_in_order_of_first_labelled_step():
  steps = scored([("c", [(0, 1.0)]), ("b", [(1, 1.0)]), ("a", [(-1, 0.0)]), ("c", [(1, 0.5)])])
  assert steps.group_names == ("b", "a", "c")
  assert steps.item.tolist() == [1, 2, 3]
  assert steps.group.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
  ("scores", "message"),
  [
    ([[0.1, 0.2], [0.3, 0.4]], r"item 1 has 1 labelled steps but scores of shape \(2,\)"),
    ([[0.1, 0.2], []], r"item 1 has 1 labelled steps but scores of shape \(0,\)"),
    ([[0.1], [0.2]], r"item 0 has 2 labelled steps"),
    ([[0.1, 0.2], [[0.3]]], r"item 1 .* shape \(1, 1\)"),
    ([[0.1, 0.2]], "2 items but 1 score arrays"),
    ([[0.1, 0.2], [1.5]], "item 1 has the score 1.5"),
    ([[0.1, float("nan")], [0.5]], "item 0 has the score nan"),
  ],
)
def test_scores_that_do_not_match_the_labels_name_the_item(scores, message):
  with pytest.raises(ValueError, match=message):
    step_metrics.scored_steps([[1, -1], [1]], [np.array(s) for s in scores], ["a", "b"])
