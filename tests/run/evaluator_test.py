"""Evaluation during training: the same run, one point per step, one compilation, one page."""

import json
import logging
import os
import re
import shutil
import signal
import struct

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboardX.proto.event_pb2 import Event

from bis_jax.corpus.corpus import Corpus
from bis_jax.evaluation import score_files, step_metrics, visual_process_bench
from bis_jax.evaluation.json_records import EvaluationError
from bis_jax.inputs import pipeline
from bis_jax.models.processor import make_processor
from bis_jax.models.qwen2_5_vl.config import SIZES as QWEN_SIZES
from bis_jax.parallel import sharding
from bis_jax.parallel.preemption import Preempted
from bis_jax.reports import run_table
from bis_jax.run import stages
from bis_jax.run.evaluator import Evaluator
from bis_jax.scoring import step_scorer
from bis_jax.scoring.benchmark_examples import benchmark_examples
from bis_jax.selection.manifest import Manifest
from bis_jax.selection.rule import select
from bis_jax.settings import locations
from bis_jax.training import loop

KEY = "tuned_on_test/overall_source_weighted"
DEV = 30


@pytest.fixture(scope="module")
def config(small_config):
  """Six steps; evaluated after 2, 4 and 6, logged after 5, saved after 3 and 6."""
  config = small_config.copy_and_resolve_references()
  with config.unlocked():
    config.train.log_every, config.train.checkpoint_every = 5, 3
    config.evaluation.every, config.evaluation.every_items = 2, 0
    config.evaluation.dev_rollouts = DEV
  return config


@pytest.fixture(scope="module")
def judged(config, tmp_path_factory):
  """(workdir, compiled score steps with their number of compilations) of an evaluated run."""
  made = []
  with pytest.MonkeyPatch.context() as patch:
    make = step_scorer.make_score_step
    patch.setattr(step_scorer, "make_score_step", lambda *of: made.append(make(*of)) or made[-1])
    folder = tmp_path_factory.mktemp("judged") / "run"
    stages.run(config, str(folder))
  return folder, [step._cache_size() for step in made]


