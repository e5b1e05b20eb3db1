"""Checks a run's config before any work starts.

`configs/common.py` says what every key means; here stand the ranges, one line a key.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from bis_jax.errors import UserError
from bis_jax.models.backbone import Setting
from bis_jax.models.backbones import BACKBONES
from bis_jax.models.processor import image_processor
from bis_jax.selection.strategies import STRATEGIES


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
  return lambda value: value in names, "one of " + ", ".join(names)


def _at_least(low: float) -> tuple[Callable[[Any], bool], str]:
  return lambda value: value >= low, f"at least {low}"


_POSITIVE = (lambda value: value > 0, "above 0")
_SHARE = (lambda value: 0 <= value < 1, "in [0, 1)")
_CLOSED_SHARE = (lambda value: 0 <= value <= 1, "in [0, 1]")
_BLOCKS = (lambda value: value > 0 and value % 64 == 0, "a positive multiple of 64")
_AXIS = (
  lambda value: value == -1 or value >= 1,
  "a positive number of devices, or -1 for the rest",
)

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
  "seed": _at_least(0),
  "corpus.name": _one_of("visualprm", "toy"),
  "corpus.tau": _SHARE,
  "corpus.unmeasured": _one_of("negative", "ignore"),
  "corpus.max_rejected_fraction": _CLOSED_SHARE,
  "corpus.workers": _at_least(0),
  "corpus.toy.rollouts": _at_least(1000),
  "corpus.toy.images": _at_least(300),
  "corpus.toy.seed": _at_least(0),
  "corpus.toy.benchmark_items": _at_least(18),
  "corpus.toy.n_mc": _at_least(1),
  "corpus.toy.rollouts_a_group": _at_least(1),
  "corpus.toy.slip": _at_least(0),
  "corpus.toy.recovery": _at_least(0),
  "corpus.toy.lapse": _at_least(0),
  "corpus.toy.continuation_slip": _at_least(0),
  "selection.strategy": _one_of(*STRATEGIES),
  "selection.fraction": (lambda value: 0 < value <= 1, "in (0, 1]"),
  "selection.alpha": _at_least(0),
  "selection.none_positive": _CLOSED_SHARE,
  "labels.kind": _one_of("hard", "soft", "banded", "truth"),
  "labels.band_low": _CLOSED_SHARE,
  "labels.band_high": _CLOSED_SHARE,
  "inputs.max_length": _at_least(16),
  "inputs.row_tokens": _at_least(16),
  "inputs.row_patches": _BLOCKS,
  "inputs.row_markers": _at_least(1),
  "inputs.row_multiple": _at_least(1),
  "inputs.lookahead": _at_least(1),
  "inputs.workers": _at_least(0),
  "inputs.prefetch": _at_least(1),
  "model.dtype": _one_of("float32", "bfloat16"),
  "model.remat": _one_of("none", "dots", "offload", "full"),
  "model.attention": _one_of("auto", "splash", "triton", "xla"),
  "model.marker_noise": _at_least(0),
  "pretrain.seed": _at_least(-1),
  "pretrain.steps": _at_least(0),
  "pretrain.rows": _at_least(1),
  "pretrain.row_tokens": _at_least(16),
  "pretrain.learning_rate": _POSITIVE,
  "loss.normalise": _one_of("global", "micro"),
  "optim.learning_rate": _POSITIVE,
  "optim.warmup": _SHARE,
  "optim.weight_decay": _at_least(0),
  "optim.b1": _SHARE,
  "optim.b2": _SHARE,
  "optim.eps": _POSITIVE,
  "optim.clip": _POSITIVE,
  "optim.moment_dtype": _one_of("float32", "bfloat16"),
  "train.global_batch": _at_least(1),
  "train.accumulate": _at_least(1),
  "train.epochs": _at_least(1),
  "train.steps": _at_least(0),
  "train.log_every": _at_least(1),
  "train.checkpoint_every": _at_least(1),
  "train.keep_checkpoints": _at_least(1),
  "train.profile_steps": (
    lambda value: len(value) == 2 and (min(value) > 0 or tuple(value) == (0, 0)),
    "(first step, how many), both at least 1, or (0, 0)",
  ),
  "mesh.data": _AXIS,
  "mesh.fsdp": _AXIS,
  "mesh.tensor": _AXIS,
  "evaluation.images": _one_of("multi", "canvas", "first"),
  "evaluation.batch_rows": _at_least(1),
  "evaluation.every": _at_least(0),
  "evaluation.every_items": _at_least(0),
  "evaluation.dev_rollouts": _at_least(0),
  "evaluation.page_items": _at_least(0),
}


class ConfigError(UserError):
  """A config that no run can start from; its message names every key at fault."""


def check(config: ConfigDict) -> None:
  """Raises ConfigError naming every key outside its range and every pair that contradicts."""
  faults = []
  for key, (holds, words) in RANGES.items():
    value = config
    for part in key.split("."):
      value = value[part]
    if not holds(value):
      faults.append(f"config.{key} is {value!r}; it must be {words}")
  c = config
  pairs = (
    ("labels.band_low", c.labels.band_low, "labels.band_high", c.labels.band_high),
    ("inputs.max_length", c.inputs.max_length, "inputs.row_tokens", c.inputs.row_tokens),
  )
  for low_key, low, high_key, high in pairs:
    if low > high:
      faults.append(f"config.{low_key} ({low}) must not exceed config.{high_key} ({high})")
  for name, backbone in BACKBONES.items():
    faults += _section_faults(name, backbone.settings, c)
  if backbone := BACKBONES.get(c.model.backbone):
    if c.model.size in backbone.sizes:
      faults += backbone.config_faults(c, image_processor(c))
    else:
      names = ", ".join(backbone.sizes)
      faults.append(f"config.model.size is {c.model.size!r}; {backbone.name} has {names}")
  else:
    names = ", ".join(BACKBONES)
    faults.append(f"config.model.backbone is {c.model.backbone!r}; it must be one of {names}")
  if c.pretrain.steps and (c.corpus.name != "toy" or c.model.checkpoint):
    faults.append(
      f"config.pretrain.steps is {c.pretrain.steps}, but only the embedded corpus has captions, for "
      'a model without a checkpoint: set it to 0, or corpus.name to "toy" and model.checkpoint to ""'
    )
  if c.labels.kind == "truth" and c.corpus.name != "toy":
    faults.append(
      "config.labels.kind is 'truth', but only the embedded corpus knows it: set corpus.name to "
      '"toy", or labels.kind to "hard", "soft" or "banded"'
    )
  if [c.mesh.data, c.mesh.fsdp, c.mesh.tensor].count(-1) > 1:
    faults.append("at most one of config.mesh.data, .fsdp and .tensor may be -1")
  if faults:
    raise ConfigError("the config cannot be run:\n  " + "\n  ".join(faults))


def _section_faults(name: str, settings: Mapping[str, Setting], c: ConfigDict) -> list[str]:
  """Returns what is wrong with the keys that only the backbone `name` reads."""
  faults = []
  for key, setting in settings.items():
    value, chosen = c[name][key], c.model.backbone
    if not setting.holds(value):
      faults.append(f"config.{name}.{key} is {value!r}; it must be {setting.words}")
    elif chosen != name and value not in (setting.default, setting.toy):
      faults.append(
        f"config.{name}.{key} is {value!r}, which {chosen} does not read: leave it at "
        f"{setting.default!r}"
      )
  return faults
