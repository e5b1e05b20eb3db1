"""Which benchmark is loaded from where, and ProcessBench's layout."""

import json

import huggingface_hub
import numpy as np
import pytest

from bis_jax.evaluation import benchmarks, process_bench, step_evaluation
from bis_jax.evaluation.json_records import EvaluationError

SOLUTION = {
  "id": "gsm8k-0",
  "generator": "Qwen2-7B-Instruct",
  "problem": " Add. ",
  "steps": ["a", "b", "c"],
  "final_answer_correct": False,
  "label": 1,
}


@pytest.fixture
def text_benchmark(tmp_path):
  (tmp_path / "math.json").write_text(json.dumps([SOLUTION | {"label": -1}]))
  (tmp_path / "gsm8k.json").write_text(json.dumps([SOLUTION, SOLUTION | {"label": 0}]))
  return tmp_path


def test_only_the_first_error_of_process_bench_is_known(text_benchmark):
  items = benchmarks.load(str(text_benchmark))
  assert [item.labels for item in items] == [(1, -1, 0), (-1, 0, 0), (1, 1, 1)]
  assert [item.data_source for item in items] == ["gsm8k", "gsm8k", "math"]
  assert [item.index for item in items] == [0, 1, 2]
  assert (items[0].question, items[0].images, items[0].answer) == ("Add.", (), "False")
  assert items[0].policy_model == "Qwen2-7B-Instruct"


def test_first_error_f1_is_the_papers(text_benchmark):
  items = benchmarks.load(str(text_benchmark))
  scores = [np.array(s) for s in ([0.9, 0.2, 0.1], [0.9, 0.2, 0.1], [0.9, 0.8, 0.7])]
  report = step_evaluation.evaluate(items, scores, bootstrap_draws=0)
  block = report["thresholds"]["fixed_0.5"]
  assert block["first_error_accuracy_on_error"] == 0.5
  assert block["first_error_accuracy_on_clean"] == 1
  assert block["first_error_f1"] == pytest.approx(2 / 3, abs=1e-12)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"label": 3}, "`label` is 3"),
    ({"label": -2}, "`label` is -2"),
    ({"label": True}, "got `bool` - at `.*label`"),
    ({"steps": []}, "length >= 1 - at `.*steps`"),
    ({"problem": None}, "got `null` - at `.*problem`"),
  ],
)
def test_a_fault_is_named_with_its_file_and_item(tmp_path, changes, message):
  (tmp_path / "math.json").write_text(json.dumps([SOLUTION, SOLUTION | changes, 3]))
  with pytest.raises(EvaluationError, match=message) as error:
    process_bench.load(tmp_path)
  assert "math.json item 1: " in str(error.value)
  assert "math.json item 2: Expected `object`, got `int`" in str(error.value)


def test_files_that_are_no_benchmark_say_so(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no \*.json"):
    benchmarks.load(str(tmp_path))
  (tmp_path / "math.json").write_text("[]")
  with pytest.raises(EvaluationError, match="holds no item"):
    benchmarks.load(str(tmp_path))
  (tmp_path / "math.json").write_text("{}")
  with pytest.raises(EvaluationError, match="math.json .*: it must be a JSON list of items"):
    benchmarks.load(str(tmp_path))


def test_a_folder_goes_before_the_hub(benchmark, monkeypatch):
  asked = []

  def snapshot(hub_id, **how):
    asked.append((hub_id, how["repo_type"]))
    return str(benchmark)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
  monkeypatch.chdir(benchmark.parent.parent)
  local = f"{benchmark.parent.name}/{benchmark.name}"
  assert len(benchmarks.load(local)) == 10 and not asked
  assert len(benchmarks.load("OpenGVLab/VisualProcessBench")) == 10
  assert asked == [("OpenGVLab/VisualProcessBench", "dataset")]


def test_a_place_without_a_benchmark_is_an_error_with_the_remedy(monkeypatch, tmp_path):
  with pytest.raises(FileNotFoundError, match="no benchmark folder at .*absent"):
    benchmarks.load(str(tmp_path / "absent"))

  def offline(*_, **__):
    raise ConnectionError("no network")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
  with pytest.raises(
    FileNotFoundError, match="no network.*\n  hf download a/b --repo-type dataset"
  ):
    benchmarks.load("a/b")
