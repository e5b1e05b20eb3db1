"""The real TPU compiler builds the real step: two layers of the 7B model, at full width.

Machine code, nine tenths of the time, is generated for attention alone.
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from bis_jax import aot
from bis_jax.compilation import compiled_step, plan
from bis_jax.compilation.compiled_step import packed_rows
from bis_jax.models.attention import attention
from bis_jax.models.internvl.config import SIZES as INTERNVL_SIZES
from bis_jax.models.qwen2_5_vl.config import SIZES as QWEN_SIZES
from bis_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from bis_jax.parallel import devices
from bis_jax.parallel.devices import TopologyError, slice_devices
from bis_jax.parallel.sharding import MeshError, make_mesh
from configs import internvl3_14b_bis10, qwen_bis10, qwen_full
from tests.commands import run_command

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="compiles for TPUs: pip install -e '.[tpu]'"
)


def _shallow() -> Qwen2_5_VLConfig:
  """Qwen2.5-VL-7B with two text layers and two vision blocks, one of each kind."""
  full = QWEN_SIZES["7b"]
  return dataclasses.replace(
    full,
    text=dataclasses.replace(full.text, num_hidden_layers=2),
    vision=dataclasses.replace(full.vision, depth=2, full_attention_period=2),
  )


def _config(tensor):
  """The recipe with eight short rows per step."""
  c = qwen_bis10.get_config()
  c.inputs.max_length = c.inputs.row_tokens = c.inputs.row_patches = 1024
  c.qwen2_5_vl.max_pixels = 256 * 784
  c.inputs.row_multiple, c.train.global_batch, c.mesh.tensor = 8, 14, tensor
  return c


@functools.cache
def _step(topology, tensor):
  return plan.in_child(_qwen_step, _config(tensor=tensor), topology)


def _qwen_step(config, topology):
  QWEN_SIZES["7b"] = _shallow()  # of the child alone
  return compiled_step.compile_step(config, topology, finish=plan.planned)


def _internvl_step(config, topology):
  INTERNVL_SIZES["3-14b"] = _narrow()
  return compiled_step.compile_step(config, topology, finish=plan.planned)


def _narrow():
  full = INTERNVL_SIZES["3-14b"]
  text = dataclasses.replace(
    full.text,
    vocab_size=15_167,
    num_hidden_layers=2,
    hidden_size=1280,
    intermediate_size=3456,
    num_attention_heads=10,
    num_key_value_heads=2,
  )
  vision = dataclasses.replace(full.vision, num_hidden_layers=2)
  return dataclasses.replace(full, text=text, vision=vision)


@needs_libtpu
def test_internvl_compiles():
  """Two layers each of the 14B model's decoder, a quarter as wide, and its tower.

  Its odd vocabulary, here a tenth, stays whole.
  """
  c = internvl3_14b_bis10.get_config()
  c.inputs.max_length = c.inputs.row_tokens = 1024
  c.internvl.max_tiles, c.inputs.row_patches = 2, 3 * 1024
  c.inputs.row_multiple, c.train.global_batch, c.mesh.tensor = 4, 3, 2
  step = plan.in_child(_internvl_step, c, "v5e:2x4")
  parameters, optimizer = step.memory["parameters"], step.memory["optimizer state"]
  assert (step.rows, step.rollouts) == (4, 4 * 1024 / 1398)
  layer = 2 * 1280 * (1280 + 256) + 3 * 1280 * 3456
  table, projector = 15_167 * 1280, 1280 * (4096 + 1280)
  whole = 4 * table / 4  # of float32, over fsdp alone
  assert optimizer == pytest.approx(2 * (4 * (2 * layer + projector) / 8 + whole), rel=0.01)
  assert optimizer / 2 < parameters < 1.05 * optimizer / 2 + 4 * 26e6 / 8
  assert step.total < 0.9 * step.chip.hbm_bytes and 0 < step.model_seconds < step.seconds


def test_a_full_recipe_shares_prefixes_and_a_tenth_does_not():
  """Three rollouts per question, against one."""
  full, tenth = (packed_rows(r.get_config()) for r in (qwen_full, qwen_bis10))
  assert full.layout.streams[0] and full.rollout_tokens < 0.75 * 618
  assert full.layout.budgets[1] < 0.7 * tenth.layout.budgets[1]
  assert tenth.layout.streams == (0, 0) and tenth.rollout_tokens == 618
  flops = [
    sum(rows.model_flops(QWEN_SIZES["7b"], {"language_model"}, 300).values())
    for rows in (full, tenth)
  ]
  # 1,854 tokens against 1,154, and a third of the images.
  assert 1.6 < flops[1] / flops[0] < 1.8


SLICES = [("v5p:2x2x2", 8, 1), ("v5e:4x4", 16, 2)]


@needs_libtpu
@pytest.mark.parametrize("topology, chips, tensor", SLICES)
def test_the_step_compiles_and_fits(topology, chips, tensor):
  step = _step(topology, tensor)
  parameters, optimizer = step.memory["parameters"], step.memory["optimizer state"]
  assert step.mesh == {"data": 1, "fsdp": chips // tensor, "tensor": tensor}
  assert (step.rows, step.micro_batches, step.remat) == (8, 1, "dots")
  # Two layers of 233 M, 152,064 rows, merger and head; the tower is frozen and has no moments.
  trained = 2 * 233_057_792 + 152_064 * 3584 + 5120 * (5120 + 3584)
  assert optimizer == pytest.approx(2 * 4 * trained / chips, rel=0.01)
  assert 4 * trained / chips < parameters < 1.1 * 4 * trained / chips
  assert parameters + optimizer < step.total < 0.9 * step.chip.hbm_bytes
  # Every kernel reaches every device at least once, in bfloat16.
  moved = sum(size for _, size in step.collectives.values())
  assert moved > 2 * 2 * 233_000_000 / tensor * (1 - tensor / chips)
  assert step.collectives["all-reduce"][0] > 0
  assert 0 < step.model_seconds < step.seconds
  lines = "\n".join(aot.report(_config(tensor=tensor), topology, step))
  for words in ("optimizer state", "free", "all-reduce", "rollouts/s", f"fsdp {chips // tensor}"):
    assert words in lines
  largest = step.operations[0]
  assert f"GB in {largest.calls:6} calls: {largest.name}" in lines


# (slice, tensor) -> HBM bytes and bytes of collectives of a step on one device, in GB.
BUDGET = {("v5p:2x2x2", 1): (21.5, 3.18), ("v5e:4x4", 2): (8.34, 3.90)}


@needs_libtpu
@pytest.mark.parametrize("topology, chips, tensor", SLICES)
def test_the_step_moves_no_more_than_its_budget(topology, chips, tensor):
  """Mutation caught: windowed products, with which the first one moves 47.0 and 6.41 GB."""
  step = _step(topology, tensor)
  sent = sum(size for _, size in step.collectives.values())
  for found, budget in zip((step.hbm_bytes, sent), BUDGET[topology, tensor], strict=True):
    assert 0.8 * budget < found / 1e9 < 1.1 * budget, (step.operations[:5], step.collectives)


@needs_libtpu
def test_a_step_computes_every_product_once():
  """With remat "dots" the FLOPs are the model's, those of whole rows in attention, and no more."""
  step = _step("v5p:2x2x2", 1)
  products = step.model_flops["text"] + step.model_flops["vision"]
  assert products < step.executed_flops < 1.15 * products


