"""The record of a backbone: all that the rest of bis_jax needs to know of one.

docs/new_backbone.md says how to add one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from bis_jax.inputs.images import ImageProcessor
from bis_jax.inputs.prompt import Prompt, Tokenizer
from bis_jax.models.hub_layout import Layout

_Kernels = list[tuple[float, float]]  # multiplications per input row, and input rows


@dataclass(frozen=True)
class Processor:
  """Tokenizer (with the step marker), prompt formatter and image preprocessor of a backbone."""

  tokenizer: Tokenizer
  prompt: Prompt
  images: ImageProcessor


@dataclass(frozen=True)
class Setting:
  """A key of the backbone's own section of a run's config.

  Attributes:
    default: in full recipes.
    toy: in the toy form.
    holds: whether a value is in range.
    words: the range in words.
  """

  default: Any
  toy: Any
  holds: Callable[[Any], bool]
  words: str


@dataclass(frozen=True)
class Backbone:
  """Functions and tables of a backbone.

  Attributes:
    name: of the folder, of the record, and of the backbone's own section of a run's config.
    sizes: name -> model config.
    model: the module, from a model config and random number generators.
    sharding: (regex of parameter paths, partition) of parameters outside the decoder.
    tower: regex of the vision tower's parameters, which the published recipes freeze.
    stages: path prefixes of kernels before the decoder, in forward order; the first two are the
      tower's.
    vision_flops: from a model config and the patch slots of every image, the kernels of every
      stage, and the number of (query, key) pairs of the tower's attention over all its layers.
    load_tokenizer: from a folder or hub id.
    make_prompt: from tokenizer, separator and own section.
    make_images: from model config and own section.
    rollout_tokens: token slots of a packed row per rollout of VisualPRM400K, padding included.
    settings: key -> setting of the own section.
    model_settings: keys of the own section that are fields of the model config.
    config_faults: from a run's config and its image processor, contradictions in words.
    row_patches: default of `config.inputs.row_patches`; `toy_row_patches` in the toy form.
    checkpoint: hub id to suggest if a recipe's checkpoint is missing.
    layout: of a checkpoint, from the model config and the checkpoint's config.json.
    config_json: content of an exported config.json, from model config, processor and the base
      checkpoint's config.json ({}: none).
    preprocessor_json: content of preprocessor_config.json.
    is_plain: whether Transformers loads an export without a checkpoint's code, from model config
      and the base's config.json.
    card: template of the model card, a path in `models/`.
  """

  name: str
  sizes: Mapping[str, Any]
  model: Callable[[Any, nnx.Rngs], nnx.Module]
  sharding: tuple[tuple[str, PartitionSpec], ...]
  tower: str
  stages: tuple[str, ...]
  vision_flops: Callable[[Any, np.ndarray], tuple[_Kernels, float]]
  load_tokenizer: Callable[[str], Tokenizer]
  make_prompt: Callable[[Any, str, ConfigDict], Prompt]
  make_images: Callable[[Any, ConfigDict], ImageProcessor]
  rollout_tokens: int
  settings: Mapping[str, Setting]
  config_faults: Callable[[ConfigDict, Any], list[str]]
  row_patches: int
  toy_row_patches: int
  checkpoint: str
  layout: Callable[[Any, Mapping[str, Any]], Layout]
  config_json: Callable[[Any, Processor, Mapping[str, Any]], dict[str, Any]]
  preprocessor_json: Callable[[Any], dict[str, Any]]
  is_plain: Callable[[Any, Mapping[str, Any]], bool]
  card: str
  model_settings: tuple[str, ...] = ()
