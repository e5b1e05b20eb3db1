"""Meshes and sharding rules."""

import types

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding

from bis_jax.models import backbones
from bis_jax.models.internvl.config import SIZES as INTERNVL_SIZES
from bis_jax.models.param_tree import merge, split
from bis_jax.models.qwen2_5_vl.config import SIZES as QWEN_SIZES
from bis_jax.parallel import devices
from bis_jax.parallel.sharding import (
  BATCH_AXES,
  MeshError,
  P,
  batch_shards,
  batch_share,
  first_match,
  make_mesh,
  parameter_shardings,
)


def test_one_axis_may_take_the_devices_that_are_left():
  assert dict(make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert batch_shards(make_mesh(2, -1, 2)) == 4


@pytest.mark.parametrize("sizes", [(3, -1, 1), (2, 2, 1), (16, 1, 1)])
def test_sizes_that_do_not_divide_name_both_numbers(sizes):
  with pytest.raises(MeshError, match="8 devices|there are 8"):
    make_mesh(*sizes)


@pytest.mark.parametrize(
  ("backbone", "size"),
  {
    config: (name, size)
    for name, record in backbones.BACKBONES.items()
    for size, config in record.sizes.items()
    if config.text.vocab_size
  }.values(),
)
def test_every_parameter_has_a_rule_and_big_ones_are_split(backbone, size):
  config = backbones.get(backbone).sizes[size]
  _, shapes = split(nnx.eval_shape(lambda: backbones.build(config, 0)))
  shardings = parameter_shardings(make_mesh(1, 4, 2), backbones.sharding(config), shapes)
  for path, shape in shapes.items():
    if shape.size > 1_000_000:
      assert shardings[path].shard_shape(shape.shape) != shape.shape, path


def test_internvl_over_eight_devices_gives_the_logits_of_one():
  """Rows over data and fsdp, kernels over fsdp and tensor, and the mesh in context as in training."""
  config = INTERNVL_SIZES["tiny"].with_vocabulary(64)
  graph, params = split(backbones.build(config, 0))
  rng = np.random.default_rng(0)
  batch = {
    "tokens": rng.integers(0, 64, (8, 32)).astype(np.int32),
    "segment_ids": np.repeat([[1, 2, 2, 0]], 8, axis=1).reshape(1, 32).repeat(8, axis=0),
    "positions": np.arange(32, dtype=np.int32)[None].repeat(8, axis=0) % 16,
    "patches": rng.normal(size=(8, 32, 588)).astype(np.float32),
    "image_index": np.where(np.arange(32) < 8, np.arange(32), -1)[None].repeat(8, axis=0),
    "marker_index": np.array([[7, 15, 23]] * 8, np.int32),
  }
  forward = jax.jit(lambda params, batch: merge(graph, params)(batch))
  alone = forward(params, batch)
  mesh = make_mesh(2, 2, 2)
  _, shapes = backbones.structure(config, mesh)
  placed = {path: jax.device_put(value, shapes[path].sharding) for path, value in params.items()}
  with jax.set_mesh(mesh):
    together = forward(placed, jax.device_put(batch, NamedSharding(mesh, P(BATCH_AXES))))
  np.testing.assert_allclose(np.asarray(together), np.asarray(alone), atol=2e-5)


def test_a_dimension_that_does_not_divide_stays_whole():
  shapes = {"a.kernel": jax.ShapeDtypeStruct((6, 8), "float32")}
  sharding = parameter_shardings(make_mesh(1, 4, 2), ((".", P("fsdp", "tensor")),), shapes)
  assert sharding["a.kernel"].spec == P(None, "tensor")


def test_first_match_wins_and_no_match_raises():
  rules = ((r"^visual\.", 1), (r"kernel$", 2))
  assert first_match(rules, "visual.proj.kernel") == 1
  assert first_match(rules, "text.proj.kernel") == 2
  with pytest.raises(KeyError, match="text.proj.bias"):
    first_match(rules, "text.proj.bias")


def test_splitting_and_merging_a_model_is_the_identity():
  graph, params = split(backbones.build(QWEN_SIZES["tiny"].with_vocabulary(512), 0))
  again = split(merge(graph, params))[1]
  assert set(again) == set(params)
  assert all((again[path] == params[path]).all() for path in params)


def _mesh_of(shape, process_of_device):
  """A mesh of stub devices that only have a process index."""
  devices = [types.SimpleNamespace(process_index=p) for p in process_of_device]
  sizes = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
  return types.SimpleNamespace(devices=np.array(devices).reshape(shape), shape=sizes)


@pytest.mark.parametrize(
  "shape, process_of_device, parts",
  [
    ((1, 8, 1), [0, 0, 0, 0, 1, 1, 1, 1], [0, 1]),
    ((2, 2, 2), [0, 0, 0, 0, 1, 1, 1, 1], [0, 1]),
    ((1, 1, 8), [0, 0, 0, 0, 1, 1, 1, 1], [0, 0]),  # one row, split over both processes
    ((1, 2, 4), [0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 1]),
    ((4, 1, 2), [0, 0, 1, 1, 0, 0, 1, 1], [0, 1]),  # as a TPU's wiring may order them
  ],
)
def test_processes_read_the_rows_that_their_devices_hold(shape, process_of_device, parts):
  mesh = _mesh_of(shape, process_of_device)
  count = len(set(parts))
  assert [batch_share(mesh, p) for p in range(len(parts))] == [(part, count) for part in parts]


def test_processes_that_share_some_of_their_rows_are_refused():
  with pytest.raises(MeshError, match="config.mesh.tensor"):
    batch_share(_mesh_of((1, 2, 3), [0, 0, 1, 1, 2, 2]), 0)


def test_the_data_axis_goes_over_the_slices(monkeypatch):
  """Mutation caught: a mesh in the order of the devices, whose fsdp axis crosses slices."""
  for name, value in devices._NO_HARDWARE.items():
    monkeypatch.setenv(name, value)
  chips = topologies.get_topology_desc("v5e:2x2", platform="tpu", num_slices=2).devices
  mesh = make_mesh(2, -1, 1, list(chips))
  slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  assert mesh.devices.shape == (2, 4, 1) and (slices == np.array([0, 1])[:, None, None]).all()
  with pytest.raises(MeshError, match="on 2 slices: set data to a multiple of 2"):
    make_mesh(1, -1, 1, list(chips))
