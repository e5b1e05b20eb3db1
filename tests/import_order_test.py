"""Imports point one way through the rooms of bis_jax, from the commands to the leaves."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1] / "bis_jax"
# A room may import the rooms of later lines, and itself.
ORDER = (
  (
    "__init__",
    "main",
    "prepare",
    "select",
    "evaluate",
    "score",
    "serve",
    "export",
    "report",
    "aot",
  ),
  ("run",),
  ("scoring", "compilation"),
  ("training",),
  ("settings",),
  ("hub", "reports"),
  ("models", "selection", "evaluation"),
  ("toy",),
  ("inputs", "corpus"),
  ("parallel",),
  ("files", "images"),
  ("console", "storage"),
  ("errors",),
)


def test_imports_point_from_commands_to_leaves():
  rank = {room: line for line, rooms in enumerate(ORDER) for room in rooms}
  wrong = []
  for path in sorted(ROOT.rglob("*.py")):
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bis_jax":
        parts = node.module.split(".")[1:2]
        for there in parts or [alias.name for alias in node.names]:
          if there != here and rank[there] <= rank[here]:
            wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {there}")
  assert not wrong, "\n".join(wrong)
