"""The backbones that a config can name, and functions of their records."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bis_jax.errors import UserError
from bis_jax.models import adaptation, decoder
from bis_jax.models.backbone import VISION_TOWER, Backbone
from bis_jax.models.internvl.record import INTERNVL
from bis_jax.models.model_config import LORA, Adaptation, ModelConfig
from bis_jax.models.param_tree import split
from bis_jax.models.qwen2_5_vl.record import QWEN2_5_VL
from bis_jax.models.qwen3_vl.record import QWEN3_VL
from bis_jax.parallel.sharding import P, parameter_shardings

BACKBONES: dict[str, Backbone] = {
  record.name: record for record in (QWEN2_5_VL, QWEN3_VL, INTERNVL)
}


class BackboneError(UserError):
  """A backbone that does not exist, or a tokenizer that does not fit its model."""


def get(name: str) -> Backbone:
  """Returns the record of a backbone; BackboneError names the known ones."""
  if name not in BACKBONES:
    raise BackboneError(f"config.model.backbone is {name!r}; it must be one of {[*BACKBONES]}")
  return BACKBONES[name]


def model_config(config: ConfigDict, vocab_size: int, marker_token: int = 0) -> ModelConfig:
  """Returns the model config; BackboneError if it has fewer embedding rows than `vocab_size`.

  `marker_token` is the step marker, whose embedding trains if others do not.
  """
  model, backbone = config.model, get(config.model.backbone)
  size = backbone.sizes[model.size]
  if not size.text.vocab_size:
    size = size.with_vocabulary(-(-vocab_size // 64) * 64)
  if vocab_size > size.text.vocab_size:
    raise BackboneError(
      f"the tokenizer has {vocab_size} tokens, size {model.size!r} of {model.backbone} only "
      f"{size.text.vocab_size} rows: set config.inputs.tokenizer to the tokenizer of the weights"
    )
  own = {key: config[backbone.name][key] for key in backbone.model_settings}
  return dataclasses.replace(
    size,
    dtype=model.dtype,
    remat=model.remat,
    attention=model.attention,
    adaptation=_adaptation(config, marker_token),
    **own,
  )


def learning_rates(config: ConfigDict) -> tuple[tuple[str, float | str], ...]:
  """Returns the rules of a config with regexes only."""
  tower = get(config.model.backbone).tower
  return tuple(
    (tower if pattern == VISION_TOWER else pattern, value)
    for pattern, value in config.model.learning_rates
  )


def _adaptation(config: ConfigDict, marker_token: int) -> Adaptation | None:
  rules, model = learning_rates(config), config.model
  dtypes = {model.frozen_dtype, model.trained_dtype}
  if dtypes == {"float32"} and all(value != LORA for _, value in rules):
    return None
  return Adaptation(
    rules,
    model.frozen_dtype,
    **config.lora,
    marker_token=marker_token,
    trained_dtype=model.trained_dtype,
  )


def build(config: ModelConfig, seed: int) -> nnx.Module:
  """Returns the model, randomly initialized; its adapters change nothing yet."""
  rngs = nnx.Rngs(seed)
  model = get(config.backbone).model(config, rngs)
  if config.adaptation:
    adaptation.adapt(model, config.adaptation, rngs)
  return model


def sharding(config: ModelConfig) -> tuple[tuple[str, P], ...]:
  rules = get(config.backbone).sharding + decoder.SHARDING
  return adaptation.sharding(rules) + rules


@functools.cache
def shapes(config: ModelConfig) -> tuple[nnx.GraphDef, Mapping[str, Any]]:
  """Returns the graph and the shape and dtype of each parameter by path; allocates no array."""
  return split(nnx.eval_shape(lambda: build(config, 0)))


def structure(
  config: ModelConfig, mesh: Mesh
) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
  """Returns `shapes` with the sharding of each parameter."""
  graph, params = shapes(config)
  shardings = parameter_shardings(mesh, sharding(config), params)
  return graph, {
    path: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[path])
    for path, shape in params.items()
  }
