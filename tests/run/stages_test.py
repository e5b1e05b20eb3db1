"""The whole run on a small toy corpus: its files, resuming, and invalid input."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from bis_jax.errors import UserError
from bis_jax.evaluation import json_records
from bis_jax.inputs import pipeline
from bis_jax.parallel import ownership
from bis_jax.parallel.preemption import Preempted
from bis_jax.reports import run_table
from bis_jax.run import stages
from bis_jax.scoring import restore, solution_files
from bis_jax.scoring.restore import load_run
from bis_jax.selection.manifest import Manifest, ManifestError
from bis_jax.settings import keys, workdir
from bis_jax.training import examples, loop
from configs import qwen_bis10

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _parameters(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the latest checkpoint's state as numpy arrays by path."""
  latest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
  with ocp.StandardCheckpointer() as checkpointer:
    state = checkpointer.restore(latest / "state")
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _assert_bit_equal(one: pathlib.Path, other: pathlib.Path):
  ours, theirs = _parameters(one), _parameters(other)
  assert set(ours) == set(theirs) and len(ours) > 20
  for path, array in ours.items():
    np.testing.assert_array_equal(array, theirs[path], err_msg=path)


@pytest.fixture(scope="module")
def unbroken(small_config, tmp_path_factory) -> pathlib.Path:
  """The workdir of a run that was never stopped."""
  folder = tmp_path_factory.mktemp("unbroken") / "run"
  stages.run(small_config, str(folder))
  return folder


def test_the_workdir_holds_what_a_person_looks_for(unbroken, small_config):
  names = {path.name for path in unbroken.iterdir()}
  assert names >= {
    "config.json",
    "manifest.json",
    "metrics.jsonl",
    "evaluation.json",
    "index.html",
    "plots",
    "checkpoints",
    "tensorboard",
  }
  lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
  for key in ("loss", "step_seconds", "data_wait_seconds", "tokens_per_second", "token_padding"):
    assert all(np.isfinite(line[key]) for line in lines), key
  evaluation = json.loads((unbroken / "evaluation.json").read_text())
  for name in ("fixed_0.5", "tuned_on_test"):
    block = evaluation["thresholds"][name]
    assert 0 <= block["macro_f1_pooled"] <= 1 and 0 <= block["overall_source_weighted"] <= 1
  assert len(evaluation["per_source"]) == 5
  manifest = Manifest.load(unbroken / "manifest.json")
  assert (manifest.strategy, manifest.fraction, len(manifest)) == ("bis", 0.1, 100)


