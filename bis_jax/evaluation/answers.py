"""Which answers are the same, as text or as mathematics, by the library math-verify."""

import functools
import re
from collections.abc import Sequence

from bis_jax.errors import UserError

# What is compared as mathematics: LaTeX, or numbers and signs alone. Words and units are text.
_MATHEMATICS = re.compile(r"[\\$]|^[-+]?[\d.,/%^*():\s+-]*\d[\d.,/%^*():\s+-]*$")
_OPTION = re.compile(r"\(?([A-Z])\)?[.:]?")


def _library():
  try:
    import math_verify
  except ModuleNotFoundError as error:
    raise UserError(
      "math-verify is not installed; run: pip install 'bis_jax[best_of_n]'"
    ) from error
  return math_verify


def same(first: str, second: str) -> bool:
  """Returns whether two answers are equal: 1/2, 0.5 and \\frac12 are, and so are (B) and b."""
  first, second = _plain(first), _plain(second)
  if first == second:
    return True
  one, other = _parsed(first), _parsed(second)
  return bool(one and other) and _library().verify(one, other)


def _plain(answer: str) -> str:
  answer = answer.strip().removesuffix(".")
  option = _OPTION.fullmatch(answer.upper())
  return option[1] if option else answer if "\\" in answer else answer.casefold()


@functools.lru_cache(maxsize=100_000)
def _parsed(answer: str) -> list:
  if not _MATHEMATICS.search(answer):
    return []
  return _library().parse(answer if "$" in answer else f"${answer}$")


def merged(answers: Sequence[str | None]) -> list[str | None]:
  """Returns the answers, each replaced by the first that is the same."""
  kept: list[str] = []
  found: list[str | None] = []
  for answer in answers:
    if answer is not None:
      answer = next((one for one in kept if same(one, answer)), answer)
      kept.append(answer)
    found.append(answer)
  return found


def extracted(response: str, options: Sequence[str] = ()) -> str | None:
  """Returns the final answer of a response, or None; `options` are letters of choices."""
  library = _library()
  forms = (library.LatexExtractionConfig(), library.ExprExtractionConfig())
  if options:
    response = re.sub(r"\(([A-Z])\)", r"\1", response)
    forms = (library.StringExtractionConfig(strings=tuple(options)), *forms)
  found = library.parse(response, extraction_config=forms)
  return str(found[-1]) if found else None
