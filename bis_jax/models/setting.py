"""A key of a run's config: its default, the values that it may have, and what it means."""

import ast
import math
import operator
from dataclasses import dataclass
from typing import Any

_CONDITIONS = {
  ">=": operator.ge,
  ">": operator.gt,
  "<=": operator.le,
  "<": operator.lt,
  "=": operator.eq,
  "multiple of": lambda value, divisor: value % divisor == 0,
}
NOT_EMPTY = "not empty"  # a condition on text
OWN = "MODULE:FUNCTION"  # a choice: the path of a function of the user
_TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
_LARGEST = 2**31 - 1  # of any number: what int32 holds


@dataclass(frozen=True)
class Setting:
  """A row of the table of keys.

  Attributes:
    default: in full recipes; a value has its type, and a pair of numbers is a pair.
    allowed: a tuple of choices, NOT_EMPTY, or conditions such as "> 0 and <= 1" or ">= 1 or = -1";
      None: any value of the default's type.
    meaning: with the unit.
    toy: in the toy form; None: the default.
  """

  default: Any
  allowed: tuple[Any, ...] | str | None
  meaning: str
  toy: Any = None

  def allows(self, value: Any) -> bool:
    if isinstance(self.allowed, tuple):
      return isinstance(value, str) and (
        value in self.allowed or (OWN in self.allowed and ":" in value)
      )
    if not isinstance(self.default, tuple):
      return self._allows_one(value, type(self.default))
    if not isinstance(value, tuple | list):
      return False
    types = [type(part) for part in self.default]
    return self.allowed is None or (
      len(value) == len(types) and all(map(self._allows_one, value, types))
    )

  def _allows_one(self, value: Any, wanted: type) -> bool:
    if wanted is float and type(value) is int:
      value = float(value) if abs(value) <= _LARGEST else math.inf
    if type(value) is not wanted:
      return False
    if wanted is str:
      return self.allowed != NOT_EMPTY or bool(value.strip())
    if wanted is bool:
      return True
    conditions = "" if isinstance(self.allowed, tuple) else self.allowed
    return abs(value) <= _LARGEST and any(
      all(
        _CONDITIONS[name](value, float(bound))
        for name, bound in (condition.rsplit(" ", 1) for condition in alternative.split(" and "))
      )
      for alternative in (conditions or "<= inf").split(" or ")
    )

  def words(self) -> str:
    """Returns the type and the allowed values in words."""
    if isinstance(self.allowed, tuple):
      return "one of " + ", ".join(map(str, self.allowed))
    if isinstance(self.default, tuple):
      kind = "a pair of whole numbers" if self.allowed else "pairs"
    else:
      kind = _TYPES[type(self.default)]
    conditions = (self.allowed or "").replace("multiple of", "a multiple of")
    return f"{conditions}, {kind}" if conditions else kind

  def read(self, text: str) -> Any:
    """Returns the value that a text on the command line means, or the text if it means none."""
    if isinstance(self.default, str):
      return text
    if isinstance(self.default, bool):
      return {"true": True, "false": False}.get(text.lower(), text)
    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
      return text
    return float(value) if isinstance(self.default, float) and type(value) is int else value
