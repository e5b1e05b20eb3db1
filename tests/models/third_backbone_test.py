"""A backbone takes its own folder and one line: a toy third one trains, scores and is exported.

It has the modules of Qwen2.5-VL under a name of its own, with a section of its own in the config, and
is registered as a record in `BACKBONES` is. Nothing else in bis_jax hears of it.
"""

import dataclasses
import json

import numpy as np
import pytest

from bis_jax import export
from bis_jax.models import backbones
from bis_jax.models.qwen2_5_vl.images import QwenImages
from bis_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from bis_jax.models.qwen2_5_vl.record import QWEN2_5_VL
from bis_jax.models.setting import Setting
from bis_jax.run import stages
from bis_jax.scoring.restore import load_run
from bis_jax.settings import config_check, keys
from configs import common

pytestmark = pytest.mark.usefixtures("no_plots", "whole_arrays")


class Third(Qwen2_5_VL):
  """A model of its own class."""


RECORD = dataclasses.replace(
  QWEN2_5_VL,
  name="third",
  sizes={"toy": dataclasses.replace(QWEN2_5_VL.sizes["tiny"], backbone="third")},
  model=Third,
  settings={"side": Setting(448, "multiple of 28", "pixels of an image side", toy=112)},
  make_images=lambda model, own: QwenImages(28**2, own.side**2),
)


@pytest.fixture
def config(monkeypatch, small_config, tmp_path):
  monkeypatch.setitem(backbones.BACKBONES, "third", RECORD)
  names = dataclasses.replace(keys.SETTINGS["model.backbone"], allowed=tuple(backbones.BACKBONES))
  monkeypatch.setitem(keys.SETTINGS, "model.backbone", names)  # as if the record were in its file
  c = common.in_form(common.use_backbone(common.get_config(), "third", "toy", ""), "toy")
  c.corpus = small_config.corpus
  c.train = small_config.train
  c.train.steps = c.train.checkpoint_every = 2
  c.evaluation, c.pretrain.steps = small_config.evaluation, 0
  return c


def test_a_third_backbone_trains_scores_and_is_exported(config, tmp_path):
  workdir = tmp_path / "run"
  stages.run(config, str(workdir))
  assert json.loads((workdir / "config.json").read_text())["third"] == {"side": 112}
  run = load_run(str(workdir))
  assert run.model.backbone == "third" and run.step == 2
  assert run.processor.images == QwenImages(784, 112**2)
  assert len((workdir / "scores.jsonl").read_text().splitlines()) == 24
  export.export_run(str(workdir), tmp_path / "out", "float32", "")
  written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
  assert written["size"]["longest_edge"] == 112**2 or written["max_pixels"] == 112**2
  assert np.isfinite([float(np.abs(value).max()) for value in run.params.values()]).all()


@pytest.mark.parametrize(
  ("key", "value", "words"),
  [
    ("third.side", 100, "config.third.side is 100; it must be a multiple of 28"),
    ("internvl.max_tiles", 9, "config.internvl.max_tiles is 9, which third does not read"),
  ],
)
def test_its_settings_are_checked(config, key, value, words):
  config.update_from_flattened_dict({key: value})
  with pytest.raises(config_check.ConfigError, match=words):
    config_check.check(config)
