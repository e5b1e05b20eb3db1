"""Cards have the metadata of the hub, as huggingface_hub reads it; --push uploads a folder."""

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from bis_jax import export
from bis_jax.errors import UserError
from bis_jax.hub import card
from configs import internvl_bis10, qwen_bis10

ORIGIN = "fixed before any score was seen"
EVALUATION = {
  "thresholds": {
    "fixed_0.5": {
      "threshold": 0.5, "origin": ORIGIN, "macro_f1_pooled": 0.6123, "roc_auc": 0.7, "f1_error": None,
    },
    "tuned_on_dev": {"threshold": 0.43, "origin": "held-out", "macro_f1_pooled": 0.65},
  }
}  # fmt: skip


def metadata(config, evaluation=EVALUATION, license=None):
  text = card._metadata(config.to_dict(), evaluation, "out", license).to_yaml()
  return ModelCard(f"---\n{text}\n---\n\n# Card\n").data


def test_the_metadata_of_a_published_recipe_is_complete():
  data = metadata(qwen_bis10.get_config())
  assert data.base_model == "Qwen/Qwen2.5-VL-7B-Instruct" and data.base_model_relation == "finetune"
  assert data.datasets == ["OpenGVLab/VisualPRM400K-v1.1-Raw"]
  assert (data.license, data.language, data.library_name) == ("apache-2.0", "en", "transformers")
  assert data.pipeline_tag == "image-text-to-text" and "prm" in data.tags
  assert metadata(internvl_bis10.get_config()).license == "mit"


def test_the_results_name_where_each_threshold_is_from():
  results = metadata(qwen_bis10.get_config()).eval_results
  assert {r.dataset_type for r in results} == {"OpenGVLab/VisualProcessBench"}
  found = {(r.metric_args["origin"], r.metric_args["threshold"], r.metric_value) for r in results}
  assert found == {(ORIGIN, 0.5, 61.23), (ORIGIN, 0.5, 70.0), ("held-out", 0.43, 65.0)}
  assert "macro_f1_pooled, threshold 0.4300 tuned_on_dev" in {r.metric_name for r in results}
  assert metadata(qwen_bis10.get_config(), None).eval_results is None


def test_a_toy_run_or_a_local_checkpoint_claims_nothing(tmp_path):
  data = metadata(qwen_bis10.get_config("toy"))
  assert data.base_model is None and data.datasets is None
  assert (data.license, data.license_name) == ("other", "not-stated")
  config = qwen_bis10.get_config()
  config.model.checkpoint = str(tmp_path)
  assert metadata(config).base_model is None
  config.model.checkpoint = "Qwen/Qwen2.5-VL-3B-Instruct"
  data = metadata(config)
  assert data.license_name == "as-the-base-model" and data.license_link.endswith("3B-Instruct")
  assert metadata(config, license="mit").license == "mit"


class Hub:
  """What HfApi is asked to do."""

  def __init__(self):
    self.calls = []

  def create_repo(self, name, **options):
    self.calls.append((name, options))

  def upload_folder(self, *, repo_id, folder_path, commit_message):
    self.calls.append((repo_id, sorted(f"{folder_path}".split("/"))[-1:], commit_message))


def test_push_uploads_to_a_private_repository(monkeypatch, tmp_path, capsys):
  hub = Hub()
  monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
  export.push(export.files.absolute(tmp_path), "me/prm")
  assert hub.calls[0] == ("me/prm", {"private": True, "exist_ok": True})
  assert hub.calls[1][0] == "me/prm" and "uploaded to me/prm" in capsys.readouterr().out


def test_push_needs_a_token_and_a_hub_id_before_any_work(command, monkeypatch, tmp_path):
  monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
  flags = ("--workdir=nowhere", f"--out={tmp_path / 'out'}")
  ended = command("bis_jax.export", *flags, "--push=me/prm")
  assert ended.returncode == 1 and "run `hf auth login`, or set HF_TOKEN" in ended.stderr
  ended = command("bis_jax.export", *flags, "--push=not an id")
  assert "is not a hub id such as OWNER/NAME" in ended.stderr


def test_a_hub_that_refuses_leaves_the_folder(monkeypatch, tmp_path):
  def refuse(*_, **__):
    raise ValueError("no")

  hub = Hub()
  hub.create_repo = refuse
  monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
  with pytest.raises(UserError, match="is written, but the hub did not take it as me/prm"):
    export.push(export.files.absolute(tmp_path), "me/prm")
