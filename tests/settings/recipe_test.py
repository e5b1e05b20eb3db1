"""Recipes are found by name in any folder, from a checkout and from a wheel."""

import os
import pathlib
import subprocess
import sys

import pytest

from bis_jax.settings import recipe
from configs import internvl_bis10, qwen_bis10

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
  "name", ["qwen_bis10", "configs/qwen_bis10.py", f"{ROOT}/configs/qwen_bis10.py"]
)
def test_a_recipe_has_a_name_and_a_path_in_any_folder(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  assert recipe.load(name) == qwen_bis10.get_config()
  assert recipe.load(f"{name}:toy") == qwen_bis10.get_config("toy")


def test_a_recipe_of_ones_own_builds_on_ours_and_may_have_the_same_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "internvl_bis10.py").write_text(
    "from configs import common\nfrom configs import qwen_bis10\n\n"
    "def get_config(form=''):\n  c = qwen_bis10.get_config()\n  c.seed = 5\n"
    "  return common.in_form(c, form)\n"
  )
  assert recipe.load("internvl_bis10.py:toy").seed == 5
  assert recipe.load("internvl_bis10") == internvl_bis10.get_config()


def test_a_wheel_holds_the_recipes(tmp_path):
  """What setuptools puts into a wheel runs outside the checkout, without a folder configs/."""
  build = ["setup.py", "-q", "egg_info", f"--egg-base={tmp_path}", "build_py"]
  subprocess.run([sys.executable, *build, f"--build-lib={tmp_path}/lib"], cwd=ROOT, check=True)
  built = tmp_path / "lib" / "bis_jax"
  assert (built / "hub" / "card.py").exists() and (built / "reports" / "templates").is_dir()
  names = {path.name for path in (ROOT / "configs").glob("*.py")}
  assert {path.name for path in (built / "configs").iterdir()} == names
  code = "from bis_jax.settings import recipe; print(recipe.__file__, recipe.load('internvl_bis10').model.size)"
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=tmp_path / "lib",
    env=os.environ | {"PYTHONPATH": str(ROOT / "tests" / "without_torch")},
    capture_output=True,
    text=True,
  )
  assert done.stdout.split() == [str(built / "settings" / "recipe.py"), "2.5-8b"], done.stderr
