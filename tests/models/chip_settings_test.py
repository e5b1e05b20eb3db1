"""Compiler options, mesh and micro-batches by chip, which a config may change."""

import types

import jax
import numpy as np
import pytest

from bis_jax.errors import UserError
from bis_jax.models import backbones, chip_settings
from bis_jax.models.chip_settings import CHIP_OPTIONS, compiler_options
from bis_jax.parallel.devices import CHIPS
from bis_jax.parallel.sharding import make_mesh
from bis_jax.settings.config_check import ConfigError, check
from bis_jax.training.train_step import step_of
from configs import qwen_bis10


def _mesh(kind):
  return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(device_kind=kind)]))


def test_every_chip_has_options():
  assert CHIP_OPTIONS.keys() == CHIPS.keys()
  for name, chip in CHIPS.items():
    assert compiler_options(_mesh(chip.device_kind), "") == CHIP_OPTIONS[name] != {}


def test_other_platforms_have_none():
  assert compiler_options(make_mesh(-1, 1, 1), "") == {}


def test_the_config_adds_options_to_those_of_training(monkeypatch):
  config = qwen_bis10.get_config("toy")
  config.train.compiler_options = "xla_cpu_enable_fast_math=false xla_embed_ir_in_executable=true"
  check(config)
  given = {}
  jit = jax.jit
  monkeypatch.setattr(jax, "jit", lambda f, **k: given.update({f.__name__: k}) or jit(f, **k))
  model = backbones.model_config(config, 512)
  step_of(config, model, make_mesh(-1, 1, 1), 2)
  assert given["train_step"]["compiler_options"] == {
    "xla_cpu_enable_fast_math": False,
    "xla_embed_ir_in_executable": True,
  }


def test_an_unknown_option_is_named():
  with pytest.raises(UserError, match="compiler_options is 'xla_no=1', .* refuses: .*xla_no"):
    compiler_options(make_mesh(-1, 1, 1), "xla_no=1")


@pytest.mark.parametrize("text", ["xla_a", "=1", "xla_a=1 xla_b"])
def test_options_of_another_form_are_named(text):
  config = qwen_bis10.get_config("toy")
  config.train.compiler_options = text
  with pytest.raises(ConfigError, match="compiler_options is .*write NAME=VALUE"):
    check(config)


def _slice(kind, count):
  return [types.SimpleNamespace(device_kind=kind, id=i) for i in range(count)]


@pytest.mark.parametrize(
  ("chip", "devices", "row_tokens", "multiple", "tensor"),
  [
    ("v6e", 16, 4096, 16, 1),
    ("v6e", 16, 8192, 16, 2),  # the products of a whole row do not fit
    ("v5e", 64, 4096, 16, 4),  # 16 rows do not divide over 64 devices, nor over 32
    ("v5e", 64, 4096, 64, 2),  # products of 11.4 GB
    ("tpu7x", 8, 8192, 16, 1),
    ("v5p", 16, 8192, 16, 1),
    ("v5p", 16, 32_768, 16, 2),
    ("v6e", 8, 4096, 16, 2),  # the state takes twice as much
    ("v5p", 16, 131_072, 16, 1),  # more would not divide the four key heads: left to the user
    (None, 8, 8192, 16, 1),
  ],
)
def test_as_few_devices_as_a_row_needs_share_it(
  monkeypatch, chip, devices, row_tokens, multiple, tensor
):
  monkeypatch.setattr(chip_settings, "make_mesh", lambda devices, **sizes: sizes)
  config = qwen_bis10.get_config()
  config.inputs.row_tokens, config.inputs.row_multiple = row_tokens, multiple
  kind = CHIPS[chip].device_kind if chip else "cpu"
  sizes = {"data": 1, "fsdp": -1, "tensor": tensor}
  assert chip_settings.run_mesh(config, _slice(kind, devices)) == sizes
  config.mesh.tensor = 8
  assert chip_settings.run_mesh(config, _slice(kind, devices))["tensor"] == 8


@pytest.mark.parametrize(
  ("chip", "shards", "tensor", "rows", "row_tokens", "number"),
  [
    ("v6e", 16, 1, 80, 4096, 5),
    ("v6e", 8, 2, 32, 8192, 4),
    ("v5p", 16, 1, 96, 4096, 2),  # three rows of six at a time
    ("v5p", 16, 1, 80, 4096, 5),  # three or four do not divide five
    ("tpu7x", 8, 1, 80, 4096, 5),  # two rows of ten
    ("v6e", 16, 1, 81, 4096, 1),  # an error elsewhere
    (None, 8, 1, 80, 4096, 1),
  ],
)
def test_a_micro_batch_is_what_fits(chip, shards, tensor, rows, row_tokens, number):
  config = qwen_bis10.get_config()
  config.inputs.row_tokens = row_tokens
  mesh = _mesh(CHIPS[chip].device_kind if chip else "cpu")
  mesh.shape, mesh.size = {"data": 1, "fsdp": shards, "tensor": tensor}, shards * tensor
  assert chip_settings.micro_batches(config, mesh, rows) == number
  config.train.accumulate = 3
  assert chip_settings.micro_batches(config, mesh, rows) == 3
