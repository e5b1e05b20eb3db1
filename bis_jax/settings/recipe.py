"""Recipes, Python files with a `get_config`, and the flags that name and change them.

--config names a file, such as configs/qwen_bis10.py, or one of our own recipes, such as qwen_bis10,
in any folder; `:toy` after it is another form. --config.KEY=VALUE sets a key of the table.
"""

import importlib.machinery
import importlib.util
import pathlib
import sys
import traceback
import types

from absl import flags
from ml_collections import ConfigDict

from bis_jax.errors import UserError
from bis_jax.settings.keys import RENAMED, all_settings, flatten, nest

flags.disclaim_key_flags()  # the flags are those of the command that calls `define_flags`

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
# Our own recipes: beside the package in a checkout, in it if it was installed.
_OWN = next(path for path in (_PACKAGE.parent / "configs", _PACKAGE / "configs") if path.is_dir())


class RecipeError(UserError):
  """A recipe that does not exist or cannot be executed."""


class _Renamed(flags.ArgumentParser):
  def __init__(self, new: str):
    self._new = new

  def parse(self, argument: str) -> None:
    raise ValueError(f"it is now config.{self._new}")


def define_flags() -> None:
  flags.DEFINE_string(
    "config", None, "recipe: configs/FILE.py, or a name such as toy_bis10", required=True
  )
  for key, setting in all_settings().items():
    boolean = isinstance(setting.default, bool)
    text = flags.ArgumentParser()
    flags.DEFINE_flag(
      flags.Flag(text, None, f"config.{key}", None, setting.meaning, boolean=boolean)
    )
  for old, new in RENAMED.items():
    flags.DEFINE_flag(flags.Flag(_Renamed(new), None, f"config.{old}", None, f"now config.{new}"))


def from_flags() -> ConfigDict:
  """Returns the recipe that --config names with the keys that other flags set, locked."""
  values = flatten(load(flags.FLAGS.config))
  for key, setting in all_settings().items():
    text = flags.FLAGS[f"config.{key}"].value
    if text is not None:
      values[key] = setting.read(text)
  return nest(values).lock()


def load(name: str) -> ConfigDict:
  """Returns the config of a recipe; raises RecipeError."""
  path, _, form = name.partition(":")
  places = (pathlib.Path(path).expanduser(), _OWN / f"{path}.py", _OWN.parent / path)
  file = next((place for place in places if place.is_file()), None)
  if file is None:
    known = ", ".join(sorted(place.stem for place in _OWN.glob("*.py") if place.stem != "common"))
    raise RecipeError(f"--config={name}: there is no file {path}, and the recipes are {known}")
  # Recipes import each other from `configs`, wherever they are.
  package = types.ModuleType("configs")
  package.__path__ = [str(file.resolve().parent), str(_OWN)]
  sys.modules["configs"] = package
  loader = importlib.machinery.SourceFileLoader(f"configs.{file.stem}", str(file))
  try:
    module = types.ModuleType(loader.name)
    loader.exec_module(module)
    config = module.get_config(*[form] if form else [])
  except Exception as error:  # the user's file may raise any
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    where = f"{file}:{lines[-1]}" if lines else str(file)
    raise RecipeError(f"--config={name}: {where}: {type(error).__name__}: {error}") from error
  if not isinstance(config, ConfigDict):
    raise RecipeError(
      f"--config={name}: get_config of {file} returns {type(config).__name__}: return the config"
    )
  return config
