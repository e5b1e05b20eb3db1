"""Rollouts of text alone: trained and evaluated, without a vision tower in any program."""

import importlib
import json

import numpy as np
import pytest

from bis_jax.models import backbones
from bis_jax.run import stages


@pytest.fixture(params=["qwen_bis10", "internvl_bis10"])
def config(request, tmp_path):
  """A run of 5 steps on rollouts whose questions describe the pictures."""
  c = importlib.import_module(f"configs.{request.param}").get_config("toy")
  c.corpus.cache = str(tmp_path / "cache")
  c.corpus.toy.update(rollouts=1000, images=300, benchmark_items=18, described=True)
  c.model.size, c.pretrain.steps, c.train.steps, c.train.log_every = "tiny", 0, 5, 1
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
  assert len(lines) == 5 and all(np.isfinite(line["loss"]) for line in lines)
  assert evaluation["benchmark"]["items"] == 18
  assert (tmp_path / "run/index.html").exists()
  rollout = json.loads(
    next((tmp_path / "cache").glob("toy-*/annotations/bars_sum.jsonl")).read_text().split("\n")[0]
  )
  assert rollout["image"] is None and "scores" in rollout["question_orig"]
