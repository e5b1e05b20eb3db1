"""Checks a run's config before any work starts."""

from ml_collections import ConfigDict

from bis_jax.errors import UserError
from bis_jax.models.backbones import BACKBONES
from bis_jax.models.processor import image_processor
from bis_jax.settings.keys import all_settings, flatten, renamed


class ConfigError(UserError):
  """A config that no run can start from; its message names every key at fault."""


def check(config: ConfigDict) -> None:
  """Raises ConfigError naming every key outside its range and every contradiction."""
  c, settings, values = config, all_settings(), flatten(config)
  faults = [f"config.{key}: {renamed(key)}" for key in values if key not in settings]
  faults += [f"config.{key} is missing" for key in settings if key not in values]
  if faults:
    raise ConfigError("the config cannot be run:\n  " + "\n  ".join(faults))
  for key, setting in settings.items():
    value, section = values[key], key.split(".")[0]
    if not setting.allows(value):
      faults.append(f"config.{key} is {value!r}; it must be {setting.words()}")
    elif section in BACKBONES and section != c.model.backbone:
      if value not in (setting.default, setting.toy):
        faults.append(
          f"config.{key} is {value!r}, which {c.model.backbone} does not read: leave it at "
          f"{setting.default!r}"
        )
  for low, high in (
    ("labels.band_low", "labels.band_high"),
    ("inputs.max_length", "inputs.row_tokens"),
  ):
    if values[low] > values[high]:
      faults.append(f"config.{low} ({values[low]}) must not exceed config.{high} ({values[high]})")
  if backbone := BACKBONES.get(c.model.backbone):
    if c.model.size in backbone.sizes:
      faults += backbone.config_faults(c, image_processor(c))
    else:
      names = ", ".join(backbone.sizes)
      faults.append(f"config.model.size is {c.model.size!r}; {backbone.name} has {names}")
  profile = tuple(c.train.profile_steps)
  if profile != (0, 0) and (len(profile) != 2 or min(profile) < 1):
    faults.append(
      f"config.train.profile_steps is {profile}; it must be (first step, number), both >= 1, or (0, 0)"
    )
  if c.pretrain.steps and (c.corpus.name != "toy" or c.model.checkpoint):
    faults.append(
      f"config.pretrain.steps is {c.pretrain.steps}, but only the toy corpus has captions, for "
      'a model without a checkpoint: set it to 0, or corpus.name to "toy" and model.checkpoint to ""'
    )
  if c.labels.kind == "truth" and c.corpus.name != "toy":
    faults.append(
      "config.labels.kind is 'truth', but only the toy corpus knows it: set corpus.name to "
      '"toy", or labels.kind to "hard", "soft" or "banded"'
    )
  if [c.mesh.data, c.mesh.fsdp, c.mesh.tensor].count(-1) > 1:
    faults.append("at most one of config.mesh.data, .fsdp and .tensor may be -1")
  if faults:
    raise ConfigError("the config cannot be run:\n  " + "\n  ".join(faults))
