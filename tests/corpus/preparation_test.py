"""Raw annotations and images -> a corpus that returns the same records, or nothing."""

import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from bis_jax.corpus import byte_ranges, preparation, reading, shards
from bis_jax.corpus.corpus import Corpus
from bis_jax.corpus.preparation import TooManyRejectedError, prepare
from bis_jax.corpus.rejections import CorpusError
from bis_jax.corpus.score_table import STRICT_OK


@pytest.fixture
def raw(write_files, record_of, line_of, png):
  """Two sources, five good rollouts on three images (one of them unused twice over), four bad."""
  steps = [
    {"step": "Thirds.\n\n求 \0 <prm>", "score": 1 / 3, "num_mc_correct": 1, "num_mc_total": 3},
    {"step": "Stopped.", "score": 0.0, "num_mc_correct": 0, "num_mc_total": 0},
  ]
  nlvr2 = [
    record_of((1.0,), image=["images/a.png", "images/b.png"]),
    record_of((0.5, 0.25), image="images/b.png", question_orig=""),
  ]
  geo = [
    record_of(),
    record_of(steps_with_score=steps, answer=None),
    record_of((0.125,), image="VisualPRM400K-v1.1-Raw/geo/none.png"),
    record_of((0.25,), image="VisualPRM400K-v1.1-Raw/geo/text.png"),
    record_of((0.25,), image=["geo/1.png", "geo/none.png", "geo/unused.png"]),
    record_of((0.0,), image="geo/1.png"),
  ]
  return write_files(
    {
      "annotations/nlvr2.jsonl": b"\n".join(map(line_of, nlvr2)),
      "annotations/geo.jsonl": b"\n".join([*map(line_of, geo), b"oops"]),
      "images/nlvr2/images/a.png": png(10, 20),
      "images/nlvr2/b.png": png(30, 40),
      "images/geo/1.png": png(50, 60),
      "images/geo/unused.png": png(),
      "images/geo/text.png": b"no image",
    }
  )


def run(raw, out, **options):
  options = {"max_rejected_fraction": 0.5, "workers": 1} | options
  return prepare(raw / "annotations", raw / "images", out, **options)


def tree(folder):
  return {
    path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
  }


def test_what_goes_in_comes_out(raw, tmp_path):
  corpus = run(raw, tmp_path / "out")
  rollouts = [corpus.rollout(i) for i in range(len(corpus))]
  assert [rollout.id for rollout in rollouts] == ["geo:0", "geo:1", "geo:5", "nlvr2:0", "nlvr2:1"]
  second = rollouts[1]
  assert second.scores == (1 / 3, 0.0) and second.measured == (True, False)
  assert second.steps == ("Thirds.\n\n求 \0 <prm>", "Stopped.")
  assert (second.question, second.answer) == ("How long is AB?", "")
  assert [rollout.images for rollout in rollouts[2:]] == [
    ("geo/1.png",),
    ("nlvr2/images/a.png", "nlvr2/b.png"),
    ("nlvr2/b.png",),
  ]
  assert [rollout.image_ids for rollout in rollouts] == [(0,), (0,), (0,), (1, 2), (2,)]
  assert [corpus.image_ids(i) for i in range(5)] == [rollout.image_ids for rollout in rollouts]
  assert corpus.image_sizes.tolist() == [[60, 50], [20, 10], [40, 30]]
  assert corpus.image_sizes.dtype == np.int32
  for rollout in rollouts:
    for name, image_id in zip(rollout.images, rollout.image_ids, strict=True):
      assert corpus.image(image_id) == (raw / "images" / name).read_bytes()


@pytest.mark.parametrize("packed", [False, True])
def test_a_bucket_gives_and_takes_the_same_corpus(raw, tmp_path, bucket, bucket_server, packed):
  """From a folder and from zips that are not extracted; records are read by their bytes."""
  here = run(raw, tmp_path / "out")
  for name in ("annotations", "images"):
    upload(raw / name, bucket / (f"{name}.zip" if packed else name), packed)
  names = [
    bucket / f"{name}.zip" if packed else bucket / name for name in ("annotations", "images")
  ]
  options = {"max_rejected_fraction": 0.5, "workers": 1}
  there = prepare(*names, bucket / "out", **options)
  assert there.stats == here.stats
  assert (there.score_table.mc_scores() == here.score_table.mc_scores()).all()
  assert there.rollouts(range(5)) == here.rollouts(range(5))
  assert there.images([2, 0, 1]) == here.images([2, 0, 1])
  copy = pickle.loads(pickle.dumps(there))
  assert copy.rollout(4) == here.rollout(4)
  bucket_server.log.clear()
  assert copy.images([1]) == here.images([1])
  [(method, name, size)] = bucket_server.log
  assert method == "GET" and "images-train" in name and size < 1000
  assert prepare(*names, bucket / "out", **options).digest == there.digest
  assert not [log for log in bucket_server.log if log[0] in ("POST", "PUT")], "reused"
  assert not list(tmp_path.rglob("*.array_record.*")), "nothing of it is left on this disk"


