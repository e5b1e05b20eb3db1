"""The base class of errors that the user can correct: shown as a message without a traceback."""

import importlib
from collections.abc import Callable
from typing import Any


class UserError(Exception):
  """Invalid input, setting or file; the message names it and the remedy.

  Commands catch this class and OSError only, so any other exception is a bug and keeps its
  traceback.
  """


def imported(name: str) -> Callable[..., Any]:
  """Returns the function of "package.module:function"; UserError if there is none."""
  module, _, function = name.partition(":")
  try:
    return getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    raise UserError(f"no function {name} ({error}): name an importable MODULE:FUNCTION") from error
