"""Rematerialization changes which activations are saved, and where, but no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bis_jax.models.layers import rematerialized


def _loss(kernels, x, remat):
  def layer(kernel, x):
    return jnp.tanh(x @ kernel) @ kernel

  apply = rematerialized(layer, remat)
  return jax.lax.scan(lambda x, kernel: (apply(kernel, x), None), x, kernels)[0].sum()


@pytest.fixture
def arrays():
  return jax.random.normal(jax.random.key(0), (3, 8, 8)), jnp.ones((4, 8))


@pytest.mark.parametrize("remat", ["dots", "offload", "full"])
def test_gradients_are_the_same(arrays, remat):
  grad = jax.jit(jax.grad(_loss), static_argnums=2)
  np.testing.assert_allclose(grad(*arrays, remat), grad(*arrays, "none"), rtol=1e-4)


def test_what_is_kept(arrays):
  """Products are recomputed with "full" alone, and leave the device with "offload" alone."""

  def count(remat, word):
    return str(jax.make_jaxpr(jax.grad(_loss), static_argnums=2)(*arrays, remat)).count(word)

  products = {remat: count(remat, "dot_general") for remat in ("none", "dots", "offload", "full")}
  assert products["none"] == products["dots"] == products["offload"] < products["full"]
  assert [count(remat, "Host") > 0 for remat in products] == [False, False, True, False]
