"""Every recipe can be run, and a bad value is named before any work."""

import importlib
import pathlib

import pytest

from bis_jax import config, locations
from bis_jax.models import weights
from configs import common

RECIPES = sorted(
  path.stem for path in pathlib.Path(common.__file__).parent.glob("*.py") if path.stem != "common"
)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_in_range_in_every_form(name):
  recipe = importlib.import_module(f"configs.{name}").get_config
  config.check(recipe())
  if not name.startswith("toy"):
    config.check(recipe("toy"))
    assert recipe("toy").selection.strategy == recipe().selection.strategy
    with pytest.raises(ValueError, match="no form 'small'"):
      recipe("small")


@pytest.mark.parametrize(
  "key, value",
  [
    ("selection.fraction", 0.0),
    ("selection.fraction", 1.5),
    ("selection.strategy", "best"),
    ("selection.alpha", -0.1),
    ("corpus.tau", 1.0),
    ("inputs.row_patches", 100),
    ("mesh.data", 0),
    ("model.size", "70b"),
  ],
)
def test_a_value_outside_its_range_is_named(key, value):
  c = common.get_config()
  c.update_from_flattened_dict({key: value})
  with pytest.raises(config.ConfigError, match=f"config.{key} is {value!r}"):
    config.check(c)


def test_every_fault_is_named_at_once():
  c = common.get_config()
  c.selection.fraction, c.train.epochs = 2.0, 0
  with pytest.raises(config.ConfigError, match="(?s)selection.fraction.*train.epochs"):
    config.check(c)


def test_images_that_cannot_fit_are_refused():
  c = common.get_config()
  c.inputs.max_pixels = 12_845_056  # the release's default
  with pytest.raises(config.ConfigError, match="max_pixels.*16384 tokens"):
    config.check(c)


def test_missing_inputs_are_all_named_with_the_command_that_gets_them(tmp_path):
  c = common.get_config()
  for part, key in (
    (c.corpus, "annotations"),
    (c.corpus, "images"),
    (c.model, "checkpoint"),
    (c.evaluation, "benchmark"),
  ):
    part[key] = str(tmp_path / key)
  with pytest.raises(locations.MissingInputError) as error:
    locations.require(c, locations.locate(c))
  message = str(error.value)
  for key in ("annotations", "images", "checkpoint", "benchmark"):
    assert str(tmp_path / key) in message
  assert message.count("hf download") >= 4


def test_the_toy_form_needs_nothing():
  c = common.in_form(common.get_config(), "toy")
  locations.require(c, locations.locate(c))


def test_a_checkpoint_on_the_hub_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  c = common.get_config()
  for part, key in ((c.corpus, "annotations"), (c.corpus, "images"), (c.evaluation, "benchmark")):
    part[key] = str(tmp_path)
  assert weights.is_hub_id(c.model.checkpoint)
  with pytest.raises(locations.MissingInputError) as error:
    locations.require(c, locations.locate(c))
  message = str(error.value)
  assert "config.model.checkpoint: no folder Qwen/Qwen2.5-VL-7B-Instruct" in message
  assert "hf download Qwen/Qwen2.5-VL-7B-Instruct" in message


def test_a_checkpoint_on_the_hub_becomes_its_folder(tmp_path, monkeypatch):
  fetched = []

  def fetch(name, allow_patterns):
    fetched.append((name, "*.safetensors" in allow_patterns))
    return str(tmp_path / name)

  monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
  c = common.get_config()
  for part, key in ((c.corpus, "annotations"), (c.corpus, "images"), (c.evaluation, "benchmark")):
    part[key] = str(tmp_path)
  c.inputs.tokenizer = "some/tokenizer"
  where = locations.require(c, locations.locate(c))
  assert where.checkpoint == str(tmp_path / c.model.checkpoint)
  assert where.tokenizer == str(tmp_path / "some/tokenizer")
  assert sorted(fetched) == [("Qwen/Qwen2.5-VL-7B-Instruct", True), ("some/tokenizer", False)]
