"""The record of a backbone; docs/new_backbone.md says how to add one."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from bis_jax.inputs.images import ImageProcessor
from bis_jax.inputs.prompt import Prompt
from bis_jax.models.hub_layout import Layout
from bis_jax.models.setting import Setting

VISION_TOWER = "vision tower"  # in place of a regex of parameters: the record's `tower`


@dataclass(frozen=True)
class Processor:
  """Tokenizer (with the step marker), prompt formatter and image preprocessor of a backbone."""

  tokenizer: Any  # of the backbone's own class, an `inputs.prompt.Tokenizer`
  prompt: Any  # an `inputs.prompt.Prompt`
  images: Any  # an `inputs.images.ImageProcessor`


@dataclass(frozen=True)
class Backbone:
  name: str  # of the record, of the folder, and of the backbone's own section of a run's config

  # The model.
  sizes: Mapping[str, Any]  # name -> model config
  model: Callable[[Any, nnx.Rngs], nnx.Module]  # from a model config
  sharding: tuple[tuple[str, PartitionSpec], ...]  # by regex, of parameters outside the decoder
  tower: str  # regex of the vision tower's parameters, which the published recipes freeze
  # Path prefixes of kernels before the decoder, in forward order; the first two are the tower's.
  stages: tuple[str, ...]
  # From a model config and the patch slots of every image, the rows that each stage computes, and
  # the number of (query, key) pairs of the tower's attention over all its layers.
  vision_rows: Callable[[Any, np.ndarray], tuple[list[float], float]]

  # The inputs.
  load_tokenizer: Callable[[str], Any]  # from a folder or hub id
  make_prompt: Callable[[Any, str, ConfigDict], Prompt]  # from tokenizer, separator, own section
  make_images: Callable[[Any, ConfigDict], ImageProcessor]  # from model config and own section
  rollout_tokens: int  # slots of packed rows per rollout of VisualPRM400K, padding included,
  prefix_tokens: int  # of which the images and the question take about

  # The config.
  settings: Mapping[str, Setting]  # the own section, by key
  config_faults: Callable[[ConfigDict, Any], list[str]]  # of a run's config and its image processor
  row_patches: int  # default of config.inputs.row_patches,
  toy_row_patches: int  # and in the toy form

  # Checkpoints and exports. `base` is the config.json of the initial checkpoint; {}: none.
  checkpoint: str  # hub id to suggest if a recipe's checkpoint is missing
  layout: Callable[[Any, Mapping[str, Any]], Layout]  # from model config and the file's config.json
  config_json: Callable[[Any, Any, Mapping[str, Any]], dict[str, Any]]  # model, processor, base
  preprocessor_json: Callable[[Any], dict[str, Any]]  # from the image processor
  # From the same, {name: text or content to add to a JSON file} that servers read.
  serving_files: Callable[[Any, Any, Mapping[str, Any]], dict[str, Any]]
  is_plain: Callable[[Any, Mapping[str, Any]], bool]  # (model, base): loads without foreign code
  # From a config.json, the keys of a run's config with which a published reward model scores.
  published: Callable[[Mapping[str, Any]], dict[str, Any]]
  card: str  # template of the model card, a path in models/

  model_settings: tuple[str, ...] = ()  # keys of the own section that the model config has, too
  refused: Mapping[str, str] = dataclasses.field(default_factory=dict)  # published sizes: why
