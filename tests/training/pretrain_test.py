"""Caption pre-training: its data, its files, and that Transformers gives the same logits."""

import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from transformers import Qwen2_5_VLForConditionalGeneration

from bis_jax.models import backbones
from bis_jax.models.param_tree import merge
from bis_jax.models.qwen2_5_vl.prompt import load_tokenizer, special_tokens
from bis_jax.parallel import sharding
from bis_jax.settings.config_check import ConfigError, check
from bis_jax.toy import drawing
from bis_jax.training import pretrain, train_state
from configs import qwen_bis10

STEPS = 60


@pytest.fixture(scope="module")
def config() -> ConfigDict:
  c = qwen_bis10.get_config("toy")
  c.corpus.toy.rollouts, c.corpus.toy.images, c.corpus.toy.benchmark_items = 1000, 300, 24
  c.model.size, c.pretrain.steps, c.pretrain.rows = "tiny", STEPS, 2
  return c.lock()


@pytest.fixture(scope="module")
def drawn(config, tmp_path_factory):
  return drawing.draw(tmp_path_factory.mktemp("cache") / "toy", workers=1, **config.corpus.toy)


@pytest.fixture(scope="module")
def folder(config, drawn):
  out = pretrain.backbone_folder(config, drawn)
  pretrain.pretrain(config, drawn, out)
  return out


def test_the_loss_falls_far_below_that_of_a_guess(folder):
  found = re.search(r"last loss\s+([\d.]+)", (folder / "README.md").read_text())
  assert float(found[1]) < 2.0 < np.log(475)  # a guess over the vocabulary


def test_training_starts_from_the_pretrained_parameters(config, drawn, folder):
  tokenizer = load_tokenizer(str(drawn / "tokenizer"))
  special = special_tokens(tokenizer)
  model = backbones.model_config(config, len(tokenizer))
  mesh = sharding.make_mesh(1, 8, 1)
  _, shapes = backbones.structure(model, mesh)
  params = train_state.first_params(model, shapes, folder, special, 0)
  random = train_state.first_params(model, shapes, None, special, config.pretrain.seed)
  table = np.asarray(params["language_model.embed_tokens.embedding"])
  head = np.asarray(params["reward_head.kernel"])
  np.testing.assert_allclose(head, random["reward_head.kernel"], rtol=0.02)  # but for its decay
  assert np.linalg.norm(head[:, 0] - head[:, 1]) > 0.5 * np.linalg.norm(head)  # rows that differ
  marker = table[special.prm]
  assert not np.allclose(marker, table[: special.prm].mean(0))  # trained, not a mean of others
  kernel = "visual.patch_embed.proj.kernel"
  assert np.abs(np.asarray(params[kernel] - random[kernel])).max() > 1e-3


def test_transformers_predicts_the_same_tokens(config, drawn, folder):
  tokenizer = load_tokenizer(str(drawn / "tokenizer"))
  model = backbones.model_config(config, len(tokenizer))
  graph, shapes = backbones.structure(model, sharding.make_mesh(1, 1, 1, jax.devices()[:1]))
  special = special_tokens(tokenizer)
  params = train_state.first_params(model, shapes, folder, special, 0)
  tokens = np.array([tokenizer.encode("The left half scores four. The right half")], np.int32)
  length = tokens.shape[1]
  batch = {
    "tokens": tokens,
    "segment_ids": np.ones((1, length), np.int32),
    "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (1, 3, length)),
    "image_index": np.full((1, length), -1, np.int32),
    "patches": np.zeros((1, 64, 1176), np.float32),
    "patch_segment": np.zeros((1, 64), np.int32),
    "patch_window": np.zeros((1, 64), np.int32),
    "patch_position": np.zeros((1, 64, 2), np.int32),
  }
  ours = merge(graph, params).next_token_logits(jax.tree.map(jax.numpy.asarray, batch))
  theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
  with torch.no_grad():
    wanted = theirs(torch.from_numpy(tokens).long()).logits.numpy()
  words = np.delete(np.arange(ours.shape[-1]), [special.yes, special.no])  # rows of their own
  np.testing.assert_allclose(ours[..., words], wanted[..., words], rtol=1e-4, atol=1e-4)


