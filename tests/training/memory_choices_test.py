"""Settings that save memory: moments on the host, trained parameters in bfloat16 rounded at random."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from bis_jax.compilation import memory
from bis_jax.errors import UserError
from bis_jax.parallel.sharding import make_mesh
from bis_jax.training import checkpoint, optim, train_state
from configs import common, qwen_bis10


def test_updates_in_bfloat16_keep_their_mean():
  """Each is a hundredth of what bfloat16 resolves, so that to the nearest none would be seen.

  Mutations caught: rounding to the nearest, or at every step alike.
  """
  params = {"a.kernel": jnp.ones((64, 64), jnp.bfloat16), "b.kernel": jnp.ones((2, 2))}
  updates = {path: jnp.full(value.shape, 4e-5) for path, value in params.items()}
  step = jax.jit(lambda params, number: optim.apply_updates(params, updates, number))
  for number in range(200):
    params = step(params, number)
  assert params["a.kernel"].dtype == jnp.bfloat16 and params["b.kernel"].dtype == jnp.float32
  assert float(params["a.kernel"].astype(jnp.float32).mean()) == pytest.approx(1.008, abs=4e-4)
  np.testing.assert_allclose(params["b.kernel"], 1.008, rtol=1e-4)


def _trained(config, mesh, on_host):
  """Returns three steps of two parameters, and the shapes of their state."""
  spec = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
  shapes = {
    "a.kernel": jax.ShapeDtypeStruct((4, 8), jnp.bfloat16, sharding=spec),
    "b.kernel": jax.ShapeDtypeStruct((3, 8), jnp.float32, sharding=spec),
  }
  c = config.copy_and_resolve_references()
  c.on_host = on_host
  optimizer = optim.optimizer(c, 10, dict.fromkeys(shapes, 1.0))
  abstract = train_state.abstract_state(optimizer, shapes, mesh, on_host)
  params = {path: jax.device_put(jnp.ones(s.shape, s.dtype), spec) for path, s in shapes.items()}
  state = train_state.first_state(optimizer, params, abstract)

  @jax.jit
  def step(state, gradients):
    updates, moments = optimizer.update(gradients, state.opt_state, state.params)
    params = optim.apply_updates(state.params, updates, state.step)
    return train_state.TrainState(state.step + 1, params, moments)

  rng = np.random.default_rng(0)
  for _ in range(3):
    state = step(
      state, {p: jnp.asarray(rng.normal(size=s.shape), "float32") for p, s in shapes.items()}
    )
  return state, abstract


def test_where_moments_are_changes_no_bit(tmp_path):
  """And a checkpoint of the one is restored as the other, which its checksums allow."""
  c, mesh = common.get_config().optim, make_mesh(1, 8, 1)
  c.learning_rate, c.moment_dtype, c.second_moment_dtype = 0.1, "bfloat16", "bfloat16"
  (on_device, shapes), (on_host, host) = (_trained(c, mesh, there) for there in (False, True))
  for one, other in zip(jax.tree.leaves(on_device), jax.tree.leaves(on_host), strict=True):
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
  assert (np.asarray(on_host.params["a.kernel"], np.float32) != 1).mean() > 0.9
  kinds = [(leaf.sharding.memory_kind, leaf.ndim) for leaf in jax.tree.leaves(on_host.opt_state)]
  assert sorted(kinds) == [("device", 0)] * 2 + [("pinned_host", 2)] * 4
  for number, (state, wanted) in enumerate(((on_host, shapes), (on_device, host))):
    with checkpoint.Checkpoints(epath.Path(tmp_path / str(number)), every=1, keep=1) as kept:
      kept.save(3, state, {})
    with checkpoint.Checkpoints(epath.Path(tmp_path / str(number)), every=1, keep=1) as kept:
      restored = kept.restore(wanted)
    for one, shape, theirs in zip(*map(jax.tree.leaves, (restored, wanted, state)), strict=True):
      assert one.sharding.memory_kind == shape.sharding.memory_kind
      np.testing.assert_array_equal(np.asarray(one), np.asarray(theirs))


def test_a_device_without_host_memory_is_refused():
  device = types.SimpleNamespace(device_kind="abacus", addressable_memories=list)
  mesh = types.SimpleNamespace(devices=np.array([device]))
  with pytest.raises(
    UserError, match="abacus keeps no arrays in the host's memory: set it to False"
  ):
    train_state.check_host_memory(mesh)


def test_the_plan_counts_them():
  plain = memory.estimate(qwen_bis10.get_config(), 4).uses
  c = qwen_bis10.get_config()
  c.model.trained_dtype = c.optim.moment_dtype = "bfloat16"
  found = memory.estimate(c, 4).uses
  assert found["optimizer state"] == pytest.approx(6 / 8 * plain["optimizer state"], rel=1e-6)
  assert found["parameters"] == pytest.approx(plain["parameters"] - 2 * 7.115e9 / 4, rel=1e-3)
  c.optim.on_host = True
  assert memory.estimate(c, 4).uses["optimizer state"] < 100
  assert common.get_config().optim.on_host is False
