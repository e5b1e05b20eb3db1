"""Every recipe can be run, and a bad value is named before any work."""

import importlib
import pathlib

import jax
import pytest

from bis_jax.errors import UserError
from bis_jax.hub import weights
from bis_jax.models import learning_rates
from bis_jax.models.backbones import build, model_config
from bis_jax.models.param_tree import split
from bis_jax.settings import config_check, locations
from configs import common, internvl_bis10

RECIPES = sorted(
  path.stem for path in pathlib.Path(common.__file__).parent.glob("*.py") if path.stem != "common"
)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_in_range_in_every_form(name):
  recipe = importlib.import_module(f"configs.{name}").get_config
  config_check.check(recipe())
  if not name.startswith("toy"):
    config_check.check(recipe("toy"))
    assert recipe("toy").selection.strategy == recipe().selection.strategy
    with pytest.raises(UserError, match="no form 'small'"):
      recipe("small")


@pytest.mark.parametrize(
  "key, value",
  [
    ("selection.fraction", 0.0),
    ("selection.fraction", 1.5),
    ("selection.strategy", "best"),
    ("selection.alpha", -0.1),
    ("selection.reliability_if_no_positive", 1.5),
    ("corpus.toy.n_mc", 0),
    ("labels.kind", "true"),
    ("corpus.tau", 1.0),
    ("inputs.row_patches", 100),
    ("internvl.max_tiles", 0),
    ("mesh.data", 0),
    ("model.backbone", "internvl2"),
    ("internvl.drop_path", 1.0),
    ("model.marker_noise", -0.1),
    ("model.size", "70b"),
  ],
)
def test_a_value_outside_its_range_is_named(key, value):
  c = common.get_config()
  c.update_from_flattened_dict({key: value})
  with pytest.raises(config_check.ConfigError, match=f"config.{key} is {value!r}"):
    config_check.check(c)


def test_the_truth_is_known_for_the_toy_corpus_only():
  c = common.get_config()
  c.labels.kind = "truth"
  with pytest.raises(config_check.ConfigError, match="only the toy corpus knows it"):
    config_check.check(c)
  c = common.in_form(c, "toy")
  config_check.check(c)


def test_every_fault_is_named_at_once():
  c = common.get_config()
  c.selection.fraction, c.train.epochs = 2.0, 0
  with pytest.raises(config_check.ConfigError, match="(?s)selection.fraction.*train.epochs"):
    config_check.check(c)


def test_images_that_cannot_fit_are_refused():
  c = common.get_config()
  c.qwen2_5_vl.max_pixels = 12_845_056  # the release's default
  with pytest.raises(config_check.ConfigError, match="max_pixels.*16384 tokens"):
    config_check.check(c)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"inputs.max_length": 1792}, r"max_tiles \(6\) .* 1792 tokens.*max_length \(1792\)"),
    ({"internvl.max_tiles": 40}, r"max_tiles \(40\) .* 10496 tokens.*lower max_tiles, or raise"),
    (
      {"inputs.row_patches": 6144},
      r"max_tiles \(6\) .* 7168 patches.*row_patches to at least 7168",
    ),
    ({"inputs.row_patches": 8000}, r"row_patches \(8000\) .* make it 8 \* 1024"),
    ({"model.size": "7b"}, r"model.size is '7b'; it must be one of .*2\.5-8b"),
    ({"model.size": "3-9b"}, r"is '3-9b', which is refused: .* InternLM3.*; it must be one of "),
    ({"model.backbone": "qwen2_5_vl", "internvl.system": "Hi"}, "qwen2_5_vl does not read"),
    (
      {"model.backbone": "qwen2_5_vl", "internvl.drop_path": 0.1, "model.size": "7b"},
      "drop_path is 0.1",
    ),
  ],
)
def test_tiles_that_cannot_fit_are_refused(changes, words):
  c = internvl_bis10.get_config()
  c.update_from_flattened_dict(changes)
  with pytest.raises(config_check.ConfigError, match=words):
    config_check.check(c)


def test_the_tower_alone_is_frozen_by_default():
  """In every published backbone; the projector is trained."""
  for backbone, size in (("qwen2_5_vl", "7b"), ("internvl", "2.5-8b"), ("internvl", "3-14b")):
    c = common.get_config()
    c.model.backbone, c.model.size = backbone, size
    shapes = jax.eval_shape(lambda c=c: split(build(model_config(c, 1), 0))[1])
    factor = learning_rates.factors(c, shapes)
    frozen = {path for path, value in factor.items() if not value}
    tower = {p for p in factor if p.startswith("vision_model.")} | {
      p for p in factor if p.startswith("visual.") and not p.startswith("visual.merger.")
    }
    assert frozen == tower and len(frozen) > 10


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


def test_the_command_gets_a_checkpoint_of_the_backbone(tmp_path):
  c = internvl_bis10.get_config()
  c.model.checkpoint = str(tmp_path / "gone")
  with pytest.raises(locations.MissingInputError, match="hf download OpenGVLab/InternVL2_5-8B"):
    locations.require(c, locations.locate(c))


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

  def fetch(name, allow_patterns, local_files_only):
    assert not local_files_only  # no folder Qwen or some is here
    assert "*.model" in allow_patterns  # SentencePiece's, of InternLM2.5
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