def test_a_backbone_that_is_there_is_kept(config, drawn, folder):
  before = os.stat(folder / "config.json").st_mtime_ns
  pretrain.pretrain(config, drawn, folder)
  assert os.stat(folder / "config.json").st_mtime_ns == before


def test_a_damaged_backbone_is_made_again(config, drawn, folder, tmp_path, monkeypatch):
  """Mutation caught: the folder is reused because it exists."""
  shutil.copytree(folder, tmp_path / "backbone")
  data = bytearray((folder / "model-00001-of-00001.safetensors").read_bytes())
  data[-1000] ^= 1
  (tmp_path / "backbone/model-00001-of-00001.safetensors").write_bytes(data)
  made = []
  monkeypatch.setattr(pretrain, "_pretrain", lambda config, drawn, out: made.append(out))
  pretrain.pretrain(config, drawn, tmp_path / "backbone")
  assert len(made) == 1
  pretrain.pretrain(config, drawn, folder)
  assert len(made) == 1


@pytest.mark.parametrize("losses", [[6.0, np.nan], [6.0, 13.0]])
def test_a_pre_training_that_diverged_is_not_published(
  config, drawn, tmp_path, monkeypatch, losses
):
  """Mutation caught: parameters that are not finite are saved in the shared cache."""
  config = config.copy_and_resolve_references().unlock()
  config.pretrain.steps, found = 2, iter(losses)
  monkeypatch.setattr(pretrain, "_make_step", lambda *_: lambda state, batch: (state, next(found)))
  with pytest.raises(pretrain.DivergedError, match="lower config.pretrain.learning_rate"):
    pretrain.pretrain(config, drawn, tmp_path / "backbone")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "key, value",
  [
    ("pretrain.learning_rate", 1e-4),
    ("pretrain.steps", 7),
    ("pretrain.seed", 1),
    ("model.size", "toy"),
    ("qwen2_5_vl.max_pixels", 112 * 112),
    ("inputs.separator", ""),
  ],
)
def test_another_recipe_has_a_backbone_of_its_own(config, drawn, folder, key, value):
  other = config.copy_and_resolve_references()
  other.update_from_flattened_dict({key: value})
  assert pretrain.backbone_folder(other, drawn) != folder


@pytest.mark.parametrize(
  "key, value",
  [
    ("seed", 3),
    ("optim.learning_rate", 1.0),
    ("model.remat", "full"),
    ("model.learning_rates", ((r".*", 0.5),)),
    ("inputs.workers", 2),
  ],
)
def test_what_does_not_change_the_backbone_shares_it(config, drawn, folder, key, value):
  other = config.copy_and_resolve_references()
  other.update_from_flattened_dict({key: value})
  assert pretrain.backbone_folder(other, drawn) == folder


def test_a_backbone_can_follow_the_seed_of_the_run(config, drawn):
  first = config.copy_and_resolve_references()
  first.update_from_flattened_dict({"pretrain.seed": -1})
  second = first.copy_and_resolve_references()
  second.update_from_flattened_dict({"seed": 1})
  assert pretrain.backbone_folder(first, drawn) == pretrain.backbone_folder(
    config, drawn
  )  # both of seed 0
  assert pretrain.backbone_folder(second, drawn) != pretrain.backbone_folder(first, drawn)


@pytest.mark.parametrize(
  "knobs, shared",
  [({"slip": 2.0, "n_mc": 4}, True), ({"seed": 1}, False), ({"images": 330}, False)],
)
def test_corpora_of_the_same_pictures_share_a_backbone(config, drawn, tmp_path, knobs, shared):
  other = drawing.draw(tmp_path / "toy", workers=1, **dict(config.corpus.toy) | knobs)
  ours, theirs = pretrain.backbone_folder(config, drawn), pretrain.backbone_folder(config, other)
  assert (ours.name == theirs.name) == shared


def test_captions_are_not_of_the_benchmark(drawn):
  captions = [json.loads(line) for line in (drawn / "captions.jsonl").read_text().splitlines()]
  for path in (path for caption in captions for path in caption["image"]):
    assert (drawn / "images" / path).is_file()
    assert not (drawn / "benchmark" / "images" / path).exists()


def test_a_corpus_without_captions_is_refused(config):
  c = qwen_bis10.get_config()
  c.pretrain.steps = 10
  with pytest.raises(ConfigError, match="only the toy corpus has captions"):
    check(c)
