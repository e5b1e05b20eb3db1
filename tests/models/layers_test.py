"""Rematerialization changes which activations are saved, and where, but no gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bis_jax.models.layers import _MLP, REMATS, Linear, projection, rematerialized, scan, stack
from bis_jax.models.qwen2_5_vl.config import SIZES
from bis_jax.parallel.sharding import P, make_mesh


def _loss(kernels, x, remat):
  def layer(kernel, x):
    hidden = jnp.tanh(checkpoint_name(x @ kernel, _MLP))
    return jnp.tanh(projection(hidden @ kernel)) @ kernel

  apply = rematerialized(layer, remat)
  return jax.lax.scan(lambda x, kernel: (apply(kernel, x), None), x, kernels)[0].sum()


@pytest.fixture
def arrays():
  return jax.random.normal(jax.random.key(0), (3, 8, 8)), jnp.ones((4, 8))


@pytest.mark.parametrize("remat", [*REMATS, "auto"])
def test_gradients_are_the_same(arrays, remat):
  grad = jax.jit(jax.grad(_loss), static_argnums=2)
  np.testing.assert_allclose(grad(*arrays, remat), grad(*arrays, "none"), rtol=1e-4)


def test_what_is_kept(arrays):
  """A layer has three products, of which no backward pass needs the last."""

  def count(remat, word):
    return str(jax.make_jaxpr(jax.grad(_loss), static_argnums=2)(*arrays, remat)).count(word)

  products = {remat: count(remat, "dot_general") - 9 for remat in REMATS}
  assert products == {"full": 2, "offload": 0, "attention": 1, "mlp": 1, "dots": 0, "none": 0}
  assert {remat for remat in products if count(remat, "Host")} == {"offload"}


def test_kernels_are_cast_before_the_loop_with_the_same_numbers():
  """In bfloat16 to the bit, as products cast their kernels; on eight devices up to sums' order."""
  config = dataclasses.replace(SIZES["tiny"], dtype="bfloat16")
  layers = stack(lambda rngs: Linear(64, 64, config, rngs, use_bias=True), 3, nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (8, 4, 64), jnp.bfloat16)

  def apply(layer, x):
    return jnp.tanh(layer(x))

  def loss(layers, x, scan):
    return scan(apply, layers, x).astype(jnp.float32).sum()

  def plain(apply, layers, x):
    return jax.lax.scan(lambda x, layer: (apply(layer, x), None), x, layers)[0]

  grad = jax.jit(jax.grad(loss), static_argnums=2)
  assert "f32[3,64,64]" in str(jax.make_jaxpr(plain, static_argnums=0)(apply, layers, x))
  in_loop = str(jax.make_jaxpr(scan, static_argnums=0)(apply, layers, x)).split("scan[")[1]
  assert "bf16[3,64,64]" not in in_loop and "f32[64,64]" not in in_loop  # of its inner values
  alone = jax.tree.leaves(grad(layers, x, scan))
  for got, wanted in zip(alone, jax.tree.leaves(grad(layers, x, plain)), strict=True):
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, wanted)
  mesh = make_mesh(1, 8, 1)
  spread = jax.device_put(
    (layers, x),
    (
      jax.tree.map(lambda a: jax.NamedSharding(mesh, P(None, "fsdp")), layers),
      jax.NamedSharding(mesh, P("fsdp")),
    ),
  )
  with jax.set_mesh(mesh):
    for got, wanted in zip(jax.tree.leaves(grad(*spread, scan)), alone, strict=True):
      np.testing.assert_allclose(got, wanted, rtol=0.02, atol=0.02)
