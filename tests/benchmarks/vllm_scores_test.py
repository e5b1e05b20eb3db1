"""vLLM gets our prompt from messages, and where it is installed, it gives our scores."""

import os
import shutil

import numpy as np
import pytest
from etils import epath
from transformers import AutoTokenizer

import bis_jax
from benchmarks import export_transformers, vllm_scores
from bis_jax.evaluation import visual_process_bench
from bis_jax.models.processor import make_processor
from bis_jax.settings import exported
from tests.in_memory import encode


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
  return tmp_path_factory.mktemp("vllm") / "toy"


@pytest.fixture(scope="module")
def items(toy):
  return vllm_scores.toy_items(18, toy)


@pytest.fixture(scope="module", params=export_transformers.RECIPES)
def folder(request, toy, items, tmp_path_factory):
  place = tmp_path_factory.mktemp("export") / "out"
  export_transformers.export(request.param, str(toy / "tokenizer"), place, "toy32")
  return place


def test_the_messages_render_as_our_prompt(items, folder):
  config, _ = exported.read(epath.Path(folder))
  processor = make_processor(config, str(folder))
  tokenizer = AutoTokenizer.from_pretrained(folder)
  for item in items:
    chat = vllm_scores.messages(item)
    for part in chat[0]["content"]:
      if part["type"] == "image_url":  # as vLLM gives it to the template
        part["type"] = "image"
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    counts = [1] * len(item.images)
    sample = encode(processor.prompt, item.question, item.steps, counts, max_length=9999)
    special = processor.prompt.special
    around = {special.vision_start, special.vision_end}  # some processors add them
    ours = [token for token in sample.tokens.tolist() if token not in around]
    assert [token for token in ids if token not in around][: len(ours)] == ours
    assert ids.count(special.prm) == len(item.steps)


def test_vllm_gives_our_scores(items, folder, tmp_path, monkeypatch):
  program = os.environ.get("VLLM") or shutil.which("vllm")
  if not program:
    pytest.skip("set VLLM to the program vllm of an environment of its own")
  monkeypatch.setenv("PYTHONPATH", "")  # see tests/conftest.py: it needs torch
  model, port = bis_jax.load(str(folder)), vllm_scores.free_port()
  with vllm_scores.serving(
    vllm_scores.vllm_command(program, str(folder), port), port, tmp_path / "log", 900
  ):
    for item in items[:6]:
      theirs = vllm_scores.pooled(port, vllm_scores.messages(item), str(folder))
      ours = model(item.question, visual_process_bench.encoded_images(item), item.steps)
      np.testing.assert_allclose(theirs, ours, rtol=0, atol=vllm_scores.TOLERANCE)
