"""The evaluate command: files in, files out, and messages instead of tracebacks."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.commands import run_command


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


def test_scores_become_an_evaluation_and_a_page(tmp_path, text_run, capsys):
  more = [f"--held_out={tmp_path / 'dev.jsonl'}", f"--page={tmp_path / 'page'}"]
  assert run_command("evaluate", *text_run, *more) is None
  report = json.loads((tmp_path / "new/evaluation.json").read_text())
  assert list(report["thresholds"]) == ["fixed_0.5", "tuned_on_dev", "tuned_on_test"]
  assert report["thresholds"]["tuned_on_dev"]["threshold"] == 0.65
  assert report["thresholds"]["fixed_0.5"]["accuracy"] == 0.75
  assert report["thresholds"]["tuned_on_test"]["accuracy"] == 1
  assert "tuned_on_test  t = 0.7000  overall_source_weighted 100.00" in capsys.readouterr().out
  assert (tmp_path / "page/index.html").exists()


def test_several_benchmarks_share_a_command_and_a_page(tmp_path, text_run, capsys):
  errors = {"modified_question": "Q", "modified_process": ["a", "b"], "error_steps": [2]}
  (tmp_path / "prm").mkdir()
  (tmp_path / "prm/x.jsonl").write_text(json.dumps(errors | {"classification": "circular"}))
  (tmp_path / "prm_scores.jsonl").write_text('{"index": 0, "scores": [0.9, 0.1]}')
  names = [str(tmp_path / "bench"), str(tmp_path / "prm")]
  flags = [
    f"--benchmark={','.join(names)}",
    f"--scores={tmp_path / 'scores.jsonl'},{tmp_path / 'prm_scores.jsonl'}",
    f"--out={tmp_path / 'out.json'}",
  ]
  assert run_command("evaluate", *flags, f"--page={tmp_path / 'page'}") is None
  report = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
  assert list(report) == names
  assert report[names[1]]["published"]["fixed_0.5"]["PRMScore"] == 1
  page = (tmp_path / "page/index.html").read_text()
  assert "PRMScore" in page and "average F1" in page
  assert (tmp_path / "page/1-PRMBench/index.html").exists() and "1-PRMBench/index.html" in page
  assert "PRMBench, " in capsys.readouterr().out
  flags[1] = text_run[1]
  assert "--scores names 1 files for 2 benchmarks" in run_command("evaluate", *flags)


def test_a_baseline_becomes_a_comparison(text_run, capsys):
  assert run_command("evaluate", *text_run, text_run[1].replace("--scores", "--baseline")) is None
  assert "overall_source_weighted +0.00" in capsys.readouterr().out


def test_a_score_file_needs_few_modules(text_run):
  """In a process of its own: neither JAX, Transformers nor Matplotlib is imported."""
  program = (
    "import sys; from absl import app; from bis_jax import evaluate\n"
    "try: app.run(evaluate.main)\n"
    "finally:\n"
    "  ours = [name for name in sys.modules if name.startswith('bis_jax')]\n"
    "  assert len(ours) < 22, ours\n"
    "  assert not {'jax', 'transformers', 'matplotlib'} & set(sys.modules)"
  )
  root = pathlib.Path(__file__).resolve().parents[2]
  done = subprocess.run(
    [sys.executable, "-c", program, *text_run], cwd=root, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert "tuned_on_test" in done.stdout


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "give --scores=FILE or --checkpoint=WORKDIR with --benchmark=DIR"),
    (["--scores=x", "--benchmark=b"], "name the file to write with --out=FILE.json"),
    (["--scores=x", "--out=y"], "name the benchmark that was scored"),
    (["--scores=x", "--checkpoint=y", "--out=z"], "give --scores=FILE or --checkpoint=WORKDIR"),
    (["--candidates=/nowhere/x", "--out=y"], "No such file"),
    (["evaluation.json"], "unexpected argument 'evaluation.json'"),
  ],
)
def test_bad_flags_end_with_a_message(tmp_path, monkeypatch, arguments, message):
  monkeypatch.chdir(tmp_path)
  assert message in run_command("evaluate", *arguments)
  assert not list(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback(text_run, monkeypatch):
  from bis_jax.evaluation import step_evaluation

  def broken(*_, **__):
    raise ValueError("a bug")

  monkeypatch.setattr(step_evaluation, "evaluate", broken)
  with pytest.raises(ValueError, match="a bug"):
    run_command("evaluate", *text_run)
