"""InternVL through every command, on a small toy corpus: train, resume, evaluate, score, export.

Mutations that these tests caught (each tried once): rows and columns of tiles exchanged; the thumbnail
first; neighbouring image tokens with one feature; scores read one token before the marker; the rows
of Yes and No exchanged in an export; the same drop path at every step.
"""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch
from transformers import InternVLForConditionalGeneration

from bis_jax import export
from bis_jax.evaluation import visual_process_bench
from bis_jax.hub import hf_folder, weights
from bis_jax.inputs import pipeline, texts
from bis_jax.inputs.rows import device_arrays, empty_batch
from bis_jax.models import backbones, param_tree
from bis_jax.models.internvl.config import SIZES as INTERNVL_SIZES
from bis_jax.models.internvl.images import InternVLImages
from bis_jax.models.internvl.prompt import load_tokenizer
from bis_jax.models.processor import make_processor
from bis_jax.parallel import sharding
from bis_jax.parallel.preemption import Preempted
from bis_jax.run import stages
from bis_jax.scoring import step_scorer
from bis_jax.scoring.benchmark_examples import benchmark_examples
from bis_jax.scoring.restore import load_run
from bis_jax.settings import locations
from bis_jax.training.train_state import TrainState
from bis_jax.training.train_step import make_train_step
from configs import internvl_bis10
from tests.in_memory import encode

STEPS = 4


@pytest.fixture(scope="module")
def config(shared_cache):
  """The recipe's toy form on a thousand rollouts, for a few steps."""
  c = internvl_bis10.get_config("toy")
  c.corpus.cache = shared_cache
  c.corpus.toy.rollouts, c.corpus.toy.images, c.corpus.toy.benchmark_items = 1000, 300, 24
  c.corpus.workers = 1
  c.pretrain.steps = 2
  c.optim.learning_rate, c.internvl.drop_path = 1e-2, 0.1
  c.train.global_batch, c.train.steps = 8, STEPS
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
  latest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
  with ocp.StandardCheckpointer() as checkpointer:
    leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(latest / "state"))
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _written_scores(folder):
  lines = (folder / "scores.jsonl").read_text().splitlines()
  return [np.array(json.loads(line)["scores"]) for line in lines]


def _examples(config):
  items = visual_process_bench.load(locations.locate(config).benchmark)
  return items, benchmark_examples(items, config.evaluation.images)


def test_a_stopped_run_ends_as_if_never_stopped(config, unbroken, tmp_path, monkeypatch):
  """Drop path included: its random numbers depend on the step alone."""
  folder = tmp_path / "run"
  take = pipeline.BatchIterator.__next__

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
  assert (folder / "evaluation.json").read_text() == (unbroken / "evaluation.json").read_text()


def test_a_workdir_scores_as_its_run_did(config, unbroken, monkeypatch):
  """With the workdir alone: on eight devices, on one, and one solution at a time."""
  items, examples = _examples(config)
  written = _written_scores(unbroken)
  with monkeypatch.context() as patch:
    patch.setattr(locations, "locate", None)  # the tokenizer is the workdir's
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
  for i in range(0, len(items), 6):
    [ours] = alone.score(benchmark_examples(items[i : i + 1], "multi"))
    np.testing.assert_allclose(ours, written[i], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def folder(unbroken, tmp_path_factory):
  """The run as a Hugging Face folder."""
  out = tmp_path_factory.mktemp("exported") / "folder"
  export.export_run(str(unbroken), out, "float32", None)
  return out


def test_the_cards_example_gives_our_scores(config, unbroken, folder):
  """Plain Transformers, its own tiling and tokenizer: at most 1e-4 on a step's probability."""
  card = (folder / "README.md").read_text()
  assert "at most 4 tiles and a thumbnail" in card
  items, _ = _examples(config)
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


def test_transformers_loads_the_folder_whole_and_so_does_training(config, unbroken, folder):
  _, info = InternVLForConditionalGeneration.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True
  )
  assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  restored = load_run(str(unbroken))
  special = restored.processor.prompt.special
  _, shapes = backbones.structure(restored.model, restored.mesh)
  again = weights.load(
    folder,
    restored.model,
    shapes,
    yes_token=special.yes,
    no_token=special.no,
    marker_token=special.prm,
  )
  for path, value in restored.params.items():
    np.testing.assert_array_equal(np.asarray(again[path]), np.asarray(value), err_msg=path)


