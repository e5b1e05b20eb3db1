"""The package stays small, flat and without branches on the backbone."""

import ast
import pathlib

from benchmarks.code_lines import count_rooms

ROOT = pathlib.Path(__file__).resolve().parents[1] / "bis_jax"
BACKBONES = ("qwen2_5_vl", "qwen3_vl", "internvl")
# The aim is 9,000: lower this number whenever the package shrinks. It was 11,000 before damaged files,
# full disks, owners of shared folders and wrong config values were handled, 11,900 before every path
# could be in a bucket, 12,400 before selection worked on MC counts, by strategies beyond the paper,
# 12,900 before chips had settings of their own and the HBM traffic was counted by operands,
# 13,400 before the server spoke what callers speak and Best-of-N read VLMEvalKit's files, 14,200
# before solutions of a question shared its prefix, 14,700 before Best-of-N compared answers as
# mathematics, 14,950 before exports were checkpoints, VisualPRM-8B scored, and vLLM read an export,
# 15,000 before AOT and the server knew rows with shared prefixes, 15,100 before `aot` ended the
# compiler before machine code, 15,150 before Qwen3-VL, 421 lines of its own, 15,640 before corpora and
# benchmarks of any format were read, and beliefs trained, 16,910 before LoRA, QLoRA, PEFT folders and
# trackers, 17,490 before the server remembered keys and values, 17,930 before memory was planned.
MOST_CODE_LINES = 18_498
MOST_DOCSTRINGS = 0.12


def test_code_and_docstrings_stay_small():
  rooms = count_rooms(ROOT)
  lines = rooms["bis_jax"]
  shown = f"{lines}; see python -m benchmarks.code_lines"
  assert lines.code <= MOST_CODE_LINES, shown
  assert lines.docstring <= MOST_DOCSTRINGS * lines.total, shown


def test_only_commands_and_what_every_room_needs_are_flat():
  flat = [path.name for path in ROOT.glob("*.py") if path.name != "__init__.py"]
  assert len(flat) <= 13, flat


def test_no_branch_on_the_backbone_outside_its_folder():
  """Only the registry imports a backbone, so no `isinstance` can name its classes."""
  own = [ROOT / "models" / name for name in BACKBONES]
  wrong = []
  for path in sorted(ROOT.rglob("*.py")):
    if any(path.is_relative_to(folder) for folder in own):
      continue
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if _compares_with_a_name(node) or (
        _imports_a_backbone(node) and path != ROOT / "models" / "backbones.py"
      ):
        wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
  assert not wrong, wrong


def _compares_with_a_name(node: ast.AST) -> bool:
  if isinstance(node, ast.MatchValue):
    compared = [node.value]
  elif isinstance(node, ast.Compare):
    compared = [node.left, *node.comparators]
  else:
    return False
  inner = [part for one in compared for part in ast.walk(one)]
  return any(isinstance(part, ast.Constant) and part.value in BACKBONES for part in inner)


def _imports_a_backbone(node: ast.AST) -> bool:
  if isinstance(node, ast.ImportFrom):
    imported = [f"{node.module}.{alias.name}" for alias in node.names]
  elif isinstance(node, ast.Import):
    imported = [alias.name for alias in node.names]
  else:
    return False
  return any(name in module.split(".") for module in imported for name in BACKBONES)
