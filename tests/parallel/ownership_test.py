"""A folder that is in use has one owner, and one that ended in any way is replaced."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from bis_jax.errors import UserError
from bis_jax.parallel import ownership


def test_a_second_owner_is_told_of_the_first(tmp_path):
  file = tmp_path / "owner.json"
  with ownership.owned(file, "the run"):
    with pytest.raises(
      ownership.OwnedError, match=rf"process {os.getpid()} on .*, since 2"
    ) as told:
      with ownership.owned(file, "the run"):
        raise AssertionError("not reached")
    assert str(told.value).startswith("the run is in use by")
  assert not file.exists()
  with ownership.owned(file, "the run"):
    pass


def test_one_waits_for_an_owner_to_end(tmp_path):
  file, events = tmp_path / "owner.json", []

  def second():
    with ownership.owned(file, "the corpus", wait=True):
      events.append("second")

  thread = threading.Thread(target=second)
  with ownership.owned(file, "the corpus"):
    thread.start()
    time.sleep(0.3)
    events.append("first")
  thread.join()
  assert events == ["first", "second"]


def test_a_killed_owner_is_replaced_at_once(tmp_path):
  own = "import sys, time; from bis_jax.parallel import ownership; o = ownership.owned(sys.argv[1], 'x')"
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
  with pytest.raises(ownership.OwnedError, match=f"process {killed.pid} "):
    ownership.owned(tmp_path / "o", "x").__enter__()
  killed.kill()
  killed.wait()
  with ownership.owned(tmp_path / "o", "x"):
    pass


@pytest.mark.parametrize("locks", [True, False])  # object stores have none
def test_an_owner_of_another_host_is_replaced_when_it_is_silent(tmp_path, monkeypatch, locks):
  monkeypatch.setattr(ownership, "_SILENCE", 0.6)
  monkeypatch.setattr(ownership, "_SIGN_OF_LIFE", 0.1)
  if not locks:
    monkeypatch.setattr(ownership, "_lock", lambda path, held: None)
  file = epath.Path(tmp_path / "owner.json")
  elsewhere = {"host": "far", "process": 7, "since": "noon", "boot": "far 1", "token": ""}
  file.write_text(json.dumps(elsewhere))
  alive = threading.Timer(0.2, os.utime, [file])
  alive.start()
  with pytest.raises(ownership.OwnedError, match="process 7 on far, since noon"):
    ownership.owned(file, "x").__enter__()
  with ownership.owned(file, "x"):  # it gives no sign any more
    assert json.loads(file.read_text())["process"] == os.getpid()
    time.sleep(0.3)
    with (
      monkeypatch.context() as patch,
      pytest.raises(ownership.OwnedError, match=f"{os.getpid()}"),
    ):
      patch.setattr(ownership, "_boot", lambda: "far 2")
      ownership.owned(file, "x").__enter__()


@pytest.mark.parametrize("place", ["a file/owner.json", "/proc/owner.json"])
def test_a_place_that_cannot_be_owned_is_named(tmp_path, place):
  (tmp_path / "a file").write_text("")
  with pytest.raises(UserError, match=r"the run can't be written \(.*: .*\): name another place"):
    ownership.owned(tmp_path / place, "the run").__enter__()
