"""Trackers get what metrics.jsonl gets, offline; one that is not installed is named before any work."""

import json
import sys
import time
import types

import pytest
from etils import epath

from bis_jax.errors import UserError
from bis_jax.training import trackers
from bis_jax.training.metrics import MetricWriter
from configs import common


def _config(name):
  c = common.get_config()
  c.train.tracker = name
  return c


def _write(config, workdir, steps, resume_step=0):
  writer = MetricWriter(
    workdir,
    resume_step=resume_step,
    write=True,
    tracker=trackers.Tracker(config, workdir),
  )
  for step in steps:
    writer.write(step, {"loss": 1 / step})
    writer.write(step, {"evaluation/f1": 0.5})
  writer.close()


def test_wandb_gets_every_step_offline_and_resumes_its_run(tmp_path, monkeypatch):
  import wandb

  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_DIR", str(tmp_path))
  monkeypatch.setenv("WANDB_SILENT", "true")
  workdir = epath.Path(tmp_path / "run")
  workdir.mkdir()
  _write(_config("wandb"), workdir, (1, 2))
  [folder] = tmp_path.glob("wandb/offline-run-*")
  [file] = folder.glob("*.wandb")
  deadline = time.monotonic() + 30  # its own process writes the file
  words = (b"evaluation/f1", b"loss", b"selection.fraction")
  while not all(word in file.read_bytes() for word in words):
    assert time.monotonic() < deadline, file.read_bytes()
    time.sleep(0.05)
  _write(_config("wandb"), workdir, (3,), resume_step=2)
  names = {f.name for f in tmp_path.glob("wandb/offline-run-*/*.wandb")}
  assert len(names) == 1, "a resumed run is another one for wandb"
  assert wandb.run is None


def test_trackio_gets_every_step_offline(tmp_path, monkeypatch):
  """In a stub's place of the library: what it is called with; benchmarks/trackers.py has the real one."""
  calls = []
  run = types.SimpleNamespace(
    log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
  )
  stub = types.ModuleType("trackio")
  stub.init = lambda **arguments: calls.append(arguments) or run
  monkeypatch.setitem(sys.modules, "trackio", stub)
  workdir = epath.Path(tmp_path / "run")
  workdir.mkdir()
  _write(_config("trackio"), workdir, (1,))
  start, *lines, end = calls
  assert (start["project"], start["name"], start["resume"]) == ("bis_jax", "run", "allow")
  assert start["config"]["model.size"] == "7b"
  assert lines == [(1, {"loss": 1.0}), (1, {"evaluation/f1": 0.5})] and end == "finish"
  assert json.loads((workdir / "metrics.jsonl").read_text())["evaluation/f1"] == 0.5


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
  monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="'wandb', which is not installed: pip install wandb"):
    trackers.check(_config("wandb"))
  trackers.check(_config("none"))
