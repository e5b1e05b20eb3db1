"""Counts lines of code and of docstrings, so that the package stays small.

python -m benchmarks.code_lines [FOLDER]
"""

import ast
import io
import pathlib
import sys
import tokenize
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
_NO_CODE = {
  *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT),
  *(tokenize.DEDENT, tokenize.ENDMARKER),
}


class Lines(NamedTuple):
  """Lines with code (no blanks, comments, docstrings), lines of docstrings, and all lines."""

  code: int
  docstring: int
  total: int


def count(path: pathlib.Path) -> Lines:
  """Counts the lines of a Python file."""
  source = path.read_text(encoding="utf-8")
  docstrings, code = set(), set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
      if ast.get_docstring(node, clean=False) is not None:
        docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type not in _NO_CODE:
      code |= set(range(token.start[0], token.end[0] + 1))
  return Lines(len(code - docstrings), len(docstrings), len(source.splitlines()))


def count_rooms(folder: pathlib.Path) -> dict[str, Lines]:
  """Returns the lines of a package and of every folder directly in it."""
  rooms: dict[str, Lines] = {}
  for path in sorted(folder.rglob("*.py")):
    parts = path.relative_to(folder).parts
    for room in {folder.name, f"{folder.name}/{parts[0]}" if len(parts) > 1 else folder.name}:
      added = zip(rooms.get(room, Lines(0, 0, 0)), count(path), strict=True)
      rooms[room] = Lines(*map(sum, added))
  return rooms


if __name__ == "__main__":
  print(f"{'code':>7} {'docstring':>9} {'total':>7}")
  for name, lines in count_rooms(pathlib.Path(*sys.argv[1:2] or [ROOT / "bis_jax"])).items():
    share = lines.docstring / lines.total if lines.total else 0
    print(f"{lines.code:7,} {share:9.1%} {lines.total:7,}  {name}")
