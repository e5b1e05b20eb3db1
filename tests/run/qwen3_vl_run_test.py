"""Qwen3-VL through every command, on a small toy corpus: train, resume, evaluate, score, serve, export."""

import base64
import json
import os
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from bis_jax import export
from bis_jax.evaluation import visual_process_bench
from bis_jax.hub import weights
from bis_jax.inputs import pipeline, texts
from bis_jax.models import backbones
from bis_jax.parallel import sharding
from bis_jax.parallel.preemption import Preempted
from bis_jax.run import stages
from bis_jax.scoring import step_scorer
from bis_jax.scoring.benchmark_examples import benchmark_examples
from bis_jax.scoring.restore import load_run
from bis_jax.settings import locations
from configs import qwen3vl_bis10
from tests.served import Served


@pytest.fixture(scope="module")
def config(shared_cache):
  """The recipe's toy form on a thousand rollouts, for a few steps."""
  c = qwen3vl_bis10.get_config("toy")
  c.corpus.cache = shared_cache
  c.corpus.toy.rollouts, c.corpus.toy.images, c.corpus.toy.benchmark_items = 1000, 300, 24
  c.corpus.workers, c.pretrain.steps, c.optim.learning_rate = 1, 2, 1e-2
  c.train.global_batch, c.train.steps = 8, 4
  c.train.log_every, c.train.checkpoint_every = 1, 2
  c.evaluation.blank_images, c.evaluation.every, c.evaluation.dev_rollouts = False, 0, 0
  return c.lock()


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
  """The workdir of a run that was never stopped, on eight devices."""
  folder = tmp_path_factory.mktemp("unbroken") / "run"
  stages.run(config, str(folder))
  return folder


def _parameters(folder):
  with ocp.StandardCheckpointer() as checkpointer:
    leaves = jax.tree_util.tree_leaves_with_path(
      checkpointer.restore(folder / "checkpoints" / "4" / "state")
    )
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _written_scores(folder):
  lines = (folder / "scores.jsonl").read_text().splitlines()
  return [np.array(json.loads(line)["scores"]) for line in lines]


def _items(config):
  return visual_process_bench.load(locations.locate(config).benchmark)


def test_a_stopped_run_ends_as_if_never_stopped(config, unbroken, tmp_path, monkeypatch):
  folder, take = tmp_path / "run", pipeline.BatchIterator.__next__

  def hit(self):
    if self.next_batch == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return take(self)

  with monkeypatch.context() as patch:
    patch.setattr(pipeline.BatchIterator, "__next__", hit)
    with pytest.raises(Preempted, match="step 3 of 4 is saved"):
      stages.run(config, str(folder))
  stages.run(config, str(folder))
  ours, theirs = _parameters(folder), _parameters(unbroken)
  assert ours.keys() == theirs.keys() and len(ours) > 20
  for path, array in ours.items():
    np.testing.assert_array_equal(array, theirs[path], err_msg=path)


def test_a_workdir_scores_as_its_run_did_and_serves(config, unbroken):
  """With the workdir alone: on eight devices, on one, and over HTTP."""
  items, written = _items(config), _written_scores(unbroken)
  examples = benchmark_examples(items, config.evaluation.images)
  scorer = step_scorer.load(str(unbroken))
  for ours, theirs in zip(scorer.score(examples), written, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
  assert np.std(np.concatenate(written)) > 1e-3

  one = load_run(str(unbroken), {"data": 1, "fsdp": 8, "tensor": 1})
  mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  params = {path: jax.device_put(np.asarray(value)) for path, value in one.params.items()}
  alone = step_scorer.Scorer(
    one.processor, one.config.inputs, mesh, one.graph, params, batch_rows=1
  )
  served = Served(alone)
  try:
    for i in range(0, len(items), 6):
      images = [base64.b64encode(image.read()).decode() for image in items[i].images]
      body = {"question": items[i].question, "steps": items[i].steps, "images": images}
      status, answer = served.call(body)
      assert status == 200, answer
      np.testing.assert_allclose(answer["scores"], written[i], rtol=0, atol=1e-5)
  finally:
    served.stop()


@pytest.fixture(scope="module")
def folder(unbroken, tmp_path_factory):
  """The run as a Hugging Face folder."""
  out = tmp_path_factory.mktemp("exported") / "folder"
  export.export_run(str(unbroken), out, "float32", None)
  return out


def test_the_cards_example_gives_our_scores(config, unbroken, folder):
  """Plain Transformers, its own resizing and tokenizer: at most 1e-4 on a step's probability."""
  card, items = (folder / "README.md").read_text(), _items(config)
  assert "1,024 to 25,600 pixels" in card and "Qwen3VLForConditionalGeneration" in card
  written, differences = _written_scores(unbroken), []
  single = [i for i, item in enumerate(items) if len(item.images) == 1]
  for i in single[:5]:
    image = folder.parent / "image.png"
    image.write_bytes(items[i].images[0].read())
    question = texts.question_text(items[i].question)
    names = {"folder": folder, "image": image, "question": question, "steps": items[i].steps}
    exec(card.split("```python\n")[1].split("```")[0], names)
    differences.append(np.abs(names["scores"].numpy() - written[i]).max())
  print(f"\nlargest difference of a step probability: {max(differences):.1e}")
  assert len(differences) == 5 and max(differences) < 1e-4


def test_the_folder_scores_as_the_run_did(config, unbroken, folder):
  examples = benchmark_examples(_items(config), config.evaluation.images)
  scores = step_scorer.load(str(folder)).score(examples)
  for ours, theirs in zip(scores, _written_scores(unbroken), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_transformers_loads_the_folder_whole_and_so_does_training(unbroken, folder):
  _, info = Qwen3VLForConditionalGeneration.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True
  )
  assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  restored = load_run(str(unbroken))
  special = restored.processor.prompt.special
  _, shapes = backbones.structure(restored.model, restored.mesh)
  tokens = {"yes_token": special.yes, "no_token": special.no, "marker_token": special.prm}
  again = weights.load(folder, restored.model, shapes, **tokens)
  for path, value in restored.params.items():
    np.testing.assert_array_equal(np.asarray(again[path]), np.asarray(value), err_msg=path)
