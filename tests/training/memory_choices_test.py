"""Settings that save memory: moments on the host, trained parameters in bfloat16 rounded at random."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from bis_jax.compilation import memory
from bis_jax.errors import UserError
from bis_jax.models import backbones, learning_rates
from bis_jax.parallel.sharding import make_mesh
from bis_jax.run import stages
from bis_jax.scoring.restore import load_run
from bis_jax.training import optim, train_state
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


def _state(folder, step):
  with ocp.StandardCheckpointer() as checkpointer:
    return jax.tree.leaves(checkpointer.restore(folder / f"checkpoints/{step}/state"))


@pytest.fixture(scope="module")
def config(small_config):
  with small_config.unlocked():
    c = small_config.copy_and_resolve_references()
  c.unlock()
  c.model.trained_dtype, c.optim.on_host = "bfloat16", True
  c.optim.moment_dtype = c.optim.second_moment_dtype = "bfloat16"
  c.train.steps, c.train.checkpoint_every, c.evaluation.benchmark = 3, 1, ""
  return c


def test_a_run_with_all_of_them_resumes_with_moments_elsewhere(config, tmp_path):
  """Where the moments are changes no bit; the checkpoint is of the parameters as they train."""
  folder, c = tmp_path / "run", config.copy_and_resolve_references()
  stages.run(c, str(folder))
  wanted = _state(folder, 3)
  assert {str(leaf.dtype) for leaf in wanted} == {"bfloat16", "int32"}
  epath.Path(folder / "checkpoints/3").rmtree()
  c.optim.on_host = False
  stages.run(c, str(folder))
  assert all(map(np.array_equal, wanted, _state(folder, 3)))
  run = load_run(str(folder))
  assert {value.dtype for value in run.params.values()} == {jnp.dtype(jnp.bfloat16)}
  assert any((a != b).any() for a, b in zip(_state(folder, 2), wanted, strict=True))


def test_moments_are_on_the_host_and_counts_are_not(config):
  mesh, model = make_mesh(2, 2, 2), backbones.model_config(config, 128)
  _, shapes = backbones.structure(model, mesh)
  optimizer = optim.optimizer(config.optim, 10, learning_rates.factors(config, shapes))
  state = train_state.abstract_state(optimizer, shapes, mesh, on_host=True)
  for leaf in jax.tree.leaves(state.opt_state):
    wanted = "pinned_host" if leaf.dtype == jnp.bfloat16 else "device"
    assert leaf.sharding.memory_kind == wanted or leaf.ndim == 0
  params = jax.jit(lambda: {p: jnp.ones(s.shape, s.dtype) for p, s in shapes.items()})()
  first = train_state.first_state(optimizer, params, state).opt_state
  updates, after = jax.jit(optimizer.update)(params, first, params)
  assert {value.sharding.memory_kind for value in updates.values()} == {"device"}
  for moments in (first, after):
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(moments) if leaf.ndim}
    assert kinds == {"pinned_host"}


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
