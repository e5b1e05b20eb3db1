"""Checked JSON records of benchmarks, scores and candidates."""

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, TypeVar

import msgspec

from bis_jax import files
from bis_jax.corpus.rejections import BadRecord
from bis_jax.errors import UserError

Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
_T = TypeVar("_T")
_SHOWN_FAULTS = 20


class EvaluationError(UserError):
  """A benchmark, scores or candidates that do not have their documented form."""


def convert(value: object, form: type[_T]) -> _T:
  """Returns a JSON value as a msgspec type; the EvaluationError names the key that does not fit."""
  try:
    return msgspec.convert(value, form)
  except (msgspec.ValidationError, UnicodeError) as error:
    raise EvaluationError(str(error)) from error


def read(path: str, form: type[_T]) -> Iterator[tuple[str, _T]]:
  """Yields ("FILE line N", record) of a JSON lines file."""
  for number, value in files.read_jsonl(path, EvaluationError):
    where = f"{path} line {number}"
    try:
      yield where, convert(value, form)
    except EvaluationError as error:
      raise EvaluationError(f"{where}: {error}") from error


def parse_items(
  source: object, records: Iterable[tuple[str, Any]], parse: Callable[[int, Any], _T]
) -> list[_T]:
  """Returns parse(index, record) of every (place, record).

  Raises an EvaluationError that lists the first twenty faults of `source` with their places.
  """
  items, faults = [], []
  for index, (place, record) in enumerate(records):
    try:
      items.append(parse(index, record))
    except (UserError, BadRecord) as error:
      faults.append(f"{place}: {error}")
  if faults:
    shown = "\n  ".join(faults[:_SHOWN_FAULTS])
    more = len(faults) - _SHOWN_FAULTS
    rest = f"\n  ... and {more} more" if more > 0 else ""
    raise EvaluationError(f"{source}: {len(faults)} bad items; correct them:\n  {shown}{rest}")
  if not items:
    raise EvaluationError(f"{source} holds no item: it is empty")
  return items
