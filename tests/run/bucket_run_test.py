"""A run whose every path is in a bucket, and every command on it."""

import contextlib
import json
import os
import pathlib
from typing import NamedTuple

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from tensorboardX.proto.event_pb2 import Event

from bis_jax.run import stages
from bis_jax.scoring.restore import load_run
from bis_jax.settings.locations import locate
from bis_jax.training import loop

BUCKET = epath.Path("gs://bis-jax/bucket_run")


class Ran(NamedTuple):
  disk: pathlib.Path  # workdirs of the same run
  bucket: epath.Path
  config: ConfigDict  # of the second, with everything in the bucket
  params: dict[str, np.ndarray]  # of the first


def _config(small_config, **changes) -> ConfigDict:
  c = small_config.copy_and_resolve_references()
  with c.unlocked():
    c.evaluation.dev_rollouts, c.train.profile_steps = 8, (2, 1)
    c.update_from_flattened_dict(changes)
  return c


@pytest.fixture(scope="module")
def whole_arrays():
  """Not here: every device writes its part, as in a run of a user."""


@pytest.fixture(scope="module")
def ran(small_config, bucket_server, own_programs, tmp_path_factory) -> Ran:
  folder = tmp_path_factory.mktemp("runs")
  here = tmp_path_factory.mktemp("here")
  stages.run(_config(small_config), str(folder / "run"))
  changes = {"corpus.cache": f"{BUCKET}/cache", "train.compile_cache": "programs"}
  config = _config(small_config, **changes)
  with contextlib.chdir(here):
    stages.run(config, f"{BUCKET}/run")
  assert not [*here.iterdir()]  # no folder gs:
  return Ran(folder / "run", BUCKET / "run", config, load_run(str(folder / "run")).params)