def test_damage_in_a_bucket_is_told_and_made_good(raw, bucket, bucket_server, caplog):
  corpus = run(raw, bucket / "out")
  expected = corpus.images(range(3))
  (shard,) = (bucket / "out/images/1.0.0").glob("*array_record*")
  data = bytearray(shard.read_bytes())
  data[data.index(b"IDAT") + 8] ^= 1
  shard.write_bytes(bytes(data))
  with pytest.raises(CorpusError, match="is damaged: run the same .* again"):
    corpus.images(range(3))
  again = run(raw, bucket / "out")
  assert "again" in caplog.text and again.images(range(3)) == expected


def test_an_earlier_corpus_copied_to_a_bucket_is_told(raw, bucket, monkeypatch):
  monkeypatch.setattr(byte_ranges.Ranges, "arrays", lambda self, name: {})
  corpus = run(raw, bucket / "out")
  with pytest.raises(CorpusError, match="earlier version .* local disk"):
    corpus.rollout(0)


def upload(folder, target, packed):
  """Copies a folder into a bucket, as a zip that compresses every other file if `packed`."""
  paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
  if not packed:
    for path in paths:
      place = target / path.relative_to(folder).as_posix()
      place.write_bytes(path.read_bytes())
    return
  content = io.BytesIO()
  with zipfile.ZipFile(content, "w") as archive:
    for at, path in enumerate(paths):
      kind = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)[at % 3]
      archive.write(path, path.relative_to(folder), kind)
  target.write_bytes(content.getvalue())


def test_the_score_table_leads_to_the_rollouts(raw, tmp_path):
  corpus = run(raw, tmp_path / "out")
  table = corpus.score_table
  assert table.digest == corpus.digest and len(table) == 8
  assert ((table.rollout >= 0) == (table.flags & STRICT_OK != 0)).all()
  for row in np.flatnonzero(table.rollout >= 0):
    rollout = corpus.rollout(table.rollout[row])
    assert rollout.id == f"{table.source_names[table.source[row]]}:{table.line[row]}"
    assert table.steps[row] == len(rollout.scores)
    assert table.statistics().score_sum[row] == sum(rollout.scores)
  ignored = table.statistics(tau=0.3, unmeasured="ignore")
  assert ignored.n.tolist() == [3, 1, 1, 1, 1, 1, 1, 2]
  assert ignored.n_pos.tolist() == [2, 1, 0, 0, 0, 0, 1, 1]


def test_rejections_and_notes_are_listed(raw, tmp_path, caplog):
  caplog.set_level("INFO", "bis_jax")
  corpus = run(raw, tmp_path / "out")
  listed = [json.loads(line) for line in (tmp_path / "out/rejections.jsonl").open()]
  assert [(bad["source"], bad["line"], bad["reason"]) for bad in listed] == [
    ("geo", 2, "missing_image"),
    ("geo", 3, "unreadable_image"),
    ("geo", 4, "missing_image"),
    ("geo", 6, "not_json"),
  ]
  assert "none.png" in listed[0]["detail"]
  assert corpus.stats == {
    "records": 9,
    "rejected": {"missing_image": 2, "unreadable_image": 1, "not_json": 1},
  }
  assert "rejected        2  missing_image: no such image file" in caplog.text
  notes = [json.loads(line) for line in (tmp_path / "out/notes.jsonl").open()]
  assert [(note["source"], note["line"], note["reason"]) for note in notes] == [
    ("geo", 1, "special_token_text")
  ]


