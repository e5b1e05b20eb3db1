"""Meshes and sharding rules."""

import jax
import pytest
from flax import nnx

from bis_jax import backbones
from bis_jax.models.qwen2_5_vl import Qwen2_5_VLConfig
from bis_jax.sharding import P, batch_shards, first_match, make_mesh, parameter_shardings
from bis_jax.state import merge, split


def test_one_axis_may_take_the_devices_that_are_left():
  assert dict(make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert batch_shards(make_mesh(2, -1, 2)) == 4


@pytest.mark.parametrize("sizes", [(3, -1, 1), (2, 2, 1), (16, 1, 1)])
def test_sizes_that_do_not_divide_name_both_numbers(sizes):
  with pytest.raises(ValueError, match=r"8 (devices|are here)"):
    make_mesh(*sizes)


@pytest.mark.parametrize("size", ["qwen_3b", "qwen_7b"])
def test_every_parameter_has_a_rule_and_big_ones_are_split(size):
  config = getattr(Qwen2_5_VLConfig, size)()
  _, shapes = split(nnx.eval_shape(lambda: backbones.build(config, 0)))
  shardings = parameter_shardings(make_mesh(1, 4, 2), backbones.SHARDING, shapes)
  for path, shape in shapes.items():
    if shape.size > 1_000_000:
      assert shardings[path].shard_shape(shape.shape) != shape.shape, path


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
  graph, params = split(backbones.build(Qwen2_5_VLConfig.tiny(), 0))
  again = split(merge(graph, params))[1]
  assert set(again) == set(params)
  assert all((again[path] == params[path]).all() for path in params)