def _attention_code():
  device = SingleDeviceSharding(slice_devices("v6e:2x2")[0])
  shapes = [
    jax.ShapeDtypeStruct((1, 1024, heads, 128), jnp.bfloat16, sharding=device)
    for heads in (4, 1, 1)
  ]
  segments = jax.ShapeDtypeStruct((1, 1024), jnp.int32, sharding=device)

  def total(q, k, v, segments):
    out = attention(q, k, v, segments, causal=True, backend="splash")
    return out.astype(jnp.float32).sum()

  return plan.whole(jax.jit(jax.grad(total, (0, 1, 2))).lower(*shapes, segments)).code


@needs_libtpu
def test_attention_becomes_machine_code():
  """Forward and backward; the plans of the other tests end before that."""
  assert plan.in_child(_attention_code) > 0


@needs_libtpu
def test_a_slice_that_libtpu_does_not_know_is_named():
  with pytest.raises(TopologyError, match="libtpu knows no topology 'v6e:3x5'"):
    compiled_step.compile_step(_config(tensor=1), "v6e:3x5")


@needs_libtpu
def test_a_mesh_that_does_not_fit_the_slice_is_named():
  with pytest.raises(MeshError, match="multiple of 3 devices, but there are 8"):
    compiled_step.compile_step(_config(tensor=3), "v5p:2x2x2")
  with pytest.raises(MeshError, match="8 rows .* do not divide over .* 16 batch shards"):
    compiled_step.compile_step(_config(tensor=1), "v5e:4x4")


@needs_libtpu
@pytest.mark.parametrize("topology, number", [("v4:2x2x1", 4), ("tpu7x:2x2x1", 8)])
def test_the_cores_of_a_chip_are_one_device_or_two(topology, number):
  assert len(devices.slice_devices(topology)) == number


@needs_libtpu
def test_an_axis_may_be_a_part_of_a_physical_one():
  """Mutation caught: `jax.make_mesh`, which splits no axis of a v6e."""
  assert dict(make_mesh(1, -1, 2, devices.slice_devices("v6e:4x4")).shape)["fsdp"] == 8


def test_without_libtpu_the_remedy_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(TopologyError, match=r"pip install -e '\.\[tpu\]'"):
    devices.slice_devices("v5p:2x2x2")


def test_the_command_ends_with_a_message():
  message = run_command("aot", "--config=configs/qwen_bis10.py", "--topology=v9:2x2")
  assert message is not None
  assert message.startswith("aot: topology 'v9:2x2': write CHIP:SHAPE with a chip of v4")