def test_planted_records_are_found_and_no_good_one_is_lost(dirty_corpus, tmp_path):
  corpus = run(dirty_corpus, tmp_path / "out")
  planted = json.loads((dirty_corpus / "dirty.json").read_text())
  named = [
    (f"{bad['source']}.jsonl", bad["line"], bad["reason"])
    for name in ("rejections", "notes")
    for bad in map(json.loads, (tmp_path / f"out/{name}.jsonl").open())
  ]
  reasons = {
    "missing_image_file": "missing_image",
    "marker_in_step": "special_token_text",
    "image_token_in_step": "special_token_text",
    "chat_token_in_step": "special_token_text",
    "huge_step": "long_step",
  }
  for bad in planted:
    if bad["kind"] in reasons:
      assert (bad["file"], bad["line"], reasons[bad["kind"]]) in named
  assert len(named) == len(planted)
  stored = {corpus.rollout(i).id for i in range(len(corpus))}
  good = [json.loads(line) for line in (dirty_corpus / "truth.jsonl").open()]
  assert stored >= {f"{record['file'].removesuffix('.jsonl')}:{record['line']}" for record in good}


def test_tfds_reads_it_without_tensorflow(raw, tmp_path):
  corpus = run(raw, tmp_path / "out")
  rollouts = tfds.builder_from_directory(tmp_path / "out/rollouts/1.0.0")
  images = tfds.builder_from_directory(tmp_path / "out/images/1.0.0")
  assert rollouts.info.splits["train"].num_examples == len(corpus)
  example = rollouts.as_data_source(split="train")[1]
  assert example["scores"].tolist() == [1 / 3, 0.0]
  assert example["image_ids"] == [0]
  picture = images.as_data_source(split="train")[2]
  assert picture["image"].shape == (40, 30, 3)
  assert (picture["name"], picture["height"]) == (b"nlvr2/b.png", 40)
  assert "tensorflow" not in sys.modules


def test_a_pickled_corpus_opens_itself_again(raw, tmp_path):
  corpus = run(raw, tmp_path / "out")
  corpus.rollout(0)
  copy = pickle.loads(pickle.dumps(corpus))
  assert len(pickle.dumps(corpus)) < 500
  assert copy.rollout(4) == corpus.rollout(4) and copy.digest == corpus.digest


def test_the_same_inputs_are_not_prepared_again(raw, tmp_path, caplog, monkeypatch):
  caplog.set_level("INFO", "bis_jax")
  first = run(raw, tmp_path / "out")
  before = tree(tmp_path / "out")
  monkeypatch.setattr(preparation, "scan_files", None)
  again = run(raw, tmp_path / "out")
  assert "reusing the corpus" in caplog.text
  assert again.digest == first.digest and tree(tmp_path / "out") == before
  with pytest.raises(TooManyRejectedError):
    run(raw, tmp_path / "out", max_rejected_fraction=0.1)


def test_each_annotation_file_is_read_twice_and_only_recognized_if_nothing_changed(
  raw, tmp_path, line_of, monkeypatch
):
  path = raw / "annotations/geo.jsonl"
  path.write_bytes(b"\n".join([path.read_bytes(), line_of(), line_of()]))  # duplicates
  opened = []
  whole = reading.AnnotationFile.open
  monkeypatch.setattr(
    reading.AnnotationFile, "open", lambda file: opened.append(file.name) or whole(file)
  )
  run(raw, tmp_path / "out", max_rejected_fraction=0.6)
  assert sorted(opened) == ["geo.jsonl"] * 3 + ["nlvr2.jsonl"] * 3
  opened.clear()
  run(raw, tmp_path / "out", max_rejected_fraction=0.6)
  assert opened == ["geo.jsonl", "nlvr2.jsonl"]


def test_equal_inputs_with_other_times_are_checked_and_not_written_again(raw, tmp_path):
  """So is a corpus that an earlier version prepared: its `inputs` are made in another way."""
  first = run(raw, tmp_path / "out")
  before = tree(tmp_path / "out")
  stamp = (tmp_path / "out/index.npz").stat()
  for path in (raw / "annotations").iterdir():
    os.utime(path, (1, 1))
  again = run(raw, tmp_path / "out")
  assert (tmp_path / "out/index.npz").stat().st_ino == stamp.st_ino
  after = tree(tmp_path / "out")
  assert again.digest == first.digest and before.keys() == after.keys()
  changed = {str(name) for name in after if after[name] != before[name]}
  assert changed == {"corpus.json"}
  assert Corpus.open(tmp_path / "out").inputs != first.inputs