def lines_of(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve_of(folder):
  """{step: every measure of its evaluation}."""
  curve = {
    line["step"]: {k: v for k, v in line.items() if k.startswith("evaluation/")}
    for line in lines_of(folder)
  }
  return {step: measures for step, measures in curve.items() if measures}


def event_steps(file, tag):
  """Steps with a value of `tag` in a TensorBoard file: (length, its CRC, event, its CRC), ..."""
  steps = []
  while file:
    (length,) = struct.unpack("<Q", file[:8])
    event, file = Event.FromString(file[12 : 12 + length]), file[16 + length :]
    steps += [event.step for value in event.summary.value if value.tag == tag]
  return steps


def parameters(folder):
  with ocp.StandardCheckpointer() as checkpointer:
    return jax.tree.leaves(checkpointer.restore(folder / "checkpoints" / "6" / "state"))


def test_every_step_stands_once_and_the_last_point_is_the_evaluation(judged):
  folder, _ = judged
  lines = lines_of(folder)
  assert [line["step"] for line in lines] == [2, 4, 5, 6]
  assert all("loss" in line and "step_seconds" in line for line in lines)
  assert list(curve_of(folder)) == [2, 4, 6]
  evaluation = json.loads((folder / "evaluation.json").read_text())
  for name, measure in (("tuned_on_test", "overall_source_weighted"), ("fixed_0.5", "accuracy")):
    assert lines[-1][f"evaluation/{name}/{measure}"] == evaluation["thresholds"][name][measure]
  (events,) = (folder / "tensorboard").iterdir()
  assert event_steps(events.read_bytes(), f"evaluation/{KEY}") == [2, 4, 6]


def test_being_judged_changes_no_bit(judged, config, tmp_path):
  with config.unlocked():
    plain = config.copy_and_resolve_references()
    plain.evaluation.every, plain.evaluation.dev_rollouts = 0, 0
  stages.run(plain, str(tmp_path / "run"))
  for ours, theirs in zip(parameters(judged[0]), parameters(tmp_path / "run"), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert curve_of(tmp_path / "run") == {}
  assert "tuned_on_dev" not in (tmp_path / "run" / "evaluation.json").read_text()
  assert not list((tmp_path / "run").glob("held_out*"))


def test_the_scores_are_compiled_once(judged, config):
  """Three evaluations, one more at the end and the held-out rollouts: batches of 8 or 16 rows."""
  _, compilations = judged
  assert len(compilations) == 1 and compilations[0] <= 2


def test_a_run_that_is_stopped_and_killed_has_the_same_points(
  judged, config, tmp_path, monkeypatch
):
  """Stopped at step 2, before its evaluation; killed at step 5, after 4's, with 3 saved."""
  folder, take = tmp_path / "run", pipeline.BatchIterator.__next__

  def start(hit_at, hit):
    with monkeypatch.context() as patch:
      patch.setattr(
        pipeline.BatchIterator,
        "__next__",
        lambda it: (it.next_batch == hit_at and hit()) or take(it),
      )
      stages.run(config, str(folder))

  def killed():
    raise KeyboardInterrupt

  with pytest.raises(Preempted, match="step 2 of 6 is saved"):
    start(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
  assert curve_of(folder) == {}
  with pytest.raises(KeyboardInterrupt):
    start(4, killed)
  assert list(curve_of(folder)) == [2, 4]
  stages.run(config, str(folder))
  assert [line["step"] for line in lines_of(folder)] == [2, 4, 5, 6]
  assert curve_of(folder) == curve_of(judged[0])


def test_a_step_is_saved_before_it_is_evaluated(config, tmp_path, monkeypatch):
  """Mutation caught: a fault of the evaluation loses the training since the last checkpoint."""

  def broken(self, step, params):
    if step == 6:
      raise EvaluationError("broken")
    return {}

  monkeypatch.setattr(Evaluator, "while_training", broken)
  with pytest.raises(EvaluationError, match="broken"):
    stages.run(config, str(tmp_path / "run"))
  assert (tmp_path / "run/checkpoints/6").is_dir()


def test_a_damaged_benchmark_image_is_found_before_training(config, tmp_path, monkeypatch):
  read = visual_process_bench.BenchmarkImage.read
  monkeypatch.setattr(visual_process_bench.BenchmarkImage, "read", lambda image: read(image)[:-200])
  monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("training has begun"))
  with pytest.raises(EvaluationError, match="images of the benchmark: .* bad items"):
    stages.run(config, str(tmp_path / "run"))


def test_the_report_draws_the_curve(judged, command, tmp_path):
  folder, out = judged[0], tmp_path / "report"
  curve = run_table.read_run(str(folder), *KEY.split("/")).curve
  assert [step for step, _ in curve] == [2, 4, 6]
  assert command("bis_jax.report", folder, f"--out={out}").returncode == 0
  assert (out / "overall_against_step.png").exists()


def test_a_threshold_is_tuned_on_rollouts_that_were_not_trained_on(judged, config):
  folder, _ = judged
  lines = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
  manifest = Manifest.load(folder / "manifest.json")
  trained = {f"{s.name}:{line}" for s in manifest.sources for line in s.lines.tolist()}
  assert len(lines) == len({line["rollout"] for line in lines}) == DEV
  assert trained.isdisjoint(line["rollout"] for line in lines)
  corpus = Corpus.open(locations.locate(config).prepared)
  rollouts = {r.id: r for r in map(corpus.rollout, range(len(corpus)))}
  for line in lines:
    mc = rollouts[line["rollout"]].scores
    assert line["mc_scores"] == list(mc) and line["data_source"] == rollouts[line["rollout"]].source
    assert line["labels"] == [1 if score > 0 else -1 for score in mc]
  tuned = step_metrics.tune_threshold(score_files.read_held_out(str(folder / "held_out.jsonl")))
  blocks = json.loads((folder / "evaluation.json").read_text())["thresholds"]
  assert list(blocks) == ["fixed_0.5", "tuned_on_dev", "tuned_on_test"]
  assert blocks["tuned_on_dev"]["threshold"] == tuned
  page = (folder / "index.html").read_text()
  assert "tuned_on_dev" in page and 'href="held_out/items.html"' in page
  data = re.search(r'id="data">(.*?)</script>', (folder / "held_out/items.html").read_text(), re.S)
  items = json.loads(data[1])["items"]
  assert [item["mc"] for item in items] == [np.round(x["mc_scores"], 4).tolist() for x in lines]


def test_a_run_that_keeps_everything_says_that_nothing_is_held_out(config, caplog):
  where = locations.locate(config)
  corpus = Corpus.open(where.prepared)
  manifest = select(corpus.score_table, strategy="full", fraction=1.0, alpha=0.2, seed=0)
  mesh, model = sharding.make_mesh(**config.mesh), QWEN_SIZES["tiny"].with_vocabulary(64)
  processor = make_processor(config, where.tokenizer)
  with caplog.at_level(logging.INFO, logger="bis_jax"):
    evaluator = stages.make_evaluator(config, where, corpus, manifest, processor, mesh, model)
  assert evaluator.held_out is None
  assert f"0 of {DEV} rollouts held out: the selection keeps all others" in caplog.text


def test_a_workdir_scores_when_the_corpus_is_gone(judged, config, tmp_path):
  """The copy's config names a cache that is empty."""
  folder = tmp_path / "run"
  shutil.copytree(judged[0], folder)
  held = json.loads((folder / "config.json").read_text())
  held["corpus"]["cache"] = str(tmp_path / "empty")
  (folder / "config.json").write_text(json.dumps(held))
  items = visual_process_bench.load(locations.locate(config).benchmark)
  scores = step_scorer.load(str(folder)).score(benchmark_examples(items, "multi"))
  for ours, theirs in zip(
    scores, score_files.read_scores(str(folder / "scores.jsonl"), items), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  shutil.rmtree(folder / "tokenizer")
  with pytest.raises(FileNotFoundError, match="the run's tokenizer .* can't be loaded"):
    step_scorer.load(str(folder))
