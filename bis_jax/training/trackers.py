"""The metrics of a run for Weights & Biases or trackio, beside metrics.jsonl and TensorBoard.

Both follow their own environment variables: WANDB_MODE=offline, TRACKIO_DIR, ...
"""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from bis_jax.errors import UserError
from bis_jax.files import digest
from bis_jax.settings.keys import flatten

PROJECT = "bis_jax"


def check(config: ConfigDict) -> None:
  """Raises UserError if the tracker of a config is not installed."""
  name = config.train.tracker
  if name != "none" and importlib.util.find_spec(name) is None:
    raise UserError(f"config.train.tracker is {name!r}, which is not installed: pip install {name}")


class Tracker:
  """A run of config.train.tracker, which a resumed run continues; does nothing for "none"."""

  def __init__(self, config: ConfigDict, workdir: epath.Path):
    self._run = None
    if config.train.tracker == "none":
      return
    library: Any = importlib.import_module(config.train.tracker)
    own = {"id": digest(str(workdir))} if config.train.tracker == "wandb" else {}
    values = {key: str(value) for key, value in flatten(config).items()}
    self._run = library.init(
      project=PROJECT, name=workdir.name, config=values, resume="allow", **own
    )

  def log(self, step: int, values: Mapping[str, float]) -> None:
    if self._run:
      self._run.log(dict(values), step=step)

  def close(self) -> None:
    if self._run:
      self._run.finish()
