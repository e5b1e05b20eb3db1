"""Imports the modules in the rooms of bis_jax, then runs `bis_jax.main` with the arguments given.

Deprecations that bis_jax's own lines cause are errors; those inside libraries are not. `python -W`
cannot say so: it takes no pattern for the module.
"""

import importlib
import pathlib
import pkgutil
import runpy
import sys
import warnings

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])  # configs/ is not installed

if __name__ == "__main__":  # worker processes import this file again
  import bis_jax

  for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
    warnings.filterwarnings("error", category=category, module=r"bis_jax\b|configs\b|__main__")
  for module in pkgutil.walk_packages(bis_jax.__path__, "bis_jax."):
    if module.name.count(".") > 1:  # the modules above are commands, whose flags collide
      importlib.import_module(module.name)
  runpy.run_module("bis_jax.main", run_name="__main__", alter_sys=True)
