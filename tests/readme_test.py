"""The README is short, and what it names is there."""

import importlib.util
import pathlib
import re

from bis_jax.hub import card

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_it_is_short():
  assert len(README.splitlines()) <= 150


def test_every_command_and_recipe_is_there():
  modules = set(re.findall(r"python -m (bis_jax\.\w+)", README))
  assert len(modules) >= 7
  assert all(importlib.util.find_spec(module) for module in modules)
  recipes = set(re.findall(r"`((?:qwen|toy|internvl)\w*_\w+)`", README))
  assert recipes == {path.stem for path in (ROOT / "configs").glob("*.py")} - {"common"}


def test_every_file_of_the_map_is_there():
  house = README.split("## The house")[1].split("```")[1]
  files = re.findall(r"(\w+\.py)", house)
  assert len(files) > 10
  found = {path.name for path in ROOT.glob("*/*.py")}
  assert set(files) - {"x_test.py", "x.py"} <= found


def test_every_picture_is_there():
  for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
    assert (ROOT / name).is_file(), name


def test_the_example_is_the_one_that_is_tested():
  """By tests/hub/export_test.py."""
  template = card.TEMPLATES.get_template("qwen2_5_vl/card.md")
  context = template.new_context({"run": {"inputs": {"separator": "\n\n"}}})
  assert "".join(template.blocks["example"](context)) in README


def test_ci_runs_the_two_commands():
  ci = (ROOT / ".ci" / "run").read_text()
  for words in ("install --quiet -e .", "-m bis_jax.main --config=configs/toy_bis10.py", ".[test]"):
    assert words in ci