def _assert_same_run(ran: Ran) -> None:
  for name in ("manifest.json", "scores.jsonl", "held_out.jsonl", "evaluation.json"):
    assert (ran.bucket / name).read_bytes() == (ran.disk / name).read_bytes(), name
  losses = [
    [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for workdir in (ran.disk, ran.bucket)
  ]
  assert len(losses[0]) == 6 and losses[0] == losses[1]
  params = load_run(str(ran.bucket)).params
  for path, value in ran.params.items():
    np.testing.assert_array_equal(np.asarray(value), np.asarray(params[path]), err_msg=path)


def test_a_run_in_a_bucket_is_that_on_a_disk(ran, bucket_server):
  _assert_same_run(ran)
  kinds = {path.name.split("-")[0] for path in (BUCKET / "cache").iterdir()}
  assert kinds == {"toy", "corpus", "backbone", "programs"}
  on_disk = {path.relative_to(ran.disk).parts[0] for path in ran.disk.rglob("*")}
  assert {path.name for path in ran.bucket.iterdir()} == on_disk  # so the owner's file has gone
  (events,) = (ran.bucket / "tensorboard").iterdir()
  (event,) = [n for n in bucket_server.names() if n.endswith(".trace.json.gz")]
  assert event.startswith("bis-jax/bucket_run/run/profile/")
  assert len(_steps(events.read_bytes())) == 6


def _steps(records: bytes) -> set[int]:
  """The steps of the scalars in a file of TensorBoard events."""
  steps, at = set(), 0
  while at < len(records):
    size = int.from_bytes(records[at : at + 8], "little")
    event = Event.FromString(records[at + 12 : at + 12 + size])
    steps |= {event.step} if event.summary.value else set()
    at += size + 16
  return steps


def test_a_run_resumes_from_an_older_checkpoint_in_the_bucket(ran, bucket_server, monkeypatch):
  """The newest one is damaged, and is moved away; the results are gone."""
  newest = f"{ran.bucket}/checkpoints/6/state/".removeprefix("gs://")
  (name,) = [name for name in bucket_server.names(newest) if "_METADATA" in name]
  epath.Path(f"gs://{name}").write_text("{")
  for name in ("scores.jsonl", "held_out.jsonl", "evaluation.json", "index.html"):
    (ran.bucket / name).unlink()
  started, restore = [], loop.Checkpoints.restore

  def restored(self, shapes):
    state = restore(self, shapes)
    started.append(int(state.step))
    return state

  monkeypatch.setattr(loop.Checkpoints, "restore", restored)
  stages.run(ran.config, str(ran.bucket))
  assert started == [4]
  _assert_same_run(ran)
  (aside,) = (ran.bucket / "damaged").iterdir()
  assert aside.name.startswith("6-") and (aside / "state/_METADATA").read_text() == "{"
  (ran.bucket / "damaged").rmtree()


def test_commands_read_and_write_the_bucket(ran, command, tmp_path, monkeypatch):
  """score, evaluate, report, export, select and prepare, all in a bucket."""
  monkeypatch.chdir(tmp_path)
  where, out = locate(ran.config), BUCKET / "out"

  def done(name, *arguments):
    ended = command(f"bis_jax.{name}", *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout

  record = json.loads((where.benchmark / "test.jsonl").read_text().splitlines()[0])
  solution = {
    "id": 1,
    "images": [f"images/{name.removeprefix('images/')}" for name in record["image"]],
    "question": record["question"],
    "steps": record["response"]["steps"],
  }
  lines = [solution, solution | {"id": 2, "images": ["../test.jsonl"]}]
  (out / "solutions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  score = [f"--input={out}/solutions.jsonl", f"--output={out}/scores.jsonl"]
  score += [f"--checkpoint={ran.bucket}", f"--image_root={where.benchmark}"]
  done("score", *score)
  first, second = map(json.loads, (out / "scores.jsonl").read_text().splitlines())
  expected = json.loads((ran.disk / "scores.jsonl").read_text().splitlines()[0])["scores"]
  np.testing.assert_allclose(first["scores"], expected, atol=1e-5)
  assert "not below the image root" in second["error"]
  (out / "scores.jsonl").write_text(json.dumps(first) + '\n{"id": ')  # left by a kill
  done("score", *score)
  assert [*map(json.loads, (out / "scores.jsonl").read_text().splitlines())] == [first, second]

  done(
    "evaluate",
    f"--benchmark={where.benchmark}",
    f"--scores={ran.bucket}/scores.jsonl",
    f"--out={out}/evaluation.json",
    f"--page={out}/page",
    "--bootstrap_draws=0",
  )
  thresholds = json.loads((out / "evaluation.json").read_text())["thresholds"]
  assert thresholds["fixed_0.5"]["threshold"] == 0.5 and (out / "page/index.html").exists()
  done("report", str(ran.bucket), f"--out={out}/report")
  assert (out / "report/items.html").exists() and (out / "report/table.md").exists()

  done("export", f"--workdir={ran.bucket}", f"--out={out}/exported", "--dtype=float32", "--base=")
  names = {path.name for path in (out / "exported").iterdir()}
  assert {"config.json", "tokenizer.json", "README.md", "model.safetensors.index.json"} <= names
  again = command("bis_jax.export", f"--workdir={ran.bucket}", f"--out={out}/exported")
  assert again.returncode == 1 and "is not empty" in again.stderr

  inputs = [f"--annotations={where.annotations}", f"--images={where.images}", "--workers=1"]
  done(
    "select",
    *inputs,
    f"--out={out}/subset.jsonl",
    f"--table={out}/table.npz",
    f"--report={out}/selection",
  )
  kept = json.loads((out / "subset.manifest.json").read_text())["rollouts"]
  assert len((out / "subset.jsonl").read_text().splitlines()) == kept > 50
  done("prepare", *inputs, f"--out={out}/corpus", "--max_rejected_fraction=0.1")
  assert json.loads((out / "corpus/corpus.json").read_text())["digest"]
  assert not [*tmp_path.iterdir()] and not os.path.exists("gs:")


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--workdir=gs://no-such-bucket/run", "there is no bucket gs://no-such-bucket"),
    ("--workdir=gs://closed/run", "Forbidden: this account may not use gs://closed: give it"),
    ("--workdir=memory://run", "memory://run can't be opened: a path is local or starts with"),
  ],
)
def test_a_bucket_that_cannot_be_used_is_one_sentence(
  ran, bucket_server, monkeypatch, flag, words, command
):
  bucket_server.make_bucket("closed")
  monkeypatch.setattr(bucket_server, "forbidden", {"closed"})
  ended = command(
    "bis_jax.score", "--input=x", f"--output={flag.partition('=')[2]}", "--checkpoint=y"
  )
  assert ended.returncode == 1 and words in ended.stderr and "Traceback" not in ended.stderr
  with pytest.raises((stages.UserError, OSError), match=words.replace(":", ".")):
    stages.run(ran.config, flag.partition("=")[2])
