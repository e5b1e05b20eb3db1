"""The examples run: the notebook with fewer steps, the scripts on what its commands also read."""

import copy
import json
import pathlib
import re

import nbclient
import nbformat
import pytest

from bis_jax.corpus.reading import AnnotationError
from examples import select_for_any_trainer
from tests.xla_flags import FAST_COMPILATION

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOK = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)

SHORTER = {  # and the programs of all tests, in fewer processes
  '"--config.pretrain.steps=10"': '"--config.pretrain.steps=0", "--config.train.compile_cache="',
  '"--config.train.steps=20"': '"--config.train.steps=2", "--config.corpus.workers=1"',
  "dev_rollouts=50": "dev_rollouts=8",
  '"--fraction=0.1"': '"--fraction=0.1", "--workers=1"',
}


def test_the_notebook_is_stored_without_outputs():
  nbformat.validate(NOTEBOOK)
  assert not any(cell.get("outputs") for cell in NOTEBOOK.cells)


def test_the_notebook_and_the_scoring_script_run(monkeypatch, tmp_path):
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("XLA_FLAGS", FAST_COMPILATION)  # and one device
  notebook = copy.deepcopy(NOTEBOOK)
  for cell in notebook.cells:
    for flag, shorter in SHORTER.items():
      cell.source = cell.source.replace(flag, shorter)
  assert all(
    shorter in str([cell.source for cell in notebook.cells]) for shorter in SHORTER.values()
  )
  script = nbformat.v4.new_code_cell(
    "import runpy\nsys.argv[1:] = [f'{folder}/run', str(paths[0])]\n"
    "runpy.run_module('examples.score_solutions', run_name='__main__')"
  )
  notebook.cells = [*notebook.cells, script]
  resources = {"metadata": {"path": str(ROOT / "examples")}}
  nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
  printed = [cell.outputs[0] for cell in notebook.cells if cell.get("outputs")]
  assert any("image/png" in output.get("data", {}) for output in printed)
  assert "100 lines" in notebook.cells[-3].outputs[-1].text
  shown = "".join(o.text for o in notebook.cells[-1].outputs if o.get("name") == "stdout")
  assert len(re.findall(r"^0\.\d{3}  ", shown, re.M)) == 3


def test_the_selection_script_writes_one_row_per_kept_rollout(tmp_path):
  step = {"step": "One.", "score": 0.5, "num_mc_correct": 8, "num_mc_total": 16}
  record = {"image": "a.png", "question": "Q?", "answer": "1"}
  lines = [
    json.dumps(record | {"steps_with_score": [step, step | {"score": s, "num_mc_correct": 16 * s}]})
    for s in (0, 1)
  ]
  annotations, out = tmp_path / "geo.jsonl", tmp_path / "out.jsonl"
  annotations.write_text("\n".join(lines) + "\n")
  select_for_any_trainer.main(str(annotations), str(out), 0.5)
  (row,) = map(json.loads, out.read_text().splitlines())
  assert row["id"] == "geo:0" and row["labels"] == [True, False]
  assert row["completions"] == ["One.", "One."] and row["images"] == ["a.png"]


def test_the_selection_script_names_missing_annotations(tmp_path):
  with pytest.raises(AnnotationError, match="no annotations at"):
    select_for_any_trainer.main(str(tmp_path / "none"), str(tmp_path / "out.jsonl"))