def test_a_corpus_of_an_earlier_version_opens(raw, tmp_path):
  """Its metadata name an old module, and its corpus.json has no digests of its files."""
  corpus = run(raw, tmp_path / "out")
  held = json.loads((tmp_path / "out/corpus.json").read_text())
  del held["files"], held["check"]
  (tmp_path / "out/corpus.json").write_text(json.dumps(held))
  for name in ("rollouts", "images"):
    path = tmp_path / "out" / name / "1.0.0/dataset_info.json"
    path.write_text(
      json.dumps(json.loads(path.read_text()) | {"moduleName": "bis_jax.corpus.builders"})
    )
  again = Corpus.open(tmp_path / "out")
  assert again.rollout(4) == corpus.rollout(4) and again.image(2) == corpus.image(2)


@pytest.mark.parametrize("change", ["a step", "an image", "a missing image"])
def test_other_inputs_are_prepared_again(raw, tmp_path, png, change):
  first = run(raw, tmp_path / "out")
  if change == "a step":
    path = raw / "annotations/geo.jsonl"
    path.write_bytes(path.read_bytes().replace(b"Step 1.", b"Step 7."))
  elif change == "an image":
    (raw / "images/geo/1.png").write_bytes(png(50, 60, (1, 2, 3)))
  else:
    (raw / "images/geo/none.png").write_bytes(png())
  again = run(raw, tmp_path / "out")
  assert again.digest != first.digest
  assert {path.name for path in tmp_path.iterdir()} == {"raw", "out"}


def test_zips_give_the_same_corpus(raw, tmp_path):
  for kind in ("annotations", "images"):
    with zipfile.ZipFile(raw / f"{kind}.zip", "w") as archive:
      for path in sorted((raw / kind).rglob("*.*")):
        archive.write(path, path.relative_to(raw))
  first = run(raw, tmp_path / "out")
  options = {"max_rejected_fraction": 0.5, "workers": 1}
  packed = prepare(raw / "annotations.zip", raw / "images.zip", tmp_path / "packed", **options)
  assert packed.digest == first.digest
  for i in range(len(first)):
    assert packed.rollout(i) == first.rollout(i)
  assert [packed.image(i) for i in range(3)] == [first.image(i) for i in range(3)]


def test_processes_and_shards_change_nothing(raw, tmp_path, monkeypatch):
  first = run(raw, tmp_path / "out")
  monkeypatch.setattr(preparation, "_SHARD_BYTES", 1)
  spread = run(raw, tmp_path / "spread", workers=2)
  assert len(list((tmp_path / "spread").rglob("rollouts-train*"))) == len(first) == 5
  assert spread.digest == first.digest
  assert [spread.rollout(i) for i in range(5)] == [first.rollout(i) for i in range(5)]
  assert [spread.image(i) for i in range(3)] == [first.image(i) for i in range(3)]


def test_too_many_rejected_stops_before_anything_is_written(raw, tmp_path):
  run(raw, tmp_path / "out")
  before = tree(tmp_path / "out")
  with (raw / "annotations/geo.jsonl").open("a") as file:
    file.write("\noops")
  with pytest.raises(TooManyRejectedError, match="5 of 10 records are rejected, more than .* 0.4:"):
    run(raw, tmp_path / "out", max_rejected_fraction=0.4)
  assert tree(tmp_path / "out") == before
  assert len((tmp_path / "out.rejections.jsonl").read_text().splitlines()) == 5


def test_a_run_that_fails_leaves_the_old_corpus(raw, tmp_path, monkeypatch):
  run(raw, tmp_path / "out")
  before = tree(tmp_path / "out")
  path = raw / "annotations/geo.jsonl"
  path.write_bytes(path.read_bytes().replace(b"Step 1.", b"Step 7."))

  def fail(self):
    raise OSError("disk full")
    yield

  monkeypatch.setattr(shards.ImageShard, "__call__", fail)
  with pytest.raises(OSError, match="disk full"):
    run(raw, tmp_path / "out")
  with pytest.raises(OSError, match="disk full"):
    run(raw, tmp_path / "new")
  assert tree(tmp_path / "out") == before
  assert not [path.name for path in tmp_path.iterdir() if "part" in path.name or path.name == "new"]