def test_a_finished_run_started_again_changes_nothing(unbroken, small_config):
  before = _parameters(unbroken)
  stages.run(small_config, str(unbroken))
  after = _parameters(unbroken)
  assert all((before[path] == after[path]).all() for path in before)
  assert len((unbroken / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_run_shares_prefixes_and_resumes_exactly(small_config, tmp_path, caplog):
  """All rollouts, about three per question, in rows as they are proposed."""
  with small_config.unlocked():
    config = small_config.copy_and_resolve_references()
  config.unlock()
  config.selection.strategy, config.selection.fraction = "full", 1.0
  config.inputs.row_streams, config.inputs.row_tokens, config.inputs.row_patches = -1, 512, 256
  config.evaluation.benchmark, config.pretrain.steps = "", 0
  config.train.steps, config.train.checkpoint_every = 3, 1
  one, other = tmp_path / "run", tmp_path / "again"
  with caplog.at_level("INFO"):
    stages.run(config, str(one))
  assert re.search(r"shared prefixes: rows of \d+ tokens of prefixes and \d streams", caplog.text)
  shutil.copytree(one, other)
  shutil.rmtree(other / "checkpoints" / "3")
  stages.run(config, str(other))
  _assert_bit_equal(one, other)


def test_a_killed_run_started_again_ends_as_if_never_stopped(unbroken, small_config, tmp_path):
  """kill -9 while it trains, once a checkpoint is there; then the same command."""
  folder = tmp_path / "run"
  ours, recipe = (
    keys.flatten(json.loads(config.to_json()))
    for config in (small_config, qwen_bis10.get_config("toy"))
  )
  changes = [f"--config.{key}={value}" for key, value in ours.items() if recipe[key] != value]
  command = [sys.executable, "-m", "bis_jax.main", "--config=configs/qwen_bis10.py:toy"]
  command += [f"--workdir={folder}", *changes]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
  deadline = time.monotonic() + 300
  while not list(folder.glob("checkpoints/[0-9]*/state/_METADATA")):
    assert process.poll() is None, process.stderr.read().decode()[-2000:]
    assert time.monotonic() < deadline
    time.sleep(0.02)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  assert not (folder / "evaluation.json").exists(), "it was killed too late to test anything"
  # As a kill in the midst of a save leaves it, whether or not this one did.
  cut_off = folder / "checkpoints" / "4.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
  cut_off.mkdir(parents=True, exist_ok=True)
  (cut_off / "manifest.ocdbt").write_bytes(b"half of a file")
  stages.run(small_config, str(folder))
  _assert_bit_equal(folder, unbroken)
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def _stopped(config, folder: str, number: int) -> None:
  """Runs until a signal, as the batch of step 3 is requested; checkpoints are due every 2 steps."""
  handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  take = pipeline.BatchIterator.__next__

  def hit(self):
    if self.next_batch == 2:
      os.kill(os.getpid(), number)
    return take(self)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline.BatchIterator, "__next__", hit)
    with pytest.raises(Preempted, match="step 3 of 6 is saved: run the same command again"):
      stages.run(config, folder)
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
  assert pathlib.Path(folder, "checkpoints", "3", "state", "_METADATA").exists()


def test_a_run_told_to_stop_saves_at_once(small_config, tmp_path):
  _stopped(small_config, str(tmp_path / "run"), signal.SIGINT)


def test_a_stopped_run_in_a_relative_workdir_ends_as_if_never_stopped_and_scores(
  unbroken, small_config, tmp_path, monkeypatch
):
  """README's own command names one; Orbax refuses relative paths."""
  monkeypatch.chdir(tmp_path)
  _stopped(small_config, "runs/relative", signal.SIGTERM)
  monkeypatch.delattr(stages, "initial_checkpoint")  # not needed on resume
  stages.run(small_config, "runs/relative")
  _assert_bit_equal(tmp_path / "runs/relative", unbroken)
  solutions = tmp_path / "solutions.jsonl"
  solutions.write_text(json.dumps({"id": 1, "question": "Add.", "steps": ["One.", "Two."]}) + "\n")
  solution_files.score_file(
    "runs/relative", solutions, tmp_path / "scores.jsonl", root=tmp_path, chunk=8
  )
  assert len(json.loads((tmp_path / "scores.jsonl").read_text())["scores"]) == 2


def test_another_config_is_refused_and_nothing_is_overwritten(unbroken, small_config):
  other = small_config.copy_and_resolve_references()
  with other.unlocked():
    other.selection.fraction = 0.2
  before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
  with pytest.raises(workdir.WorkdirError, match="selection.fraction: 0.1 there, 0.2 here"):
    stages.run(other, str(unbroken))
  assert before == {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}


def test_another_manifest_is_refused(unbroken, small_config, tmp_path):
  workdir.claim(epath.Path(tmp_path) / "run", small_config)
  manifest = json.loads((unbroken / "manifest.json").read_text())
  manifest["alpha"] = 0.5
  (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(ManifestError, match="select again"):
    stages.run(small_config, str(tmp_path / "run"))


def test_a_bad_loss_stops_the_run_and_names_the_records(small_config, tmp_path, monkeypatch):
  labels = examples.step_labels

  def damaged(scores, *arguments):
    targets, weights = labels(scores, *arguments)
    return np.where(scores == 1 / 16, np.nan, targets), weights

  monkeypatch.setattr(examples, "step_labels", damaged)
  config = small_config.copy_and_resolve_references()
  with pytest.raises(loop.NonFiniteLossError, match=r"Records of the rows at fault: \w+:\d+"):
    stages.run(config, str(tmp_path / "run"))
  assert not list((tmp_path / "run").glob("checkpoints/[0-9]*"))


def test_a_bad_loss_of_all_rows_blames_no_record():
  """A learning rate that is too high makes every row bad."""
  batch = {"example_index": np.array([[0, 1], [2, -1], [-1, -1]])}
  source = [types.SimpleNamespace(id=f"a:{i}") for i in range(3)]

  def check(row_loss):
    metrics = {"loss": np.nan, "grad_norm": np.nan, "row_loss": jnp.array([row_loss])}
    loop._check_finite(3, metrics, batch, source)

  with pytest.raises(loop.NonFiniteLossError, match="lower config.optim.learning_rate"):
    check([np.nan, np.inf, 0.0])
  with pytest.raises(loop.NonFiniteLossError, match="rows at fault: a:2$"):
    check([0.5, np.nan, 0.0])
  # Adam with an eps that float32 rounds to 0 makes parameters NaN that had no gradient.
  metrics = {"loss": 1.0, "grad_norm": 1.0, "row_loss": jnp.ones((1, 3)), "update_is_finite": False}
  with pytest.raises(loop.NonFiniteLossError, match="No record is at fault.*config.optim.eps"):
    loop._check_finite(3, metrics, batch, source)


def test_a_missing_corpus_ends_the_process_with_a_sentence_and_a_nonzero_code(tmp_path):
  """All other wrong values end in process, in tests/settings/wrong_values_test.py."""
  command = [sys.executable, "-m", "bis_jax.main", "--config=configs/toy_bis10.py"]
  command += [f"--workdir={tmp_path / 'run'}", "--config.corpus.name=visualprm"]
  done = subprocess.run(
    [*command, "--config.pretrain.steps=0"], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode != 0 and "hf download" in done.stderr
  assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_a_second_run_in_a_workdir_is_told_of_the_first_and_changes_nothing(unbroken, small_config):
  before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
  with (
    ownership.owned(unbroken / workdir.OWNER, "it"),
    pytest.raises(ownership.OwnedError, match=f"{unbroken} is in use by process {os.getpid()} on"),
  ):
    stages.run(small_config, str(unbroken))
  assert before == {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}


def test_changed_files_of_a_workdir_are_told_or_made_again(unbroken, tmp_path, caplog):
  folder = tmp_path / "run"
  shutil.copytree(unbroken, folder)
  for name, old, new in [
    ("tokenizer/tokenizer.json", '"version": "1.0"', '"version": "1.1"'),
    ("evaluation.json", '"accuracy": 0.', '"accuracy": 1.'),
    ("scores.jsonl", "0.", "1."),
  ]:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))
  run = load_run(str(folder))  # with the tokenizer that the config names
  restore.save_tokenizer(run.processor.tokenizer, epath.Path(folder))
  name = "tokenizer/tokenizer.json"
  assert (folder / name).read_bytes() == (unbroken / name).read_bytes()
  run_table.read_run(str(folder), "fixed_0.5", "accuracy")
  with contextlib.suppress(UserError):  # a score above 1
    list(json_records.read(str(folder / "scores.jsonl"), dict))
  for name in ("tokenizer/tokenizer.json", "evaluation.json", "scores.jsonl"):
    assert f"{folder}/{name} is not as the run wrote it" in caplog.text
  caplog.clear()
  load_run(str(folder))
  assert not caplog.text
