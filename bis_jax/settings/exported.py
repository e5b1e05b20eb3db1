"""What an exported folder keeps of its run, so that it scores and trains on as the run did.

{"bis_jax": "0.1.0", "step": 110, "manifest_digest": "3f2a...",
 "thresholds": {"fixed_0.5": 0.5, "tuned_on_dev": 0.43},
 "config": {"inputs": {"separator": "\\n\\n", ...}, "qwen2_5_vl": {...}, ...}}
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec
from etils import epath
from ml_collections import ConfigDict

import bis_jax
from bis_jax import files
from bis_jax.hub import weights
from bis_jax.hub.card import hub_id_of_base
from bis_jax.models.backbones import BACKBONES
from bis_jax.settings.keys import all_settings, flatten, nest
from bis_jax.settings.workdir import WorkdirError, checked, renamed

FILE = "bis_jax.json"
# Keys that only concern the place where the run was, which its reader does not need to know.
_LOCAL = (
  "corpus.annotations",
  "corpus.images",
  "corpus.cache",
  "corpus.workers",
  "inputs.tokenizer",
  "mesh.",
  "train.compile_cache",
  "train.tracker",
  "train.compiler_options",
  "model.attention",
  "model.remat",
  "evaluation.benchmark",
)


class Exported(msgspec.Struct):
  """The content of the file; `config` lacks the keys of the machine that the run was on."""

  bis_jax: str
  step: int
  config: dict[str, Any]
  manifest_digest: str | None = None
  base_sums: dict[str, int] = {}  # of adapters: checksums of what was frozen, as in checkpoints
  thresholds: dict[str, float] = {}


def content(
  config: ConfigDict,
  step: int,
  manifest: Mapping[str, Any],
  evaluation: Mapping[str, Any] | None,
  base_sums: dict[str, int] | None = None,
) -> dict[str, Any]:
  """Returns what to write; `manifest` and `evaluation` are those JSON files of the workdir."""
  kept = {k: v for k, v in flatten(config).items() if not k.startswith(_LOCAL)}
  kept["model.checkpoint"] = hub_id_of_base(config.model.checkpoint) or ""
  held = Exported(
    bis_jax=bis_jax.__version__,
    step=step,
    config=nest(kept).to_dict(),
    manifest_digest=manifest.get("digest"),
    thresholds=thresholds(evaluation),
    base_sums=base_sums or {},
  )
  return msgspec.to_builtins(held)


def thresholds(evaluation: Mapping[str, Any] | None) -> dict[str, float]:
  """Returns {origin: threshold} of an evaluation.json; {} for None."""
  blocks = evaluation["thresholds"] if evaluation else {}
  return {name: block["threshold"] for name, block in blocks.items()}


def read(folder: epath.Path) -> tuple[ConfigDict, Exported] | None:
  """Returns the config, with defaults for what the file lacks, and the file's content.

  A published reward model needs no file; None: `folder` is neither it nor an export.
  """
  path = folder / FILE
  if not path.exists():
    config = _published(folder)
    return (config, Exported(bis_jax="", step=0, config={})) if config else None
  remedy = "export the run again, or get the folder again"
  held = files.read_json(path, remedy, Exported, WorkdirError)
  return nest(checked(path, _defaults() | renamed(flatten(held.config)), remedy)), held


def differences(folder: epath.Path, config: ConfigDict) -> list[str]:
  """Returns a line for each setting of the inputs in which a run differs from the export it starts from."""
  found = read(folder)
  if not found:
    return []
  theirs, ours = flatten(found[0]), flatten(config)
  keys = ["inputs.separator", *(key for key in ours if key.startswith(f"{config.model.backbone}."))]
  return [
    f"config.{key} is {ours[key]!r}, {folder} was trained with {theirs[key]!r}"
    for key in keys
    if ours[key] != theirs[key]
  ]


def _defaults() -> dict[str, Any]:
  return {key: setting.default for key, setting in all_settings().items()}


def _published(folder: epath.Path) -> ConfigDict | None:
  raw, _ = weights.read_config(folder)
  for name, backbone in BACKBONES.items():
    if keys := backbone.published(raw):
      model = type(next(iter(backbone.sizes.values()))).from_hugging_face(raw)
      sizes = [key for key, size in backbone.sizes.items() if _shape(size) == _shape(model)]
      if not sizes:
        raise WorkdirError(f"{folder} is {name} of a size that is none of {[*backbone.sizes]}")
      own = {"model.backbone": name, "model.size": sizes[0]}
      return nest(_defaults() | own | {"inputs.row_patches": backbone.row_patches} | keys)
  return None


def _shape(model: Any) -> tuple[Any, Any]:
  return dataclasses.replace(model.text, vocab_size=0), model.vision
