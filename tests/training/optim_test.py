"""The optimizer against torch's AdamW and its documentation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from bis_jax.training import optim
from configs import common


def _config(**changes):
  c = common.get_config().optim
  for key, value in changes.items():
    c[key] = value
  return c


def test_schedule_warms_up_then_falls_to_zero():
  schedule = optim.schedule(_config(learning_rate=2.0, warmup_fraction=0.1), steps=100)
  assert schedule(0) == 0
  assert schedule(5) == pytest.approx(1.0)
  assert schedule(10) == pytest.approx(2.0)
  assert schedule(55) == pytest.approx(1.0)
  assert schedule(100) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_few_steps_still_learns(steps):
  schedule = optim.schedule(_config(), steps)
  assert all(np.isfinite(schedule(step)) for step in range(steps + 1))


def test_one_matrix_follows_torch_adamw():
  c = _config(learning_rate=1e-2, warmup_fraction=0.0, weight_decay=0.1, clip=1e9)
  rng = np.random.default_rng(0)
  start = rng.normal(size=(4, 3)).astype(np.float32)
  gradients = rng.normal(size=(6, 4, 3)).astype(np.float32)
  rates = [float(optim.schedule(c, 6)(step)) for step in range(6)]

  theirs = torch.nn.Parameter(torch.tensor(start))
  adamw = torch.optim.AdamW([theirs], lr=1.0, betas=(c.b1, c.b2), eps=c.eps, weight_decay=0.1)
  params = {"layer.kernel": jnp.asarray(start)}
  optimizer = optim.optimizer(c, 6, {"layer.kernel": 1.0})
  state = optimizer.init(params)
  for rate, gradient in zip(rates, gradients, strict=True):
    adamw.param_groups[0]["lr"] = rate
    theirs.grad = torch.tensor(gradient)
    adamw.step()
    updates, state = optimizer.update({"layer.kernel": jnp.asarray(gradient)}, state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(params["layer.kernel"], theirs.detach(), rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_by_their_global_norm():
  c = _config(clip=1.0)
  factor = {"a.kernel": 1.0, "b.kernel": 1.0}
  optimizer = optim.optimizer(c, 10, factor)
  params = {path: jnp.zeros((2, 2)) for path in factor}
  state = optimizer.init(params)
  # Adam divides by the gradient's size, so look at its first moment: 0.1 x the clipped gradient.
  _, state = optimizer.update({path: jnp.full((2, 2), 100.0) for path in factor}, state, params)
  moments = [leaf for leaf in optax.tree.get(state, "mu").values()]
  assert optax.tree.norm(moments) == pytest.approx(0.1, rel=1e-5)


def test_factors_scale_and_only_matrices_decay():
  c = _config(weight_decay=0.5, warmup_fraction=0.0, learning_rate=1.0)
  factor = {"slow.kernel": 0.1, "fast.kernel": 1.0, "norm.scale": 1.0, "x.bias": 1.0}
  optimizer = optim.optimizer(c, 10, factor)
  params = {path: jnp.ones((2, 2)) for path in factor}
  state = optimizer.init(params)
  still = {path: jnp.zeros((2, 2)) for path in factor}
  _, state = optimizer.update(still, state, params)  # the first step's learning rate is 0
  updates, _ = optimizer.update(still, state, params)
  np.testing.assert_allclose(updates["slow.kernel"], 0.1 * updates["fast.kernel"], rtol=1e-6)
  assert (updates["fast.kernel"] < 0).all()
  assert (updates["norm.scale"] == 0).all() and (updates["x.bias"] == 0).all()


def test_second_moments_in_bfloat16_keep_their_mean():
  """With b2 = 0.999 each step changes them by less than bfloat16 resolves; they must not stand still."""
  c = _config(b2=0.999, warmup_fraction=0.0, second_moment_dtype="bfloat16", clip=1e9)
  params = {"a.kernel": jnp.zeros((64, 64))}
  rng = np.random.default_rng(0)
  gradients = [jnp.asarray(rng.normal(size=(64, 64)), jnp.float32) for _ in range(300)]

  def second_moments(c):
    optimizer = optim.optimizer(c, 300, {"a.kernel": 1.0})
    state = optimizer.init(params)

    @jax.jit
    def step(state, gradient):
      return optimizer.update({"a.kernel": gradient}, state, params)[1]

    for gradient in gradients:
      state = step(state, gradient)
    return optax.tree.get(state, "nu")["a.kernel"]

  rounded, exact = (
    second_moments(c),
    second_moments(_config(b2=0.999, warmup_fraction=0.0, clip=1e9)),
  )
  assert rounded.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
  ratio = rounded.astype(jnp.float32) / exact
  assert float(jnp.abs(ratio.mean() - 1)) < 0.005 and float(ratio.std()) < 0.1
