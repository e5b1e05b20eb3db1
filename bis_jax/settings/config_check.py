"""Checks a run's config before any work starts."""

import difflib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from bis_jax.errors import UserError
from bis_jax.models import backbones, learning_rates
from bis_jax.models.backbones import BACKBONES
from bis_jax.models.model_config import LORA
from bis_jax.models.processor import image_processor
from bis_jax.settings.keys import RENAMED, all_settings, flatten
from bis_jax.toy.pictures import MOST_STRIPES


class ConfigError(UserError):
  """A config that no run can start from; its message names every key at fault."""

  def __init__(self, faults: Sequence[str]):
    super().__init__("\n  ".join(["the config cannot be run:", *faults]))


def check(config: ConfigDict) -> None:
  """Raises ConfigError naming every key outside its range, or else every contradiction."""
  values = flatten(config)
  if faults := _key_faults(values) or _value_faults(values) or _contradictions(config):
    raise ConfigError(faults)


def _key_faults(values: dict[str, Any]) -> list[str]:
  settings = all_settings()
  faults = []
  for key in (key for key in values if key not in settings):
    [nearest] = difflib.get_close_matches(key, settings, 1, cutoff=0)
    words = "it is now" if key in RENAMED else "unknown key; the nearest is"
    faults.append(f"config.{key}: {words} config.{RENAMED.get(key, nearest)}")
  return faults + [f"config.{key} is missing" for key in settings if key not in values]


def _value_faults(values: dict[str, Any]) -> list[str]:
  """Returns a sentence for each key whose value has another type or is out of its range."""
  faults = []
  for key, setting in all_settings().items():
    value, section = values[key], key.split(".")[0]
    if not setting.allows(value):
      faults.append(f"config.{key} is {value!r}; it must be {setting.words()}")
    elif section in BACKBONES and section != values["model.backbone"]:
      if value not in (setting.default, setting.toy):
        faults.append(
          f"config.{key} is {value!r}, which {values['model.backbone']} does not read: leave it at "
          f"{setting.default!r}"
        )
  return faults


def _contradictions(c: ConfigDict) -> list[str]:
  """Returns a sentence for each pair of values, each in its range, that do not go together."""
  toy, backbone = c.corpus.name == "toy", BACKBONES[c.model.backbone]
  if c.model.size not in backbone.sizes:
    sizes, why = ", ".join(backbone.sizes), backbone.refused.get(c.model.size)
    size = f"{c.model.size!r}, which is refused: {why}" if why else repr(c.model.size)
    return [f"config.model.size is {size}; it must be one of {sizes} ({backbone.name})"]
  published = bool(backbone.sizes[c.model.size].text.vocab_size)
  rules = (
    (
      c.labels.band_low > c.labels.band_high,
      f"config.labels.band_low ({c.labels.band_low}) must not exceed config.labels.band_high "
      f"({c.labels.band_high})",
    ),
    (
      c.inputs.max_length > c.inputs.row_tokens,
      f"config.inputs.max_length ({c.inputs.max_length}) must not exceed config.inputs.row_tokens "
      f"({c.inputs.row_tokens})",
    ),
    (
      c.inputs.row_streams * c.inputs.stream_tokens >= c.inputs.row_tokens,
      f"config.inputs.row_streams ({c.inputs.row_streams}) times config.inputs.stream_tokens "
      f"({c.inputs.stream_tokens}) must be less than config.inputs.row_tokens "
      f"({c.inputs.row_tokens}), which also hold the prefixes",
    ),
    (
      c.inputs.stream_tokens and not c.inputs.row_streams,
      f"config.inputs.stream_tokens is {c.inputs.stream_tokens}, but config.inputs.row_streams is 0: "
      "set stream_tokens to 0 or row_streams to the number of streams",
    ),
    (
      c.pretrain.steps and (not toy or c.model.checkpoint),
      f"config.pretrain.steps is {c.pretrain.steps}, but only the toy corpus has captions, for "
      'a model without a checkpoint: set it to 0, or corpus.name to "toy" and model.checkpoint to ""',
    ),
    (
      c.pretrain.steps and c.corpus.toy.described,
      f"config.pretrain.steps is {c.pretrain.steps}, but a described toy corpus has no pictures to caption: "
      "set it to 0",
    ),
    (
      c.corpus.toy.kinds % MOST_STRIPES or c.corpus.toy.first_kind % MOST_STRIPES,
      f"config.corpus.toy.kinds is {c.corpus.toy.kinds} and first_kind is {c.corpus.toy.first_kind}: "
      f"give multiples of {MOST_STRIPES}, as many kinds for each score",
    ),
    (
      toy and published and not c.model.checkpoint,
      f"config.model.size is {c.model.size!r}, a published size, which cannot be trained from the toy "
      'corpus alone: set it to "toy", or model.checkpoint to its weights',
    ),
    (
      not all("=" in option.lstrip("=") for option in c.train.compiler_options.split()),
      f"config.train.compiler_options is {c.train.compiler_options!r}: write NAME=VALUE, separated by "
      "spaces",
    ),
    (
      c.labels.kind == "beta" and c.loss.normalise == "micro",
      "config.labels.kind is 'beta', but config.loss.normalise is 'micro', the release's mean of hard "
      "labels: set it to 'global'",
    ),
    (
      c.labels.kind == "truth" and not toy,
      "config.labels.kind is 'truth', but only the toy corpus knows it: set corpus.name to "
      '"toy", or labels.kind to "hard", "soft" or "banded"',
    ),
  )
  bad_rules = learning_rates.malformed(c)
  if not bad_rules:
    _, shapes = backbones.shapes(backbones.model_config(c, vocab_size=1))
    bad_rules = learning_rates.faults(c, list(shapes)) + _unused_lora(c)
  return (
    [sentence for wrong, sentence in rules if wrong]
    + backbone.config_faults(c, image_processor(c))
    + bad_rules
  )


def _unused_lora(c: ConfigDict) -> list[str]:
  settings, values = all_settings(), {rule[1] for rule in c.model.learning_rates}
  needs = dict.fromkeys([f"lora.{key}" for key in c.lora], {LORA}) | {
    "model.frozen_dtype": {LORA, 0.0}
  }
  return [
    f"config.{key} is {value!r}, but no rule of config.model.learning_rates is "
    f"{' or '.join(map(repr, sorted(needed, key=str)))}: add one, or leave it at "
    f"{settings[key].default!r}"
    for key, needed in needs.items()
    if (value := c[key.split(".")[0]][key.split(".")[1]]) != settings[key].default
    and not needed & values
  ]
