"""The folder of one run: who owns it, and how files are written into it."""

import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from bis_jax import files
from bis_jax.errors import UserError
from bis_jax.models.backbones import BACKBONES

# Keys of older workdirs, and what they are called now.
RENAMED_KEYS = {
  "inputs.min_pixels": "qwen2_5_vl.min_pixels",
  "inputs.max_pixels": "qwen2_5_vl.max_pixels",
  "inputs.max_tiles": "internvl.max_tiles",
  "inputs.system": "internvl.system",
  "model.drop_path": "internvl.drop_path",
}

# Keys that change how a run is carried out but not what comes out of it.
FREE_KEYS = (
  "corpus.workers",
  "inputs.workers",
  "inputs.prefetch",
  "train.log_every",
  "train.checkpoint_every",
  "train.keep_checkpoints",
  "train.profile_steps",
  "train.compile_cache",
  "mesh.",
  "evaluation.",
)


class WorkdirError(UserError):
  """The workdir belongs to another run, or does not hold what is asked of it."""


def flat_keys(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns {"a": {"b": 1}} as {"a.b": 1}."""
  flat = {}
  for key, value in tree.items():
    flat |= (
      flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    )
  return flat


def _stored(path: epath.Path) -> dict[str, Any]:
  """Returns {key: value} of a config.json under today's keys, of whatever version it is."""
  flat = {RENAMED_KEYS.get(k, k): v for k, v in flat_keys(json.loads(path.read_text())).items()}
  flat.setdefault("evaluation.batch_rows", flat.get("inputs.row_multiple"))
  return flat


def read_config(workdir: epath.Path) -> ConfigDict:
  """Returns the config of a run, of this version or an older one.

  Raises:
    WorkdirError: it is not the workdir of a run.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise WorkdirError(f"{workdir} holds no config.json: name the workdir of a run")
  config: dict[str, Any] = {}
  for key, value in _stored(path).items():
    *sections, name = key.split(".")
    section = config
    for part in sections:
      section = section.setdefault(part, {})
    section[name] = value
  return ConfigDict(config)


def claim(workdir: epath.Path, config: ConfigDict) -> None:
  """Makes the workdir this run's: writes config.json, or checks that the one there is the same.

  Args:
    workdir: the folder; made if absent.
    config: the run's config.

  Raises:
    WorkdirError: config.json is of another run, or the folder holds other things.
  """
  ours = json.loads(config.to_json())
  path = workdir / "config.json"
  if path.exists():
    there, here = _stored(path), flat_keys(ours)
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
  elif workdir.exists() and any(workdir.iterdir()):
    raise WorkdirError(
      f"{workdir} holds files but no config.json, so it is no run's workdir: name an empty or new "
      "folder as --workdir"
    )
  else:
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(path, ours)
