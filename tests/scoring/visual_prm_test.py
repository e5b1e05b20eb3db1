"""VisualPRM-8B's way of scoring, on tiny weights: a forward pass per step in Transformers."""

import json

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, InternVLForConditionalGeneration

from bis_jax.errors import UserError
from bis_jax.hub import hf_folder, weights
from bis_jax.models import backbones, param_tree
from bis_jax.models.processor import make_processor
from bis_jax.scoring.solutions import StepRewards
from bis_jax.settings import config_check, exported, locations
from bis_jax.toy import drawing
from configs import internvl_bis10
from tests.in_memory import encode

STEPS = ("There are 1 + 2 circles.", "That is 3.", "Final answer: 3")


@pytest.fixture(scope="module")
def config(small_config):
  config = internvl_bis10.get_config("toy")
  config.corpus, config.internvl.prompt = small_config.corpus, "visualprm"
  drawing.draw(locations.locate(config).toy, workers=1, **config.corpus.toy)
  return config.lock()


@pytest.fixture(scope="module")
def processor(config):
  return make_processor(config, locations.locate(config).tokenizer)


@pytest.fixture(scope="module")
def model(config, processor):
  """(model config, parameters) whose scores depend on all that the model reads."""
  model = backbones.model_config(config, len(processor.tokenizer))
  _, params = param_tree.split(backbones.build(model, 0))
  path = "language_model.embed_tokens.embedding"
  drawn = np.random.default_rng(0).normal(size=params[path].shape)
  return model, params | {path: jax.numpy.asarray(drawn, "float32")}


@pytest.fixture(scope="module")
def published(processor, model, tmp_path_factory):
  """A folder as the hub has it: the release's layout and class, and nothing of ours."""
  folder = tmp_path_factory.mktemp("published")
  raw = model[0].to_hugging_face("hub")
  raw["auto_map"] = {"AutoModel": "modeling_internvl_chat.InternVLRewardModel"}
  (folder / "config.json").write_text(json.dumps(raw))
  special = processor.prompt.special
  tokens = {"yes_token": special.yes, "no_token": special.no}
  weights.save(folder, model[1], model[0], **tokens, base=None, dtype="float32")
  processor.tokenizer.save_pretrained(folder)
  return folder


def test_the_published_class_is_known(published):
  config, held = exported.read(published)
  assert config.internvl.prompt == "visualprm" and config.model.size == "toy"
  assert config.inputs.row_patches == 28 * 1024 and held.step == 0
  assert exported.read(published.parent) is None


@pytest.fixture(scope="module")
def rewards(config, published, tmp_path_factory):
  """The model with the toy's settings, which a bis_jax.json of the user's own gives."""
  folder = tmp_path_factory.mktemp("own") / "folder"
  folder.symlink_to(published)
  own = {"model": config.model.to_dict(), "inputs": config.inputs.to_dict()}
  own["internvl"] = config.internvl.to_dict()
  content = {"bis_jax": "", "step": 0, "config": own}
  (published / exported.FILE).write_text(json.dumps(content))
  yield StepRewards(str(folder))
  (published / exported.FILE).unlink()


@pytest.mark.parametrize("images", [0, 1, 2])
def test_scores_are_those_of_one_pass_per_step(processor, model, rewards, images, tmp_path):
  """At most 1e-5. Mutations caught: the answers before given as their own scores; Yes and No."""
  rng = np.random.default_rng(images)
  files = []
  for i in range(images):
    files.append(tmp_path / f"{i}.png")
    Image.fromarray(rng.integers(0, 255, (70, 112, 3), np.uint8)).save(files[i])
  ours = rewards("How many circles?", files, STEPS)

  out = tmp_path / "transformers"
  hf_folder.write(out, model[1], model[0], processor, base=None, dtype="float32", card="")
  reference = InternVLForConditionalGeneration.from_pretrained(out).eval()
  read = AutoImageProcessor.from_pretrained(out, use_fast=False)
  tiles = [read([Image.open(file)], return_tensors="pt")["pixel_values"] for file in files]
  counts = [len(one) * reference.config.image_seq_length for one in tiles]
  sample = encode(processor.prompt, "How many circles?", STEPS, counts, max_length=10**4)
  special, theirs = processor.prompt.special, []
  for marker in sample.markers:
    ids = torch.tensor(sample.tokens[None, : marker + 1]).long()
    pixels = {"pixel_values": torch.cat(tiles)} if tiles else {}
    with torch.no_grad():
      logits = reference(input_ids=ids, **pixels).logits[0, -1, [special.yes, special.no]]
    theirs.append(logits.softmax(dim=-1)[0].item())
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
  assert np.std(theirs) > 1e-3


def test_it_is_for_scoring_alone(config):
  with pytest.raises(UserError, match="internvl.prompt=visualprm is for scoring"):
    config_check.check(config)
