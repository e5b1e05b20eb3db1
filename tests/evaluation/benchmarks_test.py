"""Which benchmark is loaded from where, and ProcessBench's layout."""

import dataclasses
import io
import json

import huggingface_hub
import numpy as np
import pyarrow.parquet
import pytest
from sklearn.metrics import f1_score

from bis_jax.evaluation import benchmarks, step_evaluation
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
    benchmarks.load(str(tmp_path))
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

  def kept(*_, local_files_only, **__):
    assert local_files_only
    raise FileNotFoundError

  (tmp_path / "a").mkdir()
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", kept)
  with pytest.raises(
    FileNotFoundError, match="the hub was not asked for it: correct the name of a/b"
  ):
    benchmarks.load("a/b")


def table(rows) -> bytes:
  file = io.BytesIO()
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
  return file.getvalue()


def test_process_bench_is_the_same_in_every_container(tmp_path, text_benchmark):
  wanted = benchmarks.load(str(text_benchmark))
  for name in ("lines", "tables"):
    (tmp_path / name).mkdir()
  for path in text_benchmark.glob("*.json"):
    rows = json.loads(path.read_text())
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "lines" / f"{path.stem}.jsonl").write_text(lines)
    (tmp_path / "tables" / f"{path.stem}-00000-of-00001.parquet").write_bytes(table(rows))
  for name in ("lines", "tables"):
    assert benchmarks.load(str(tmp_path / name)) == wanted


def test_visual_process_bench_is_the_same_as_a_table_with_its_images(tmp_path, benchmark):
  wanted = benchmarks.load(str(benchmark))
  rows = [json.loads(line) for line in (benchmark / "test.jsonl").read_text().splitlines()]
  for row in rows:
    row["image"] = [
      {"bytes": (benchmark / name).read_bytes(), "path": name} for name in row["image"]
    ]
  (tmp_path / "hub/data").mkdir(parents=True)
  (tmp_path / "hub/data/test-00000-of-00001.parquet").write_bytes(table(rows))
  found = benchmarks.find(str(tmp_path / "hub"))
  assert found.kind == "VisualProcessBench" and len(found.items) == len(wanted)
  for item, other in zip(found.items, wanted, strict=True):
    assert [image.read() for image in item.images] == [image.read() for image in other.images]
    assert dataclasses.replace(item, images=()) == dataclasses.replace(other, images=())


def prm_bench(seed=0, count=60):
  """Records of PRMBench and random scores of their steps."""
  draw = np.random.default_rng(seed)
  classes = (
    "redundency",
    "circular",
    "counterfactual",
    "confidence",
    "deception",
    "multi_solutions",
  )
  records, scores = [], []
  for at in range(count):
    steps = [f"{n + 1}. step" for n in range(draw.integers(1, 8))]
    kind = classes[at % len(classes)]
    wrong = (
      []
      if kind == "multi_solutions"
      else sorted({int(n) + 1 for n in draw.integers(0, len(steps), 2)})
    )
    records.append(
      {
        "idx": str(at),
        "original_question": "o",
        "original_process": ["o"],
        "modified_question": "Q",
      }
      | {"modified_process": steps, "error_steps": wrong, "classification": kind}
    )
    scores.append(draw.random(len(steps)))
  return records, scores


def test_prm_score_is_the_papers(tmp_path):
  """Half the F1 of right and half that of wrong steps, counted here as the paper defines them."""
  records, scores = prm_bench()
  (tmp_path / "prmtest_classified.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  found = benchmarks.find(str(tmp_path))
  assert found.kind == "PRMBench"
  report = step_evaluation.evaluate(found.items, scores, bootstrap_draws=0)
  measured = benchmarks.measures("PRMBench", report)["fixed_0.5"]

  def prm_score(chosen):
    right, called = [], []
    for record, of_steps in chosen:
      right += [n + 1 not in record["error_steps"] for n in range(len(of_steps))]
      called += (of_steps >= 0.5).tolist()
    return (f1_score(right, called) + f1_score(np.logical_not(right), np.logical_not(called))) / 2

  pairs = list(zip(records, scores, strict=True))
  assert measured["PRMScore"] == pytest.approx(prm_score(pairs), abs=1e-12)
  by_class = {
    name: prm_score([pair for pair in pairs if pair[0]["classification"] == name])
    for name in ("redundency", "circular", "counterfactual")
  }
  assert {name: measured[name] for name in by_class} == pytest.approx(by_class, abs=1e-12)
  simplicity = (by_class["redundency"] + by_class["circular"]) / 2
  assert measured["simplicity"] == pytest.approx(simplicity, abs=1e-12)
  same = [
    called
    for record, of in pairs
    if record["classification"] == "multi_solutions"
    for called in of >= 0.5
  ]
  assert measured["multi_solutions"] == pytest.approx(f1_score(np.ones(len(same)), same), abs=1e-12)


def test_process_bench_averages_the_f1_of_its_subsets(text_benchmark):
  items = benchmarks.load(str(text_benchmark))
  scores = [np.array(s) for s in ([0.9, 0.2, 0.1], [0.9, 0.2, 0.1], [0.9, 0.8, 0.7])]
  report = step_evaluation.evaluate(items, scores, bootstrap_draws=0)
  measured = benchmarks.measures("ProcessBench", report)["fixed_0.5"]
  assert measured == {
    "average F1": 0.0,
    "gsm8k F1": 0.0,
    "math F1": 0.0,
  }  # each lacks a kind of item


def test_a_benchmark_that_nobody_knows_is_an_error_with_its_keys(tmp_path):
  (tmp_path / "x.jsonl").write_text('{"prompt": "q", "answer": "a"}\n')
  with pytest.raises(
    EvaluationError, match="x.jsonl item 0 has the keys answer, prompt, of no known"
  ):
    benchmarks.load(str(tmp_path))