def test_what_killed_runs_left_is_deleted_and_what_living_ones_write_is_not(raw, tmp_path):
  with subprocess.Popen([sys.executable, "-c", ""]) as ended:
    ended.wait()
  host, ours = socket.gethostname(), os.getppid()
  left = [f"out.{host}-{ended.pid}-{token}.part" for token in ("01", "ff")]
  kept = [
    f"out.{host}-{ours}-01.part",
    f"out.elsewhere-{ended.pid}-01.part",
    f"other.{host}-{ended.pid}-01.part",
    f"out.{host}-{ended.pid}-01.part.txt",
  ]
  for name in [*left, *kept]:
    (tmp_path / name / "rollouts").mkdir(parents=True)
  run(raw, tmp_path / "out")
  assert {path.name for path in tmp_path.iterdir()} == {"raw", "out", *kept}


def test_a_killed_preparation_leaves_nothing_once_it_is_run_again(raw, tmp_path):
  code = """
import os, signal, sys
from bis_jax.corpus import preparation, shards
shards.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
preparation.prepare(*sys.argv[1:], max_rejected_fraction=0.5, workers=1)
"""
  places = [str(raw / "annotations"), str(raw / "images"), str(tmp_path / "out")]
  killed = subprocess.run([sys.executable, "-c", code, *places], capture_output=True)
  assert killed.returncode == -signal.SIGKILL
  assert len([path for path in tmp_path.iterdir() if path.name.endswith(".part")]) == 1
  run(raw, tmp_path / "out")
  assert {path.name for path in tmp_path.iterdir()} == {"raw", "out"}


def test_folders_that_are_no_corpus(raw, tmp_path):
  with pytest.raises(CorpusError, match="holds no prepared corpus.*bis_jax.prepare"):
    Corpus.open(tmp_path / "nowhere")
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine/thesis.txt").write_text("...")
  with pytest.raises(CorpusError, match="is not a prepared corpus: name another"):
    run(raw, tmp_path / "mine")
  run(raw, tmp_path / "out")
  (tmp_path / "out/corpus.json").unlink()
  assert len(run(raw, tmp_path / "out")) == 5
  (tmp_path / "out/corpus.json").write_text('{"format": 0}')
  with pytest.raises(CorpusError, match="another version"):
    Corpus.open(tmp_path / "out")
  assert len(run(raw, tmp_path / "out")) == 5


def test_a_damaged_corpus_is_prepared_again(raw, tmp_path, caplog):
  """Mutation caught: a file is used without a look at its digest."""
  out = tmp_path / "out"
  run(raw, out)
  whole = tree(out)
  for name, data in whole.items():
    for damaged in (data[: len(data) // 2], bytes([*data[:-9], data[-9] ^ 1, *data[-8:]]), None):
      (out / name).unlink() if damaged is None else (out / name).write_bytes(damaged)
      if damaged == data:  # a file without bytes
        continue
      caplog.clear()
      with pytest.raises(CorpusError, match="is damaged|holds no prepared corpus"):
        Corpus.open(out)
      run(raw, out)
      assert tree(out) == whole and "preparing the corpus in" in caplog.text, name
  assert {path.name for path in tmp_path.iterdir()} == {"raw", "out"}


def test_a_damaged_record_of_a_large_corpus_is_found_when_it_is_read(raw, tmp_path, monkeypatch):
  corpus = run(raw, tmp_path / "out")
  monkeypatch.setattr("bis_jax.corpus.corpus._CHECKED_BYTES", 0)  # shards by size
  (shard,) = (tmp_path / "out").rglob("images-train*")
  data = bytearray(shard.read_bytes())
  data[data.index(b"IHDR")] ^= 1
  shard.write_bytes(data)
  damaged = Corpus.open(tmp_path / "out")
  with pytest.raises(CorpusError, match="images is damaged: run the same .* again"):
    [damaged.image(i) for i in range(3)]
  run(raw, tmp_path / "out")
  assert [corpus.image(i) for i in range(3)] == [
    Corpus.open(tmp_path / "out").image(i) for i in range(3)
  ]
  assert {path.name for path in tmp_path.iterdir()} == {"raw", "out"}


def test_nothing_left_is_an_error(raw, tmp_path):
  shutil.rmtree(raw / "images/geo")
  shutil.rmtree(raw / "images/nlvr2")
  with pytest.raises(CorpusError, match="none of 9 records can be used"):
    run(raw, tmp_path / "out", max_rejected_fraction=1.0)
  assert not (tmp_path / "out").exists()
