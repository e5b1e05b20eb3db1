"""Counted FLOPs against sums by hand and against XLA's count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from bis_jax.inputs.rows import empty_batch
from bis_jax.models import backbones
from bis_jax.models.internvl.config import SIZES as INTERNVL_SIZES
from bis_jax.models.internvl.images import InternVLImages
from bis_jax.models.model_flops import step_flops, trained_stages
from bis_jax.models.param_tree import merge, split
from bis_jax.models.qwen2_5_vl.config import SIZES as QWEN_SIZES
from bis_jax.models.qwen3_vl.config import SIZES as QWEN3_SIZES

ALL = {"visual.patch_embed", "visual.blocks", "visual.merger.mlp.0", "visual.merger.mlp.2"}


def test_a_token_of_the_7b_text_costs_six_operations_a_parameter():
  """28 layers of 233,046,016 kernel entries; attention over its own segment alone."""
  flops = step_flops(QWEN_SIZES["7b"], {"language_model", *ALL}, [100.0] * 3, [])
  assert flops["text"] == 6 * 300 * 28 * 233_046_016
  assert flops["text attention"] == 3 * 28 * 3 * 4 * 3584 * 100 * 100 / 2
  assert flops["vision"] == flops["vision attention"] == 0


def test_a_frozen_tower_runs_forward_only():
  config = QWEN_SIZES["7b"]
  frozen = step_flops(config, {"visual.merger.mlp.0", "visual.merger.mlp.2"}, [], [256.0])
  trained = step_flops(config, ALL, [], [256.0])
  assert 3 * frozen["vision attention"] == trained["vision attention"]
  merger = 2 * 64 * (2 * 5120**2 + 3 * 5120 * 3584)  # the first product passes nothing back
  blocks = 2 * 256 * (1176 * 1280 + 32 * (4 * 1280**2 + 3 * 1280 * 3420))
  assert frozen["vision"] == merger + blocks


def test_a_tile_of_internvl_costs_its_kernels_and_a_sequence_of_1025():
  """Frozen tower, trained projector: 24 layers of width 1024, 256 image tokens of width 4096."""
  config = INTERNVL_SIZES["2.5-8b"]
  stages = {"mlp1.fc1", "mlp1.fc2", "language_model"}
  flops = step_flops(config, stages, [100.0], [3 * 1024.0])
  layers = 24 * 1025 * (4 * 1024**2 + 2 * 1024 * 4096)
  projector = 256 * (2 * 4096**2 + 3 * 4096**2)  # the first product passes nothing back
  assert flops["vision"] == 3 * 2 * (1024 * 588 * 1024 + layers + projector)
  assert flops["vision attention"] == 3 * 4 * 24 * 1025**2 * 1024
  assert flops["text"] == 6 * 100 * 32 * 218_103_808
  factor = {
    "vision_model.layers.mlp.fc1.kernel": 0.0,
    "mlp1.fc1.kernel": 1.0,
    "mlp1.fc2.kernel": 1.0,
  }
  assert (
    trained_stages(config, factor | {"language_model.layers.mlp.up_proj.kernel": 1.0}) == stages
  )
  trained = step_flops(config, {"vision_model.layers", *stages}, [100.0], [3 * 1024.0])
  assert trained["vision attention"] == 3 * flops["vision attention"]


def test_qwen3_counts_its_heads_and_the_mergers_of_earlier_blocks():
  """4B, all but the decoder frozen, which passes nothing back; heads are wider than the model."""
  flops = step_flops(QWEN3_SIZES["4b"], {"language_model"}, [100.0], [256.0])
  layer = 2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728
  assert flops["text"] == 4 * 100 * 36 * layer
  assert flops["text attention"] == 36 * 3 * 4 * 4096 * 100 * 100 / 2
  blocks = 2 * 256 * (1536 * 1024 + 24 * (4 * 1024**2 + 2 * 1024 * 4096))
  assert flops["vision"] == blocks + 4 * 2 * 64 * (4096**2 + 4096 * 2560)
  assert flops["vision attention"] == 4 * 24 * 1024 * 256**2


def test_stages_follow_the_learning_rates():
  factor = {
    "visual.blocks.attn.qkv.kernel": 0.0,
    "visual.merger.mlp.0.kernel": 1.0,
    "language_model.layers.mlp.up_proj.kernel": 0.5,
  }
  assert trained_stages(QWEN_SIZES["7b"], factor) == {"visual.merger.mlp.0", "language_model"}


def test_xla_counts_about_the_same():
  """Forward pass of one unscanned layer each: XLA adds norms, activations and the embedding."""
  config = QWEN_SIZES["tiny"].with_vocabulary(512)
  config = type(config)(
    text=type(config.text)(**{**vars(config.text), "num_hidden_layers": 1}),
    vision=type(config.vision)(**{**vars(config.vision), "depth": 1, "full_attention_period": 1}),
  )
  graph, params = split(backbones.build(config, 0))
  t, p = 512, 512
  batch = {
    "tokens": jnp.zeros((1, t), jnp.int32),
    "segment_ids": jnp.ones((1, t), jnp.int32),
    "positions": jnp.zeros((1, 3, t), jnp.int32),
    "image_index": jnp.zeros((1, t), jnp.int32),
    "patches": jnp.zeros((1, p, 1176)),
    "patch_segment": jnp.ones((1, p), jnp.int32),
    "patch_window": jnp.ones((1, p), jnp.int32),
    "patch_position": jnp.zeros((1, p, 2), jnp.int32),
    "marker_index": jnp.zeros((1, 4), jnp.int32),
  }
  compiled = (
    jax.jit(lambda params, batch: merge(graph, params)(batch)).lower(params, batch).compile()
  )
  ours = step_flops(config, set(), [float(t)], [float(p)])
  # Forward only, and XLA computes the masked half of causal attention as well.
  wanted = ours["text"] + 2 * ours["text attention"] / 3 + ours["vision"] + ours["vision attention"]
  assert compiled.cost_analysis()["flops"] == pytest.approx(wanted, rel=0.15)


def test_xla_counts_about_the_same_of_internvl():
  """As above, with 64 tiles of 16 patches and the class token."""
  config = INTERNVL_SIZES["tiny"].with_vocabulary(512)
  config = dataclasses.replace(
    config,
    text=dataclasses.replace(config.text, num_hidden_layers=1),
    vision=dataclasses.replace(config.vision, num_hidden_layers=1, hidden_size=128),
  )
  graph, params = split(backbones.build(config, 0))
  rows = empty_batch(InternVLImages(1, 56), 1, (128, 1024, 4))
  compiled = jax.jit(lambda params, rows: merge(graph, params)(rows)).lower(params, rows).compile()
  ours = step_flops(config, set(), [128.0], [1024.0])
  wanted = ours["text"] + 2 * ours["text attention"] / 3 + ours["vision"] + ours["vision attention"]
  assert compiled.cost_analysis()["flops"] == pytest.approx(wanted, rel=0.15)
