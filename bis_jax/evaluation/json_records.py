"""Checked JSON records of benchmarks, scores and candidates."""

import difflib
import re
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
  except RecursionError as error:
    raise EvaluationError("nested too deep") from error
  except (msgspec.ValidationError, UnicodeError) as error:
    raise EvaluationError(_with_nearest_key(str(error), form)) from error


def _with_nearest_key(message: str, form: Any) -> str:
  unknown = re.search(r"unknown field `(.*?)`( - at `[^`]*`)?$", message, re.DOTALL)
  if not unknown:
    return message
  [nearest] = difflib.get_close_matches(unknown[1], _keys(msgspec.inspect.type_info(form)), 1, 0)
  return f"unknown key `{unknown[1]}`{unknown[2] or ''}; the nearest known key is `{nearest}`"


def _keys(form: msgspec.inspect.Type) -> list[str]:
  """Returns the keys of a type's structs, of the inner ones too."""
  if isinstance(form, msgspec.inspect.UnionType):
    return [key for option in form.types for key in _keys(option)]
  if isinstance(form, msgspec.inspect.ListType):
    return _keys(form.item_type)
  if not isinstance(form, msgspec.inspect.StructType):
    return []
  return [key for f in form.fields for key in (f.encode_name, *_keys(f.type))]


def read(path: str, form: type[_T]) -> Iterator[tuple[str, _T]]:
  """Yields ("FILE line N", record) of a JSON lines file."""
  file = files.absolute(path)
  files.changed_files(file.parent, file.name)
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
