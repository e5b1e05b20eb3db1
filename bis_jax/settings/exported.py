"""What an exported folder keeps of its run, so that it scores and trains on as the run did.

{"bis_jax": "0.1.0", "step": 110, "manifest_digest": "3f2a...",
 "thresholds": {"fixed_0.5": 0.5, "tuned_on_dev": 0.43},
 "config": {"inputs": {"separator": "\\n\\n", ...}, "qwen2_5_vl": {...}, ...}}
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from etils import epath
from ml_collections import ConfigDict

import bis_jax
from bis_jax import files
from bis_jax.hub.weights import is_hub_id
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
  thresholds: dict[str, float] = {}


def content(
  config: ConfigDict,
  step: int,
  manifest: Mapping[str, Any],
  evaluation: Mapping[str, Any] | None,
) -> dict[str, Any]:
  """Returns what to write; `manifest` and `evaluation` are those JSON files of the workdir."""
  kept = {k: v for k, v in flatten(config).items() if not k.startswith(_LOCAL)}
  if not is_hub_id(config.model.checkpoint):
    kept["model.checkpoint"] = ""
  held = Exported(
    bis_jax=bis_jax.__version__,
    step=step,
    config=nest(kept).to_dict(),
    manifest_digest=manifest.get("digest"),
    thresholds=thresholds(evaluation),
  )
  return msgspec.to_builtins(held)


def thresholds(evaluation: Mapping[str, Any] | None) -> dict[str, float]:
  """Returns {origin: threshold} of an evaluation.json; {} for None."""
  blocks = evaluation["thresholds"] if evaluation else {}
  return {name: block["threshold"] for name, block in blocks.items()}


def read(folder: epath.Path) -> tuple[ConfigDict, Exported]:
  """Returns the config, with defaults for what the file lacks, and the file's content."""
  path = folder / FILE
  remedy = "export the run again, or get the folder again"
  held = files.read_json(path, remedy, Exported, WorkdirError)
  defaults = {key: setting.default for key, setting in all_settings().items()}
  return nest(checked(path, defaults | renamed(flatten(held.config)), remedy)), held
