"""A workdir belongs to one config."""

import importlib
import json
import pathlib

import pytest
from etils import epath

from bis_jax import files
from bis_jax.settings import keys, workdir
from configs import common


def test_a_new_workdir_gets_the_config(tmp_path):
  place = epath.Path(tmp_path) / "runs" / "a"
  workdir.claim(place, common.get_config())
  assert json.loads((place / "config.json").read_text())["optim"]["learning_rate"] == 1e-5
  workdir.claim(place, common.get_config())  # the same run resumes


def test_another_config_is_refused_and_named(tmp_path):
  place, config = epath.Path(tmp_path) / "a", common.get_config()
  workdir.claim(place, config)
  before = (place / "config.json").read_text()
  config.selection.fraction = 0.25
  with pytest.raises(workdir.WorkdirError, match=r"selection.fraction: 1.0 there, 0.25 here"):
    workdir.claim(place, config)
  assert (place / "config.json").read_text() == before


def test_what_does_not_change_the_result_may_change(tmp_path):
  place, config = epath.Path(tmp_path) / "a", common.get_config()
  workdir.claim(place, config)
  config.mesh.fsdp, config.inputs.workers, config.train.checkpoint_every = 4, 0, 7
  workdir.claim(place, config)


def test_somebody_elses_folder_is_left_alone(tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(workdir.WorkdirError, match="no config.json"):
    workdir.claim(epath.Path(tmp_path), common.get_config())
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
  path = epath.Path(tmp_path) / "a.json"
  files.write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    files.write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("recipe", ["qwen_bis10", "internvl_bis10"])
def test_a_workdir_of_the_first_version_still_opens_and_resumes(tmp_path, recipe):
  """Keys that have another name since then are read under today's."""
  old = json.loads((pathlib.Path(__file__).parent / "configs_of_0_1_0.json").read_text())[recipe]
  (tmp_path / "config.json").write_text(json.dumps(old))
  config = importlib.import_module(f"configs.{recipe}").get_config("toy")
  workdir.claim(epath.Path(tmp_path), config)
  read = workdir.read_config(epath.Path(tmp_path))
  own = config.model.backbone
  assert read[own] == config[own]
  assert read.to_dict().keys() == config.to_dict().keys()
  assert set(keys.RENAMED) <= set(keys.flatten(old))


def test_the_default_learning_rates_of_the_first_versions_are_todays(tmp_path):
  """They joined the vision towers of all backbones that there were."""
  config = common.get_config()
  workdir.claim(epath.Path(tmp_path), config)
  old = json.loads((tmp_path / "config.json").read_text())
  old["model"]["learning_rates"] = [[r"visual\.(?!merger)|vision_model\.", 0.0], [".*", 1.0]]
  (tmp_path / "config.json").write_text(json.dumps(old))
  workdir.claim(epath.Path(tmp_path), config)
  assert workdir.read_config(epath.Path(tmp_path)).model.learning_rates[0] == ["vision tower", 0.0]


def test_a_run_that_trained_nothing_gives_its_workdir_back(tmp_path):
  place, config = epath.Path(tmp_path) / "a", common.get_config()
  workdir.claim(place, config)
  (place / "manifest.json").write_text("{}")
  (place / "tokenizer").mkdir()
  workdir.release(place)
  config.selection.fraction = 0.25
  workdir.claim(place, config)
  (place / "checkpoints" / "5").mkdir(parents=True)
  workdir.release(place)
  assert (place / "config.json").exists() and (place / "checkpoints" / "5").exists()


def test_a_damaged_config_is_written_again_only_where_nothing_else_is(small_config, tmp_path):
  place = epath.Path(tmp_path / "run")
  workdir.claim(place, small_config)
  whole = (place / "config.json").read_text()
  (place / "config.json").write_text(whole[: len(whole) // 2])
  workdir.claim(place, small_config)
  assert (place / "config.json").read_text() == whole
  (place / "config.json").write_text("")
  (place / "metrics.jsonl").write_text("")
  with pytest.raises(workdir.WorkdirError, match="config.json is damaged"):
    workdir.claim(place, small_config)


def test_a_changed_config_is_told(small_config, tmp_path, caplog):
  place = epath.Path(tmp_path / "run")
  workdir.claim(place, small_config)
  workdir.read_config(place)
  assert not caplog.text
  path = place / "config.json"
  path.write_text(path.read_text().replace('"seed": 0', '"seed": 1', 1))
  workdir.read_config(place)
  assert "config.json is not as the run wrote it" in caplog.text
