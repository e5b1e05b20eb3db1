"""Folders are published whole, or not at all."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from etils import epath

from bis_jax import files
from bis_jax.errors import UserError


def test_a_new_folder_appears_whole_also_over_an_empty_one(tmp_path):
  out = epath.Path(tmp_path / "out")
  out.mkdir()
  with files.new_folder(out) as part:
    (part / "a").write_text("x")
    assert not any(out.iterdir())
  assert (out / "a").read_text() == "x"
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_another_process_published_stays(tmp_path):
  out = epath.Path(tmp_path / "out")
  with files.new_folder(out) as part:
    (part / "a").write_text("mine")
    out.mkdir()
    (out / "a").write_text("theirs")
  assert (out / "a").read_text() == "theirs"


def test_a_failed_block_leaves_nothing(tmp_path):
  with pytest.raises(RuntimeError), files.new_folder(tmp_path / "out") as part:
    (part / "a").write_text("x")
    raise RuntimeError
  assert not any(tmp_path.iterdir())


def test_a_second_owner_is_told_of_the_first(tmp_path):
  file = tmp_path / "owner.json"
  with files.owned(file, "the run"):
    with pytest.raises(files.OwnedError, match=rf"process {os.getpid()} on .*, since 2") as told:
      with files.owned(file, "the run"):
        raise AssertionError("not reached")
    assert str(told.value).startswith("the run is in use by")
  assert not file.exists()
  with files.owned(file, "the run"):
    pass


def test_one_waits_for_an_owner_to_end(tmp_path):
  file, events = tmp_path / "owner.json", []

  def second():
    with files.owned(file, "the corpus", wait=True):
      events.append("second")

  thread = threading.Thread(target=second)
  with files.owned(file, "the corpus"):
    thread.start()
    time.sleep(0.3)
    events.append("first")
  thread.join()
  assert events == ["first", "second"]


def test_a_killed_owner_is_replaced_at_once(tmp_path):
  own = "import sys, time; from bis_jax import files; o = files.owned(sys.argv[1], 'x')"
  killed = subprocess.Popen(
    [
      sys.executable,
      "-c",
      f"{own}; o.__enter__(); print('owns', flush=True); time.sleep(60)",
      tmp_path / "o",
    ],
    stdout=subprocess.PIPE,
  )
  killed.stdout.readline()
  with pytest.raises(files.OwnedError, match=f"process {killed.pid} "):
    files.owned(tmp_path / "o", "x").__enter__()
  killed.kill()
  killed.wait()
  with files.owned(tmp_path / "o", "x"):
    pass


@pytest.mark.parametrize("locks", [True, False])  # object stores have none
def test_an_owner_of_another_host_is_replaced_when_it_is_silent(tmp_path, monkeypatch, locks):
  monkeypatch.setattr(files, "_SILENCE", 0.6)
  monkeypatch.setattr(files, "_SIGN_OF_LIFE", 0.1)
  if not locks:
    monkeypatch.setattr(files, "_lock", lambda path, held: None)
  file = epath.Path(tmp_path / "owner.json")
  elsewhere = {"host": "far", "process": 7, "since": "noon", "boot": "far 1", "token": ""}
  file.write_text(json.dumps(elsewhere))
  alive = threading.Timer(0.2, os.utime, [file])
  alive.start()
  with pytest.raises(files.OwnedError, match="process 7 on far, since noon"):
    files.owned(file, "x").__enter__()
  with files.owned(file, "x"):  # it gives no sign any more
    assert json.loads(file.read_text())["process"] == os.getpid()
    time.sleep(0.3)
    with monkeypatch.context() as patch, pytest.raises(files.OwnedError, match=f"{os.getpid()}"):
      patch.setattr(files, "_boot", lambda: "far 2")
      files.owned(file, "x").__enter__()


@pytest.mark.parametrize("place", ["a file/owner.json", "/proc/owner.json"])
def test_a_place_that_cannot_be_owned_is_named(tmp_path, place):
  (tmp_path / "a file").write_text("")
  with pytest.raises(UserError, match=r"the run can't be written \(.*: .*\): name another place"):
    files.owned(tmp_path / place, "the run").__enter__()


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_published_folders_follow_the_umask(tmp_path, umask):
  """Also files of libraries that write to temporary files, which only their owner may read."""
  before = os.umask(umask)
  try:
    with files.new_folder(tmp_path / "out") as part:
      (part / "in").mkdir()
      file, name = tempfile.mkstemp(dir=part / "in")
      os.close(file)
      (part / "plain").write_text("")
  finally:
    os.umask(before)
  for path in (tmp_path / "out" / "plain", tmp_path / "out/in" / os.path.basename(name)):
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
