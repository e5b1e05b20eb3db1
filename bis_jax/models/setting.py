"""A key of a run's config: its default, the values that it may have, and what it means."""

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


@dataclass(frozen=True)
class Setting:
  """A row of the table of keys.

  Attributes:
    default: in full recipes.
    allowed: a tuple of choices, or conditions such as "> 0 and <= 1" or ">= 1 or = -1"; None: any
      value of the default's type.
    meaning: with the unit.
    toy: in the toy form; None: the default.
  """

  default: Any
  allowed: tuple[Any, ...] | str | None
  meaning: str
  toy: Any = None

  def allows(self, value: Any) -> bool:
    if self.allowed is None:
      return True
    if isinstance(self.allowed, tuple):
      return value in self.allowed
    return any(
      all(
        _CONDITIONS[name](value, float(bound))
        for name, bound in (condition.rsplit(" ", 1) for condition in alternative.split(" and "))
      )
      for alternative in self.allowed.split(" or ")
    )

  def words(self) -> str:
    """Returns the allowed values in words; "" for any."""
    if isinstance(self.allowed, tuple):
      return "one of " + ", ".join(map(str, self.allowed))
    return (self.allowed or "").replace("multiple of", "a multiple of")
