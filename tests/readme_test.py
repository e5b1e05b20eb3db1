"""README and docs are true: commands, flags, config keys, files, links, code and tables exist."""

import ast
import importlib
import json
import pathlib
import re
import shlex
import types

import numpy as np
import pytest

from bis_jax.corpus import records
from bis_jax.corpus.rejections import REASONS
from bis_jax.evaluation import best_of_n, step_evaluation
from bis_jax.selection.strategies import STRATEGIES
from bis_jax.settings import config_check, keys

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
SOURCES = [
  *ROOT.glob("bis_jax/*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("examples/*.py")
]  # fmt: skip
TOP = "bis_jax|configs|docs|examples|benchmarks|tests|launch"

pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def documents():
  """Yields (path, text) of every page, and of the docstring of every command, recipe and example."""
  yield from ((path, path.read_text()) for path in PAGES)
  yield from ((path, ast.get_docstring(ast.parse(path.read_text())) or "") for path in SOURCES)


def page(name: str) -> str:
  return (ROOT / "docs" / name).read_text()


def first_cells(text: str, heading: str) -> list[str]:
  """Returns the code words of the first column of the table after a heading or phrase."""
  table = re.search(r"(?:^\|.*\n)+", text[text.index(heading) :], re.MULTILINE)[0]
  cells = (line.split("|")[1] for line in table.splitlines()[2:])
  return [word for cell in cells for word in re.findall(r"`([^`]+)`", cell)]


def commands() -> list[tuple[str, str, list[str]]]:
  """Returns (page, module, arguments) of every `python -m ...` of the documents."""
  found = []
  for path, text in documents():
    text = re.sub(r"\\+\n\s*", " ", text)  # continued lines
    for line in re.findall(r"python -m ((?:bis_jax|benchmarks|examples)\b[^\n`|;]*)", text):
      # A command in a sentence or a comment ends where the sentence continues.
      words = shlex.split(re.split(r"\s#|\s{2,}", line)[0].replace("'", ""))
      found.append((path.name, words[0].rstrip(".,:"), words[1:]))
  return found


def defined_flags(module: str) -> set[str]:
  """Returns the names of the flags that a module defines with absl or argparse."""
  text = pathlib.Path(importlib.util.find_spec(module).origin).read_text()
  tree, config = ast.parse(text), {"config"} if "recipe.define_flags()" in text else set()
  calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
  return config | {
    call.args[0].value.lstrip("-")
    for call in calls
    if isinstance(call.func, ast.Attribute)
    and (call.func.attr.startswith("DEFINE_") or call.func.attr == "add_argument")
    and isinstance(call.args[0], ast.Constant)
  }


def config_of(arguments: list[str]):
  """Returns the config that a command's --config names; common's if it names none that exists."""
  named = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
  path, _, form = (named or ["configs/common.py"])[0].partition(":")
  if "RECIPE" in path:
    path = "configs/qwen_bis10.py"
  assert (ROOT / path).is_file(), path
  module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
  return module.get_config(form) if form else module.get_config()


@pytest.mark.parametrize("command", commands(), ids=lambda c: f"{c[0]}:{c[1]}")
def test_commands_flags_and_config_keys_exist(command):
  _, module, arguments = command
  package = importlib.util.find_spec(module)
  assert package, module
  if package.submodule_search_locations:
    module += ".__main__"
  flags, config = defined_flags(module), config_of(arguments)
  for argument in arguments:
    if not argument.startswith("--"):
      continue
    name, _, value = argument[2:].partition("=")
    if not name.startswith("config."):
      assert name in flags, f"{module} has no --{name}"
    elif name != "config.KEY":
      config.update_from_flattened_dict({name.removeprefix("config."): _typed(name, value, config)})
  config_check.check(config)


def _typed(name: str, value: str, config):
  default = config
  for part in name.split(".")[1:]:
    default = default[part]  # a KeyError names a key that does not exist
  return value if isinstance(default, str | tuple) else type(default)(json.loads(value.lower()))


def test_the_first_two_commands_are_those_of_ci():
  assert "\npip install -e . && python -m bis_jax.main" in README
  assert "\npip install -e '.[test]' && pytest\n" in README
  ci = (ROOT / ".ci" / "run").read_text()
  assert "pip install -e . && python -m bis_jax.main" in ci and ".[test]" in ci


@pages
def test_links_resolve(page):
  text = page.read_text()
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    if target.startswith("https://"):
      continue
    path, _, anchor = target.partition("#")
    linked = page.parent / path if path else page
    assert linked.exists(), f"{page.name}: {target}"
    if anchor:
      assert anchor in _anchors(linked.read_text()), f"{page.name}: {target}"


def _anchors(text: str) -> set[str]:
  headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pages
def test_named_files_exist(page):
  words = re.findall(rf"`((?:{TOP})/[\w./*-]+)", page.read_text())
  for word in words:
    if re.search(r"[A-Z]{3}|/[xy]/|/[xy]_", word) and "RESULTS" not in word:
      continue  # a placeholder
    assert list(ROOT.glob(word.rstrip("/."))), f"{page.name}: {word}"


@pages
def test_named_config_keys_exist(page):
  names = set(keys.all_settings())
  sections = "|".join({key.split(".")[0] for key in names})
  if page.name == "CHANGELOG.md":
    names |= set(keys.RENAMED)
  for word in re.findall(rf"`((?:{sections})\.[a-z_.0-9]+)", page.read_text()):
    if not word.endswith((".json", ".jsonl", ".py", ".md", ".html", ".safetensors")):
      assert word in names, f"{page.name}: {word}"


@pages
def test_code_blocks_are_valid(page):
  for language, code in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.M | re.S):
    if language == "python":
      compile(code, page.name, "exec")
    if language == "json":
      _json_values(code)


def _json_values(code: str) -> list:
  decoder, values = json.JSONDecoder(), []
  while code := code.strip():
    value, end = decoder.raw_decode(code)
    values.append(value)
    code = code[end:]
  return values


def test_the_annotation_of_the_docs_is_a_rollout():
  block = re.search(r"```json\n(.*?)```", page("data_formats.md"), re.S)[1]
  (record,) = _json_values(block)
  assert records.parse_rollout(record, "geo", 0).id == "geo:0"


def test_tables_of_names_are_complete():
  assert set(first_cells(page("data_formats.md"), "Reasons:")) == set(REASONS)
  assert set(first_cells(page("selection.md"), "## Strategies")) == set(STRATEGIES)
  assert first_cells(page("evaluation.md"), "## Thresholds") == list(step_evaluation.ORIGINS)
  recipes = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"common"}
  assert set(first_cells(page("training.md"), "## Recipes")) == recipes
  assert set(first_cells(README, "| recipe | trains on")) == recipes
  picks = set(first_cells(page("evaluation.md"), "## Best-of-N"))
  assert picks >= {*best_of_n.AGGREGATIONS, "majority_vote", "pass@n", "mean_correct"}


def test_every_metric_is_defined_once():
  item = types.SimpleNamespace(labels=(1, -1), data_source="MMMU", policy_model="a")
  evaluation = step_evaluation.evaluate([item], [np.array([0.9, 0.1])])
  text = page("evaluation.md")
  block = set(evaluation["thresholds"]["fixed_0.5"]) - {"roc_auc", "intervals"}
  assert set(first_cells(text, "With a threshold")) == block
  named_below = set(re.findall(r"`(\w+)`", text[text.index("Also:") : text.index("## Thresholds")]))
  assert set(first_cells(text, "Without a threshold")) == (
    set(evaluation) - {"thresholds"} - named_below
  )


def test_messages_of_troubleshooting_are_ours():
  ours = [text for path in (ROOT / "bis_jax").rglob("*.py") for text in _messages(path)]
  cells = re.findall(r"^\| (`.+?) \|", page("troubleshooting.md"), re.M)
  assert len(cells) > 10
  parts = [
    part
    for message in re.findall(r"`([^`]+)`", " ".join(cells))
    for part in re.split(r"\s*\.\.\.\s*", message)
  ]
  assert [part for part in parts if not any(part in text for text in ours)] == []


def _messages(path: pathlib.Path) -> list[str]:
  """Returns every string of a file, a formatted value standing as "..."."""
  strings = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.JoinedStr):
      strings.append(
        "".join(
          getattr(v, "value", "...") if isinstance(v, ast.Constant) else "..." for v in node.values
        )
      )
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      strings.append(node.value)
  return strings


def test_the_code_map_has_every_room():
  code_map = README.split("## Code map")[1].split("```")[1]
  rooms = set(re.findall(r"^  (\w+)/", code_map, re.M))
  assert rooms == {path.parent.name for path in ROOT.glob("bis_jax/*/__init__.py")}
  for name in re.findall(r"^(\w+)/", code_map, re.M):
    assert (ROOT / name).is_dir(), name


def test_the_import_order_is_the_one_that_is_tested():
  tree = ast.parse((ROOT / "tests" / "import_order_test.py").read_text())
  (order,) = [
    ast.literal_eval(node.value)
    for node in tree.body
    if isinstance(node, ast.Assign) and node.targets[0].id == "ORDER"
  ]
  contributing = (ROOT / "CONTRIBUTING.md").read_text()
  block = contributing.split("## Import order")[1].split("```")[1]
  lines = [tuple(line.split(", ")) for line in block.strip().splitlines()]
  assert lines[1:] == list(order[1:])  # the first is the commands