def test_a_benchmark_that_does_not_fit_stops_a_run_before_it_trains(config, unbroken, tmp_path):
  del unbroken  # has made the corpus
  short = config.copy_and_resolve_references().unlock()
  short.inputs.max_length = 70
  with pytest.raises(step_scorer.UnscoredStepError, match="steps fit into 70 tokens"):
    stages.run(short, str(tmp_path / "run"))
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_drop_path_is_drawn_anew_every_step():
  """With a learning rate of 0 nothing else can change the loss from one step to the next."""
  model = dataclasses.replace(INTERNVL_SIZES["tiny"].with_vocabulary(64), drop_path=0.5)
  graph, params = param_tree.split(backbones.build(model, 0))
  rng = np.random.default_rng(0)
  rows = empty_batch(InternVLImages(1, 56), 1, (16, 32, 2))
  rows["patches"][:] = rng.normal(size=rows["patches"].shape)
  rows["image_index"][:, :8] = np.arange(8)
  rows["segment_ids"][:] = rows["marker_weight"][:] = 1
  rows["marker_index"][:] = [[9, 15]]
  batch = {key: array[None] for key, array in device_arrays(rows).items()}
  step = make_train_step(graph, optax.sgd(0.0), lambda step: 0.0, "global", random_seed=3)
  at, losses = TrainState(jax.numpy.int32(0), params, (optax.EmptyState(),) * 2), []
  for _ in range(3):
    at, metrics = step(at, {}, batch)
    losses.append(float(metrics["loss"]))
  assert len(set(losses)) == 3, losses


def test_internlm_goes_out_with_its_tokenizer(shared, tmp_path):
  """InternVL2.5's folder: the release's layout, from a base whose own keys stay, read back by us."""
  c = internvl_bis10.get_config().unlock()
  c.model.size, c.model.dtype = "tiny", "float32"
  processor = make_processor(c, str(shared / "data/tokenizers/internlm2_5"))
  model = backbones.model_config(c, len(processor.tokenizer))
  assert model.text.vocab_size == 92608 and model.text.architecture == "internlm2"
  model = dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=92554))
  _, params = param_tree.split(backbones.build(model, 0))
  base, out = tmp_path / "base", tmp_path / "out"
  hf_folder.write(base, params, model, processor, base=None, dtype="float32", card="")
  said = json.loads((base / "config.json").read_text())
  said["auto_map"], said["llm_config"]["attn_implementation"] = {"AutoModel": "code"}, "eager"
  (base / "config.json").write_text(json.dumps(said))

  hf_folder.write(out, params, model, processor, base=base, dtype="float32", card="")
  raw = json.loads((out / "config.json").read_text())
  assert raw["auto_map"] == {"AutoModel": "code"}
  assert raw["llm_config"]["attn_implementation"] == "eager"
  assert raw["llm_config"]["vocab_size"] == 92554 and raw["step_marker_token_id"] == 92553
  assert raw["max_dynamic_patch"] == 6 and raw["use_thumbnail"]
  assert json.loads((out / "added_tokens.json").read_text())["<prm>"] == 92553
  again = make_processor(c, str(out))
  one, other = (
    encode(r.prompt, "面积 <prm>?", ["one", "x = 2"], [16], max_length=500)
    for r in (processor, again)
  )
  assert one.tokens.tolist() == other.tokens.tolist() and len(one.markers) == 2
  assert again.tokenizer.ids == processor.tokenizer.ids


def test_internlm_keeps_the_bases_tokenizer_config(shared, tmp_path):
  """The release's tokenizer finds <|im_start|> and <|im_end|> by it; the step marker is added."""
  base, out = tmp_path / "base", tmp_path / "out"
  base.mkdir()
  out.mkdir()
  shutil.copy(shared / "data/tokenizers/internlm2_5/tokenizer.model", base)
  load_tokenizer(str(base)).save_pretrained(out)
  tokens = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
  assert tokens["92543"]["content"] == "<|im_start|>"
  assert tokens["92542"]["content"] == "<|im_end|>"
  own = {"1": {"content": "<s>", "special": True}, "92543": {"content": "<|im_start|>", "a": 1}}
  said = {"chat_template": "t", "added_tokens_decoder": own, "additional_special_tokens": ["<s>"]}
  (base / "tokenizer_config.json").write_text(json.dumps(said))
  for _ in range(2):  # the second from the first's folder, as from a workdir
    load_tokenizer(str(base)).save_pretrained(out)
    found = json.loads((out / "tokenizer_config.json").read_text())
    assert found["chat_template"] == "t" and found["auto_map"]["AutoTokenizer"]
    assert found["additional_special_tokens"] == ["<s>", "<prm>"]
    tokens = found["added_tokens_decoder"]
    assert own.items() <= tokens.items() and tokens["92553"]["content"] == "<prm>"
    base = out
