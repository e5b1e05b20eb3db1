"""Rollouts of text alone: trained and evaluated, without a vision tower in any program."""

import importlib
import json

import numpy as np
import pytest

from bis_jax.corpus.scan import scan
from bis_jax.models import backbones
from bis_jax.run import stages
from bis_jax.selection import subset
from bis_jax.selection.manifest import Manifest
from bis_jax.selection.rule import select
from bis_jax.settings.locations import locate
from bis_jax.toy import drawing
from tests.record_formats import COUNT, WRITTEN, lines, solutions


@pytest.fixture(params=["qwen_bis10", "internvl_bis10"])
def config(request, shared_cache):
  """A run of 2 steps on rollouts whose questions describe the pictures."""
  c = importlib.import_module(f"configs.{request.param}").get_config("toy")
  c.corpus.cache, c.corpus.workers = shared_cache, 1
  c.corpus.toy.update(rollouts=1000, images=300, benchmark_items=18, described=True)
  c.model.size, c.pretrain.steps, c.train.steps, c.train.log_every = "tiny", 0, 2, 1
  c.evaluation.every, c.evaluation.dev_rollouts, c.evaluation.blank_images = 0, 20, False
  return c


def test_a_run_needs_no_tower(config, tmp_path, monkeypatch):
  """Mutation caught: rows for text alone keep patch slots, so that the tower runs on nothing."""

  def tower(*_):
    raise AssertionError("the program has a vision tower")

  model = backbones.get(config.model.backbone).model
  monkeypatch.setattr(model, "image_features", tower)
  evaluation = stages.run(config, str(tmp_path / "run"))
  lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  assert len(lines) == 2 and all(np.isfinite(line["loss"]) for line in lines)
  assert evaluation["benchmark"]["items"] == 18
  assert (tmp_path / "run/index.html").exists()
  lines = (locate(config).annotations / "bars_sum.jsonl").read_text().splitlines()
  rollout = json.loads(lines[0])
  assert rollout["image"] is None and "scores" in rollout["question_orig"]


def test_every_format_trains_is_selected_and_written_back(tmp_path):
  """200 records of each format in one folder: two steps, then every form of `select`."""
  folder = tmp_path / "annotations"
  folder.mkdir()
  for at, (name, write) in enumerate(WRITTEN.items()):
    records = [write(*solution) for solution in solutions(at)]
    (folder / f"{name}.jsonl").write_bytes(lines(records))
  toy = drawing.draw(tmp_path / "toy", rollouts=60, images=20, benchmark_items=18, workers=1)
  c = importlib.import_module("configs.qwen_text_bis10").get_config("toy")
  c.corpus.name, c.corpus.annotations, c.corpus.cache = (
    "visualprm",
    str(folder),
    str(tmp_path / "c"),
  )
  c.inputs.tokenizer, c.model.size, c.evaluation.benchmark = str(toy / "tokenizer"), "tiny", ""
  c.selection.fraction, c.train.steps, c.train.log_every = 0.5, 2, 1
  stages.run(c, str(tmp_path / "run"))
  steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  assert len(steps) == 2 and all(np.isfinite(line["loss"]) for line in steps)
  kept = Manifest.load(tmp_path / "run/manifest.json")
  assert {source.name: source.lines.size for source in kept.sources} == dict.fromkeys(
    sorted(WRITTEN), COUNT // 2
  )
  found = scan(folder)
  table = found.table()
  manifest = select(table, strategy="full", fraction=1.0, unmeasured="ignore")
  expected = None
  for form in ("raw", "conversations", "trl", "openrlhf", "dataset", "parquet"):
    out = tmp_path / form / ("x.parquet" if form == "parquet" else "x.jsonl")
    subset.WRITERS[form][0](out, subset.kept_lines(found.files, table, manifest), manifest)
    again = scan(out / "data" if form == "dataset" else out)
    read = [json.loads(line) for line in again.read_lines(np.flatnonzero(again.strict))]
    texts = [[step["step"] for step in record["steps_with_score"]] for record in read]
    labels = [[step["score"] for step in record["steps_with_score"]] for record in read]
    questions = [(record.get("question_orig") or record["question"]).strip() for record in read]
    rows = list(zip(questions, texts, labels, strict=True))
    rows = [(q, [step.strip() for step in several], of) for q, several, of in rows]
    expected = expected or rows
    assert not again.rejections and rows == expected, form
