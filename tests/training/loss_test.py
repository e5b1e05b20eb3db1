"""The loss against its definition."""

import jax.numpy as jnp
import numpy as np

from bis_jax.training.train_step import marker_loss, next_token_loss


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
