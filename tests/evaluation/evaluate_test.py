"""The evaluate command from a shell: files in, files out, and messages instead of tracebacks."""

import json
import pathlib
import subprocess
import sys

import pytest

SOURCE = pathlib.Path(__file__).resolve().parents[2]


def evaluate(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "bis_jax.evaluate", *arguments],
    cwd=SOURCE,
    capture_output=True,
    text=True,
    timeout=120,
  )


@pytest.fixture
def text_run(tmp_path):
  """Flags of a run on a text benchmark of two items."""
  solution = {"problem": "Add.", "steps": ["a", "b"], "generator": "m"}
  items = [solution | {"label": 1}, solution | {"label": -1}]
  (tmp_path / "bench").mkdir()
  (tmp_path / "bench/math.json").write_text(json.dumps(items))
  lines = ['{"index": 1, "scores": [0.9, 0.8]}', '{"index": 0, "scores": [0.7, 0.6]}']
  (tmp_path / "scores.jsonl").write_text("\n".join(lines))
  (tmp_path / "dev.jsonl").write_text(
    '{"scores": [0.65, 0.2], "labels": [1, -1], "data_source": "a"}'
  )
  return [
    f"--benchmark={tmp_path / 'bench'}",
    f"--scores={tmp_path / 'scores.jsonl'}",
    f"--out={tmp_path / 'new/evaluation.json'}",
  ]


def test_scores_become_an_evaluation_and_a_page(tmp_path, text_run):
  run = evaluate(*text_run, f"--held_out={tmp_path / 'dev.jsonl'}", f"--page={tmp_path / 'page'}")
  assert run.returncode == 0, run.stderr
  report = json.loads((tmp_path / "new/evaluation.json").read_text())
  assert list(report["thresholds"]) == ["fixed_0.5", "tuned_on_dev", "tuned_on_test"]
  assert report["thresholds"]["tuned_on_dev"]["threshold"] == 0.65
  assert report["thresholds"]["fixed_0.5"]["accuracy"] == 0.75
  assert report["thresholds"]["tuned_on_test"]["accuracy"] == 1
  assert "tuned_on_test  t = 0.7000  overall_source_weighted 100.00" in run.stdout
  assert (tmp_path / "page/index.html").exists()


def test_a_baseline_becomes_a_comparison(text_run):
  run = evaluate(*text_run, text_run[1].replace("--scores", "--baseline"))
  assert run.returncode == 0, run.stderr
  assert "overall_source_weighted +0.00" in run.stdout


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "give --scores=FILE or --checkpoint=WORKDIR with --benchmark=DIR"),
    (["--scores=x"], "say with --out=FILE.json"),
    (["--scores=x", "--out=y"], "name the benchmark that was scored"),
    (["--scores=x", "--checkpoint=y", "--out=z"], "give --scores=FILE or --checkpoint=WORKDIR"),
    (["--candidates=/nowhere/x", "--out=y"], "No such file"),
    (["evaluation.json"], "what is 'evaluation.json'?"),
  ],
)
def test_bad_flags_end_with_a_message(tmp_path, arguments, message):
  run = evaluate(*arguments)
  assert run.returncode == 1
  assert message in run.stderr and "Traceback" not in run.stderr
  assert not (SOURCE / "y").exists()
