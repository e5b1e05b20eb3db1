"""One step is the same mathematics on one device or eight, in one micro-batch or four.

On two processes: tests/models/streams_test.py, and whole runs in tests/run/launch_test.py.

Mutations these tests catch (each tried once): normalising by the markers of the micro-batch or of
the device, dropping a micro-batch's gradient, and rows that change device without their patches.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bis_jax.models import backbones, learning_rates
from bis_jax.models.param_tree import split
from bis_jax.models.qwen2_5_vl.config import SIZES as QWEN_SIZES
from bis_jax.parallel.sharding import batch_sharding, make_mesh, parameter_shardings, put_rows
from bis_jax.training import optim
from bis_jax.training.train_state import TrainState
from bis_jax.training.train_step import loss_and_grads, make_train_step
from configs import common

MODEL = QWEN_SIZES["tiny"].with_vocabulary(256)
ROWS, TOKENS, PATCHES, MARKERS = 8, 64, 64, 6


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
  """Eight rows of two samples, an image in the first; rows have unequal numbers of markers."""
  rng = np.random.default_rng(0)
  segment = np.repeat([1, 2, 0], [40, 16, 8])[None].repeat(ROWS, 0)
  position = np.concatenate([np.arange(40), np.arange(16), np.arange(8)])
  image = np.full((ROWS, TOKENS), -1)
  image[:, 2:18] = rng.permutation(16)
  weight = (np.arange(MARKERS)[None] < rng.integers(0, MARKERS + 1, (ROWS, 1))).astype(np.float32)
  return {
    "tokens": rng.integers(0, 256, (ROWS, TOKENS), dtype=np.int32),
    "segment_ids": segment.astype(np.int32),
    "positions": position[None, None].repeat(ROWS, 0).repeat(3, 1).astype(np.int32),
    "image_index": image.astype(np.int32),
    "patches": rng.normal(size=(ROWS, PATCHES, 1176)).astype(np.float32),
    "patch_segment": np.ones((ROWS, PATCHES), np.int32),
    "patch_window": np.ones((ROWS, PATCHES), np.int32),
    "patch_position": rng.integers(0, 8, (ROWS, PATCHES, 2), dtype=np.int32),
    "marker_index": rng.integers(20, 56, (ROWS, MARKERS), dtype=np.int32),
    "marker_rollout": np.ones((ROWS, MARKERS), np.int32),
    "marker_target": rng.integers(0, 2, (ROWS, MARKERS)).astype(np.float32),
    "marker_weight": weight,
  }


_jitted = jax.jit(loss_and_grads, static_argnums=(0, 4))


def _grads(batch, mesh, accumulate=1, normalise="global"):
  """Returns (loss, gradients) of the batch on a mesh, as numpy."""
  graph, params = split(backbones.build(MODEL, 0))
  params = jax.device_put(params, parameter_shardings(mesh, backbones.sharding(MODEL), params))
  rows = {
    key: jax.device_put(array.reshape(accumulate, -1, *array.shape[1:]), batch_sharding(mesh))
    for key, array in batch.items()
  }
  loss, grads, _ = _jitted(graph, params, {}, rows, normalise)
  return jax.tree.map(np.asarray, (loss, grads))


@pytest.fixture(scope="module")
def alone(batch):
  return _grads(batch, make_mesh(1, 1, 1, jax.devices()[:1]))


def _assert_close(got, wanted):
  assert abs(got[0] - wanted[0]) <= 1e-5 * abs(wanted[0])
  flat = [np.concatenate([g.ravel() for g in grads.values()]) for grads in (got[1], wanted[1])]
  assert np.linalg.norm(flat[0] - flat[1]) <= 1e-5 * np.linalg.norm(flat[1])
  for path, grad in got[1].items():
    reference = np.linalg.norm(wanted[1][path])
    assert np.linalg.norm(grad - wanted[1][path]) <= 1e-4 * reference + 1e-7, path


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_eight_devices_agree_with_one(batch, alone, shape):
  _assert_close(_grads(batch, make_mesh(*shape)), alone)


def test_micro_batches_agree_with_one_batch(batch, alone):
  mesh = make_mesh(1, 1, 1, jax.devices()[:1])
  _assert_close(_grads(batch, mesh, accumulate=4), alone)


def test_micro_batches_hold_the_same_rows_on_any_number_of_processes():
  mesh = make_mesh(1, 1, 1, jax.devices()[:1])
  whole, first, second = (
    put_rows({"tokens": np.arange(*span)[:, None]}, mesh, 2)["tokens"][..., 0]
    for span in ((0, 8), (0, 4), (4, 8))
  )
  np.testing.assert_array_equal(whole, [[0, 2, 4, 6], [1, 3, 5, 7]])
  np.testing.assert_array_equal(whole, jnp.concatenate([first, second], axis=1))


def test_rows_in_another_order_are_the_same_batch(batch, alone):
  mesh = make_mesh(8, 1, 1)
  _assert_close(_grads({key: array[::-1] for key, array in batch.items()}, mesh), alone)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_micro_normalisation_is_the_mean_of_the_means_of_two_rollouts(batch, accumulate):
  """As in the release, and regardless of rows and micro-batches."""
  mesh = make_mesh(1, 1, 1, jax.devices()[:1])
  rollout = np.take_along_axis(batch["segment_ids"], batch["marker_index"], axis=1)
  rollout[0] = 1  # one rollout: pairs then lie across rows
  batch = batch | {"marker_rollout": rollout}
  before = np.cumsum([0, *rollout.max(axis=1)])
  pair = (before[:-1, None] + rollout - 1) // 2
  weights = [np.where(pair == k, batch["marker_weight"], 0) for k in range(-(-before[-1] // 2))]
  means = [_grads(batch | {"marker_weight": weight}, mesh) for weight in weights]
  wanted = jax.tree.map(lambda *parts: np.mean(parts, axis=0), *means)
  order = np.arange(ROWS).reshape(-1, accumulate).T.ravel()  # as `put_rows` has them
  rows = {key: array[order] for key, array in batch.items()}
  got = _grads(rows, mesh, accumulate=accumulate, normalise="micro")
  _assert_close(got, wanted)
  assert got[0] != pytest.approx(_grads(batch, mesh)[0], rel=1e-3)


def test_a_batch_without_labels_has_loss_zero_and_no_gradient(batch):
  empty = batch | {"marker_weight": np.zeros((ROWS, MARKERS), np.float32)}
  loss, grads = _grads(empty, make_mesh(1, 1, 1, jax.devices()[:1]))
  assert loss == 0 and all((grad == 0).all() for grad in grads.values())


def test_the_step_changes_trainable_parameters_only(batch):
  c = common.get_config()
  graph, params = split(backbones.build(MODEL, 0))
  factor = learning_rates.factors(c, params)
  frozen = {path: array for path, array in params.items() if factor[path] == 0}
  trained = {path: array for path, array in params.items() if factor[path] > 0}
  assert {path.split(".")[0] for path in frozen} == {"visual"}
  assert any("merger" in path for path in trained)
  optimizer = optim.optimizer(c.optim, 2, factor)
  step = make_train_step(graph, optimizer, optim.schedule(c.optim, 2), "global")
  state = TrainState(jnp.int32(0), jax.tree.map(jnp.copy, trained), optimizer.init(trained))
  rows = {key: array[None] for key, array in batch.items()}
  for _ in range(2):
    state, metrics = step(state, frozen, rows)
  assert int(state.step) == 2
  assert set(state.params) == set(trained)
  assert all((state.params[path] != trained[path]).any() for path in trained)
  row_loss = np.asarray(metrics["row_loss"]).ravel()
  assert row_loss.sum() == pytest.approx(float(metrics["loss"]) * batch["marker_weight"].sum())
