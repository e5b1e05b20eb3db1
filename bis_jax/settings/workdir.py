"""The folder of one run: which run owns it, and how files are written into it."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from bis_jax import files
from bis_jax.console import log
from bis_jax.errors import UserError
from bis_jax.models.backbone import VISION_TOWER
from bis_jax.models.backbones import BACKBONES
from bis_jax.settings.keys import RENAMED, all_settings, flatten, nest

# Keys that do not change the result of a run, so that it may resume with other values.
FREE_KEYS = (
  "corpus.workers",
  "inputs.workers",
  "inputs.prefetch",
  "train.log_every",
  "train.checkpoint_every",
  "train.keep_checkpoints",
  "train.profile_steps",
  "train.compile_cache",
  "train.tracker",
  "train.accumulate",
  "optim.on_host",
  "train.compiler_options",
  "model.remat",
  "mesh.",
  "evaluation.",
)
# The default of model.learning_rates in the first versions, which named all vision towers.
_OLD_RATES = [[r"visual\.(?!merger)|vision_model\.", 0.0], [".*", 1.0]]

# Keys that the first versions lacked, which trained as the defaults do.
_LATER = (
  "corpus.format",
  "corpus.agreement",
  "corpus.toy.described",
  "corpus.toy.kinds",
  "corpus.toy.first_kind",
  "corpus.toy.kind_exponent",
  "inputs.stream_tokens",
  "internvl.prompt",
  "labels.neutral",
  "labels.min_continuations",
  "labels.until_first_wrong",
  "model.frozen_dtype",
  "model.trained_dtype",
  "lora.rank",
  "lora.alpha",
  "lora.dropout",
  "optim.second_moment_dtype",
  "optim.on_host",
  "train.compiler_options",
  "train.tracker",
)

OWNER = "owner.json"  # names the process that runs in the workdir
_FIRST = {OWNER, "seen-by-all", "config.json", "digests.json"}  # what a run writes first


class WorkdirError(UserError):
  """The workdir belongs to another run, or does not hold what is needed of it."""


def _stored(path: epath.Path) -> dict[str, Any]:
  """Returns {key: value} of a config.json of any version under today's keys."""
  held = files.read_json(path, "put it back, or start again in a new workdir", error=WorkdirError)
  return renamed(flatten(held))


def renamed(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {key: value} of a config of any version under today's keys."""
  flat = {RENAMED.get(k, k): v for k, v in flat.items()}
  sections = {key.split(".")[0] for key in flat}
  for name in {*BACKBONES} - sections:  # of backbones that came later
    for key, setting in BACKBONES[name].settings.items():
      flat[f"{name}.{key}"] = setting.default
  flat.setdefault("inputs.row_streams", 0)
  flat.setdefault("evaluation.batch_rows", flat.get("inputs.row_multiple"))
  for key in _LATER:
    flat.setdefault(key, all_settings()[key].default)
  if flat.get("model.attention") == "triton":
    flat["model.attention"] = "auto"
  if flat.get("model.learning_rates") == _OLD_RATES:
    flat["model.learning_rates"] = [[VISION_TOWER, 0.0], [".*", 1.0]]
  return flat


def read_config(workdir: epath.Path) -> ConfigDict:
  """Returns the config of a run, of this version or an older one.

  Raises WorkdirError if it is not the workdir of a run.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise WorkdirError(
      f"{workdir} holds no config.json: name a workdir, an exported folder or a hub id"
    )
  files.changed_files(workdir, path.name)
  return nest(checked(path, _stored(path), "put the file back"))


def checked(path: epath.Path, flat: dict[str, Any], remedy: str) -> dict[str, Any]:
  """Returns `flat`; raises WorkdirError naming a key that a config file lacks or has wrong."""
  for key, setting in all_settings().items():
    if key not in flat or not setting.allows(flat[key]):
      raise WorkdirError(
        f"{path}: {key} is {flat.get(key, 'missing')!r}; it must be {setting.words()}: {remedy}"
      )
  return flat


def claim(workdir: epath.Path, config: ConfigDict) -> None:
  """Writes config.json into the workdir, or checks that it is the same; makes an absent folder.

  Raises WorkdirError if config.json is of another run, or the folder holds other files.
  """
  ours = json.loads(config.to_json())
  path = workdir / "config.json"
  names, there = {file.name for file in workdir.iterdir()} if workdir.exists() else set(), None
  if path.name in names:
    try:
      there = _stored(path)
    except WorkdirError:
      if names - _FIRST:
        raise
      log.warning("%s is damaged, and nothing else is there: writing it again", path)
  if there is not None:
    here = flatten(ours)
    free = (*FREE_KEYS, *(f"{name}." for name in BACKBONES if name != config.model.backbone))
    differ = [
      f"config.{key}: {there.get(key)!r} there, {here.get(key)!r} here"
      for key in sorted(there | here)
      if there.get(key) != here.get(key) and not key.startswith(free)
    ]
    if differ:
      raise WorkdirError(
        f"{workdir} holds a run of another config, and nothing was changed there:\n  "
        + "\n  ".join(differ)
        + "\nGive this run a --workdir of its own, or the values of the run that is there."
      )
  elif names - _FIRST:
    raise WorkdirError(
      f"{workdir} holds files but no config.json, so it is not the workdir of a run: name an empty or "
      "new folder as --workdir"
    )
  else:
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(path, ours)
    files.note_digests(path)


def release(workdir: epath.Path) -> None:
  """Empties a workdir that this run claimed, unless it trained a step: another config may have it."""
  metrics, steps = workdir / "metrics.jsonl", workdir / "checkpoints"
  if (metrics.exists() and metrics.read_text()) or (
    steps.exists() and any(path.name.isdigit() for path in steps.iterdir())
  ):
    return
  for path in workdir.iterdir():
    if path.is_dir():
      path.rmtree()
    elif path.name != OWNER:
      path.unlink()
