"""The loss against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats

from bis_jax.models.reward_model import belief
from bis_jax.training.train_step import belief_loss, marker_loss, next_token_loss


def test_loss_is_the_cross_entropy_of_labelled_markers_only():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 5, 2)).astype(np.float32)
  target = rng.uniform(size=(3, 5)).astype(np.float32)
  weight = (rng.uniform(size=(3, 5)) < 0.5).astype(np.float32)
  p = np.exp(logits[..., 0]) / np.exp(logits).sum(-1)
  wanted = -(target * np.log(p) + (1 - target) * np.log(1 - p)) * weight
  got = marker_loss(jnp.asarray(logits), jnp.asarray(target), jnp.asarray(weight))
  np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_the_first_logit_is_the_positive_one():
  logits = jnp.asarray([[[5.0, -5.0]]])
  one = jnp.ones((1, 1))
  assert marker_loss(logits, one, one)[0, 0] < 0.01 < marker_loss(logits, 0 * one, one)[0, 0]


def test_an_unused_marker_adds_nothing_even_where_its_logits_are_not_finite():
  logits = jnp.asarray([[[jnp.nan, 1.0], [1.0, 2.0]]])
  loss = marker_loss(logits, jnp.ones((1, 2)), jnp.asarray([[0.0, 1.0]]))
  assert loss[0, 0] == 0 and jnp.isfinite(loss[0, 1])


def test_next_token_loss_is_that_of_the_next_token_of_the_same_segment():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 7, 5)).astype(np.float32)
  tokens = rng.integers(0, 5, (2, 7)).astype(np.int32)
  segment = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]], np.int32)
  is_image = np.zeros((2, 7), bool)
  is_image[1, 2:4] = True
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  predicted = [
    (0, 1),
    (0, 2),
    (0, 4),
    (1, 1),
    (1, 4),
    (1, 5),
    (1, 6),
  ]  # (row, token): all that count
  wanted = -np.mean([log_p[b, t - 1, tokens[b, t]] for b, t in predicted])
  got = next_token_loss(*map(jnp.asarray, (logits, tokens, segment, is_image)))
  np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_next_token_loss_of_an_empty_row_is_zero():
  nothing = jnp.zeros((1, 4), jnp.int32)
  assert next_token_loss(jnp.zeros((1, 4, 3)), nothing, nothing, nothing > 0) == 0


def test_the_belief_loss_is_the_beta_binomial_likelihood():
  """Against scipy; N of 0 is no label, and N of 1 the cross-entropy of the mean."""
  draw = np.random.default_rng(0)
  logits = draw.normal(0, 2, (4, 8, 2)).astype(np.float32)
  count = np.where(draw.random((4, 8)) < 0.2, 0, draw.integers(1, 17, (4, 8))).astype(np.float32)
  right = np.floor(draw.random((4, 8)) * (count + 1)).astype(np.float32)
  target = right / np.maximum(count, 1)
  mean, concentration = (np.asarray(x, np.float64) for x in belief(jnp.asarray(logits)))
  np.testing.assert_allclose(mean, scipy.special.softmax(logits, -1)[..., 0], rtol=1e-5)
  wanted = -scipy.stats.betabinom.logpmf(
    right, count, mean * concentration, (1 - mean) * concentration
  )
  got = belief_loss(jnp.asarray(logits), jnp.asarray(target), jnp.asarray(count))
  np.testing.assert_allclose(got, np.where(count > 0, wanted, 0), rtol=2e-4, atol=2e-5)
  one = belief_loss(jnp.asarray(logits), jnp.ones((4, 8)), jnp.ones((4, 8)))
  np.testing.assert_allclose(one, -np.log(mean), rtol=2e-4, atol=2e-5)


def test_the_concentration_is_learned_from_the_spread_of_counts():
  """Counts of one mean, half of them as a Binomial draws them and half of them all or nothing."""
  draw = np.random.default_rng(1)
  steady = draw.binomial(16, 0.5, 400) / 16
  wild = draw.binomial(1, 0.5, 400).astype(np.float64)
  target = jnp.asarray(np.stack([steady, wild]), jnp.float32)

  def loss(logits_R2):
    spread = jnp.broadcast_to(logits_R2[:, None], (2, 400, 2))
    return belief_loss(spread, target, jnp.full((2, 400), 16.0)).mean()

  logits = jnp.zeros((2, 2))
  step = jax.jit(jax.grad(loss))
  for _ in range(300):
    logits -= 0.5 * step(logits)
  mean, concentration = belief(logits)
  np.testing.assert_allclose(mean, 0.5, atol=0.05)
  assert concentration[0] > 4 > 0.5 > concentration[1]
