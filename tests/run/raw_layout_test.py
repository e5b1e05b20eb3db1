"""The released layout, the real tokenizer and real images through the whole run, good and bad.

Needs ../shared (the corpus maker, the tokenizer and the images) and is skipped without it.
"""

import json
import subprocess
import sys

import pytest

from bis_jax.corpus.corpus import Corpus
from bis_jax.run import stages
from bis_jax.settings.locations import locate
from configs import qwen_bis10


def _make_corpus(shared, out, *flags):
  maker = shared / "tools" / "make_visualprm_corpus.py"
  images = shared / "data" / "images"
  command = [sys.executable, maker, out, "--rollouts", "600", "--files", "6"]
  subprocess.run([*command, "--image-pool", images, *flags], check=True)
  return out


def _benchmark(corpus, out):
  """Writes twenty items in VisualProcessBench's layout about the corpus's own images."""
  out.mkdir()
  (out / "images").symlink_to(corpus / "images")
  names = sorted(path.relative_to(corpus) for path in (corpus / "images").rglob("*.png"))[:20]
  sources = ("MMMU", "MathVision", "MathVerse_VO", "DynaMath", "WeMath")
  with open(out / "test.jsonl", "w") as file:
    for i, name in enumerate(names):
      steps = {"steps": ["Look.", "Add.", "Final answer: 3"], "process_correctness": [1, -1, i % 2]}
      item = {"image": [str(name)], "question": "How many?", "answer": "3", "response": steps}
      file.write(json.dumps(item | {"policy_model": "p", "data_source": sources[i % 5]}) + "\n")
  return out


@pytest.fixture
def config(shared, tmp_path):
  """The Qwen recipe at tiny widths, with the real tokenizer; without corpus and benchmark."""
  c = qwen_bis10.get_config()
  c.corpus.cache = str(tmp_path / "cache")
  c.selection.fraction = 0.25
  c.inputs.tokenizer = str(shared / "data" / "tokenizers" / "qwen2_5_vl")
  c.inputs.max_length, c.qwen2_5_vl.max_pixels = 512, 16 * 784
  c.inputs.row_tokens, c.inputs.row_patches, c.inputs.row_markers = 512, 192, 32
  c.inputs.row_multiple, c.inputs.workers, c.inputs.prefetch = 8, 0, 1
  c.model.size, c.model.checkpoint, c.model.remat = "tiny", "", "none"
  c.model.dtype = "float32"
  c.train.global_batch, c.train.steps, c.train.epochs = 8, 2, 3
  c.evaluation.dev_rollouts = 20
  return c


def test_prepare_select_two_steps_and_evaluate(config, shared, tmp_path):
  corpus = _make_corpus(shared, tmp_path / "corpus")
  config.corpus.annotations = str(corpus / "annotations")
  config.corpus.images = str(corpus / "images")
  config.evaluation.benchmark = str(_benchmark(corpus, tmp_path / "benchmark"))
  evaluation = stages.run(config, str(tmp_path / "run"))
  assert 0 <= evaluation["thresholds"]["fixed_0.5"]["macro_f1_pooled"] <= 1
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_every_planted_record_is_named_and_no_good_one_lost(config, shared, tmp_path):
  dirty = _make_corpus(shared, tmp_path / "dirty", "--dirty", "40")
  config.corpus.annotations = str(dirty / "annotations")
  config.corpus.images = str(dirty / "images")
  config.corpus.max_rejected_fraction = 0.1
  stages.prepare_corpus(config, locate(config))
  (folder,) = (tmp_path / "cache").glob("corpus-*")
  listed = [
    json.loads(line)
    for name in ("rejections.jsonl", "notes.jsonl")
    for line in (folder / name).read_text().splitlines()
  ]
  found = {(record["source"], record["line"]) for record in listed}
  planted = json.loads((dirty / "dirty.json").read_text())
  # A planted duplicate is the line after the one it repeats.
  wanted = {
    (p["file"].removesuffix(".jsonl"), p["line"] + (p["kind"] == "duplicate_line")) for p in planted
  }
  assert found == wanted
  good = len((dirty / "truth.jsonl").read_text().splitlines())
  legal = sum(
    p["kind"].endswith("_in_step") or p["kind"] in ("huge_step", "duplicate_line") for p in planted
  )
  assert len(Corpus.open(folder)) == good + legal
