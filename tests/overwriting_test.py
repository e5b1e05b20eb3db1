"""No command's output replaces one of its inputs, whatever links and names lead there."""

import json
import os

import pytest

from bis_jax import files
from bis_jax.errors import UserError
from bis_jax.scoring import solution_files
from tests.commands import run_command


@pytest.fixture
def data(tmp_path, monkeypatch):
  """A folder with the inputs of every command, each of which must stay as it is."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "bench").mkdir()
  items = [{"problem": "Add.", "steps": ["a"], "label": -1}]
  (tmp_path / "bench/math.json").write_text(json.dumps(items))
  (tmp_path / "scores.jsonl").write_text('{"index": 0, "scores": [0.7]}\n')
  (tmp_path / "dev.jsonl").write_text('{"scores": [0.6], "labels": [1], "data_source": "a"}\n')
  (tmp_path / "candidates.jsonl").write_text(
    '{"id": 1, "candidates": [{"scores": [1], "correct": true}]}\n'
  )
  (tmp_path / "solutions.jsonl").write_text('{"id": 1, "question": "q", "steps": ["s"]}\n')
  (tmp_path / "annotations").mkdir()
  (tmp_path / "annotations/a.jsonl").write_text("{}\n")
  (tmp_path / "run").mkdir()
  (tmp_path / "run/config.json").write_text("{}\n")
  (tmp_path / "link.jsonl").symlink_to("scores.jsonl")
  os.link("solutions.jsonl", "hard.jsonl")
  return tmp_path


def contents(folder):
  return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


STEPS = ["--benchmark=bench", "--scores=scores.jsonl"]
FROM = ["--annotations=annotations", "--overwrite"]


@pytest.mark.parametrize(
  ("command", "arguments"),
  [
    ("evaluate", [*STEPS, "--out=scores.jsonl"]),
    ("evaluate", [*STEPS, "--out=link.jsonl"]),
    ("evaluate", [*STEPS, "--out=bench/math.json"]),
    ("evaluate", [*STEPS, "--out=bench/evaluation.json"]),
    ("evaluate", [*STEPS, "--out=dev.jsonl", "--held_out=run/../dev.jsonl"]),
    ("evaluate", [*STEPS, "--out=dev.jsonl", "--baseline=dev.jsonl"]),
    ("evaluate", [*STEPS, "--out=new.json", "--plot=scores.jsonl"]),
    ("evaluate", ["--candidates=candidates.jsonl", "--out=candidates.jsonl"]),
    ("evaluate", ["--candidates=candidates.jsonl", "--out=new.json", "--plot=new.json"]),
    ("evaluate", ["--benchmark=bench", "--checkpoint=run", "--out=run/config.json"]),
    ("score", ["--checkpoint=run", "--input=solutions.jsonl", "--output=solutions.jsonl"]),
    ("score", ["--checkpoint=run", "--input=solutions.jsonl", "--output=hard.jsonl"]),
    ("score", ["--checkpoint=run", "--input=link.jsonl", "--output=scores.jsonl"]),
    ("select", [*FROM, "--out=annotations/a.jsonl"]),
    ("select", [*FROM, "--out=annotations/kept.jsonl"]),
    ("select", [*FROM, "--out=.", "--format=dataset"]),
    ("select", [*FROM, "--out=new.jsonl", "--table=new.jsonl"]),
    ("prepare", ["--annotations=annotations", "--images=bench", "--out=annotations"]),
    ("prepare", ["--annotations=annotations", "--images=bench", "--out=bench"]),
    ("prepare", ["--annotations=annotations", "--images=bench", "--out=bench/corpus"]),
    ("report", ["run", "--out=run"]),
    ("export", ["--workdir=run", "--out=run"]),
  ],
)
def test_an_output_that_is_an_input_is_refused(data, command, arguments):
  before = contents(data)
  message = run_command(command, *arguments)
  assert message and "name another --" in message, message
  assert contents(data) == before


@pytest.mark.parametrize(
  "content", ["my notes", "my notes\n", '{"id": 1}\n', '{"id": 1, "scores": [1]}\nnotes', "[]\n"]
)
def test_a_file_that_is_no_output_of_score_is_refused(data, content):
  """Mutation caught: the last line of any text file is cut off as if a kill had left it."""
  target = data / "target.jsonl"
  for note in (False, True):
    target.write_text(content)
    if note:
      (data / "target.jsonl.model.json").write_text('{"checkpoint": "x"}')
    with pytest.raises(solution_files.OutputError, match="not written by this command"):
      solution_files.score_file("run", data / "solutions.jsonl", target, data, chunk=1)
    assert target.read_text() == content


def test_paths_in_a_bucket_are_compared_by_name(bucket):
  (bucket / "in" / "1.jsonl").write_text("{}")
  out = f"{bucket}/b"
  files.refuse_overwriting({"--out": out, "--plot": ""}, {"--in": None, "--x": "/gs:/bis-jax/b"})
  with pytest.raises(UserError, match=f"--out={out} is also --in: name another --out"):
    files.refuse_overwriting({"--out": out}, {"--in": out})
  with pytest.raises(UserError, match=f"--out={bucket}/in/out is inside --in={bucket}/in: name"):
    files.refuse_overwriting({"--out": f"{bucket}/in/out"}, {}, {"--in": bucket / "in"})
