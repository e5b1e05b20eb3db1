"""The closed forms at known values, and against a simulation of the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from benchmarks.study import closed_forms
from benchmarks.study import simulation as simulation
from bis_jax.selection import bis

SKILL, RECOVERY = (0.3, 0.6, 0.9, 0.97), (0.01, 0.03, 0.1, 0.2)
FEATURES = {"distance": 2.0, "width": 8}


@pytest.fixture(scope="module")
def simulated():
  settings = simulation.varied_settings(50)
  return settings, simulation.simulate(settings)


def test_closed_forms_agree_with_the_simulation_at_50_settings(simulated):
  deviations = simulation.deviations(*simulated)
  for name, z in deviations.items():
    beyond = int((np.abs(z) > 3).sum())
    print(f"{name}: {beyond} of {len(z)} beyond 3 standard errors, largest {np.abs(z).max():.2f}")
    assert len(z) == 50
    # Of 50 right forms one beyond 3 has probability 0.13, two 0.008; 4.5 is 3e-4 over all 50.
    assert beyond <= 1, (name, np.flatnonzero(np.abs(z) > 3))
    assert np.abs(z).max() < 4.5, (name, z)
    # All together: a small error everywhere, or standard errors of the wrong size, shows here.
    assert stats.chi2.ppf(0.001, 50) < (z**2).sum() < stats.chi2.ppf(0.999, 50), name
  assert min(estimate.rollouts for estimate in simulated[1]) > 300


@pytest.mark.parametrize(
  "wrong",
  [
    {"n_mc": lambda s: s.n_mc + 1},
    {"recovery": lambda s: (0.0,) * 4},
    {"distance": lambda s: 1.05 * s.distance},
    {"centre": lambda s: s.centre + 0.05},
    {"bias": lambda s: s.bias + 0.1},
    {"by_truth": lambda s: not s.by_truth},
  ],
  ids=lambda wrong: next(iter(wrong)),
)
def test_a_form_that_is_a_little_off_is_noticed(simulated, wrong):
  settings, estimates = simulated
  ((name, change),) = wrong.items()
  off = [setting._replace(**{name: change(setting)}) for setting in settings]
  deviations = simulation.deviations(off, estimates)
  assert max((z**2).sum() for z in deviations.values()) > stats.chi2.ppf(0.999, 50)


def test_the_simulation_is_a_function_of_the_setting_and_the_seed(simulated):
  settings, estimates = simulated
  assert simulation.simulate(settings[:2]) == estimates[:2]
  assert simulation.simulate(settings[:2], seed=1)[0] != estimates[0]


def test_dealt_rollouts_have_the_labels_that_they_are_conditioned_on():
  setting = simulation.varied_settings(1)[0]._replace(steps=5, positives=2)
  arrays = simulation.Setting(*(jnp.asarray(np.array(value)) for value in setting))

  @jax.jit
  def draw_and_deal():
    truth, label = simulation._draw_steps(jax.random.key(0), arrays)
    return truth, label, *simulation._deal(arrays, label)

  truth, label, step, there = draw_and_deal()
  dealt = np.asarray(label)[np.asarray(step)][np.asarray(there)][:, :5]
  assert len(dealt) > 500 and (dealt == [1, 1, 0, 0, 0]).all()
  used = np.asarray(step)[np.asarray(there)][:, :5]
  assert np.unique(used).size == used.size  # no step twice
  assert np.mean(np.asarray(truth)) == pytest.approx(setting.prior, abs=0.01)


def test_flip_rate_falls_with_the_mc_score():
  flip = closed_forms.flip_rate(16, 0.8, (0.3, 0.6, 0.9), (0.01, 0.1, 0.2))
  assert (np.diff(flip[1:]) < 0).all()
  assert flip[1] > 0.5 > 0.01 > flip[-1]  # pseudo-positives are the low ones
  # By hand: one continuation, P(wrong | success) = 0.2 * 0.1 / (0.2 * 0.1 + 0.8 * 0.5).
  assert closed_forms.flip_rate(1, 0.8, (0.5,), (0.1,)) == pytest.approx(
    [0.8 * 0.5 / (0.8 * 0.5 + 0.2 * 0.9), 0.02 / 0.42]
  )


def test_flips_are_the_mean_flip_rates():
  table = closed_forms.step_table(16, 0.7, SKILL, RECOVERY)
  rate = closed_forms.flip_rate(16, 0.7, SKILL, RECOVERY)
  law = 0.7 * closed_forms.count_law(16, SKILL) + 0.3 * closed_forms.count_law(16, RECOVERY)
  assert law.sum() == pytest.approx(1) and table.sum() == pytest.approx(1)
  positive, negative = closed_forms.flips(table)
  assert negative == pytest.approx(rate[0])
  assert positive == pytest.approx((law[1:] * rate[1:]).sum() / law[1:].sum())


@pytest.mark.parametrize(("centre", "offset"), [(0.0, 0.0), (0.8, 5.0)])
def test_absorbed_is_bias_only_at_the_mixture_whatever_the_offset(centre, offset):
  label = np.array([1, 1, 1, 0, 0, 1, 0, 1])
  tables = closed_forms.tables_of_labels(label, 0.2, 0.1)
  student = label.mean()
  expected = closed_forms.bias_only(
    tables, student=student, centre=centre, offset=offset, **FEATURES
  )
  found = closed_forms.absorbed(label.mean(), 8, 0.2, 0.1, **FEATURES)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("by_truth", [False, True])
def test_along_teacher_at_scale_0_is_bias_only(by_truth):
  steps = np.array([1, 0, 0, 1, 1])
  table = closed_forms.step_table(8, 0.7, SKILL, RECOVERY)
  tables = (
    closed_forms.tables_of_truth(steps, table)
    if by_truth
    else closed_forms.tables_of_labels(steps, *closed_forms.flips(table))
  )
  closed = closed_forms.bias_only(tables, student=0.7, centre=0.3, **FEATURES)
  bias = np.log(0.7 / 0.3)
  found = closed_forms.along_teacher(tables, bias=bias, scale=0.0, centre=0.3, **FEATURES)
  np.testing.assert_allclose(found, closed, rtol=1e-10)


def test_the_teacher_itself_has_nothing_to_learn_from_true_labels():
  prior, distance = 0.7, 2.0
  one = np.array([[1], [0]])  # a right step, a wrong step
  table = np.diag([1 - prior, prior])  # labels are the truth
  bias = np.log(prior / (1 - prior)) + distance**2 * (prior - 0.5)  # of x centred at the prior
  moments = closed_forms.along_teacher(
    closed_forms.tables_of_truth(one, table), bias=bias, scale=distance, centre=prior, **FEATURES
  )
  assert prior * moments.signal[0] + (1 - prior) * moments.signal[1] == pytest.approx(0, abs=1e-10)
  assert abs(moments.signal[0]) > 0.01


def test_signal_is_a_prior_part_and_a_contrast_part():
  label, s, centre = np.array([1, 1, 1, 0, 1]), 0.6, 0.25
  tables = closed_forms.tables_of_labels(label, 0.2, 0.1)
  p, zeta = label.mean(), np.where(label, 0.8, 0.1).mean()
  contrast = closed_forms.absorbed(p, 5, 0.2, 0.1, **FEATURES).signal
  found = closed_forms.bias_only(tables, student=s, centre=centre, **FEATURES).signal
  assert found == pytest.approx(2.0 * (p - s) * (zeta - centre) + contrast, rel=1e-12)


def test_a_pure_rollout_teaches_no_contrast_and_an_even_one_most():
  moments = closed_forms.absorbed(np.arange(9) / 8, 8, 0.1, 0.05, **FEATURES)
  for values in moments:
    assert values[0] == values[8] == 0
    assert values.argmax() == 4
  mix = closed_forms.absorbed(np.array([1, 2, 4]) / 8, 8, **FEATURES)
  np.testing.assert_allclose(mix.signal / mix.signal[0], [1, 12 / 7, 16 / 7])


def test_bis_is_the_signal_where_mc_scores_are_calibrated():
  counts = np.array([16, 4, 8, 0, 0, 12])  # of 16; flip rate 1 - MC score, no missed step
  label, score = counts > 0, counts / 16
  tables = closed_forms.tables_of_labels(label, 1 - score, 0.0)
  p = label.mean()
  signal = closed_forms.bias_only(tables, student=p, centre=0.4, offset=1.0, **FEATURES).signal
  score_sum = np.array([score.sum()])
  expected = bis.bis_scores(np.array([6]), np.array([4]), score_sum, alpha=0.0)[0]
  assert signal / 2.0 == pytest.approx(expected, rel=1e-12)


def test_information_is_the_squared_signal_to_noise():
  assert closed_forms.information(0.5, 8, 0.0, 0.0, distance=2.0) == pytest.approx(8 * 0.25 * 4)
  flipped = closed_forms.information(0.5, 8, 0.2, 0.1, distance=2.0)
  by_hand = 8 * 0.25 * 4 * 0.7**2 / (1 + 4 * (0.5 * 0.16 + 0.5 * 0.09))
  assert flipped == pytest.approx(by_hand)
  assert flipped == pytest.approx(closed_forms.absorbed(0.5, 8, 0.2, 0.1, **FEATURES).snr ** 2)
  assert closed_forms.information(np.array([0, 1]), 8, 0.2, 0.1, distance=2.0).tolist() == [0, 0]
