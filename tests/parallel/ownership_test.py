"""A folder that is in use has one owner, and one that ended in any way is replaced."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from bis_jax.errors import UserError
from bis_jax.parallel import ownership


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
  return request.getfixturevalue("bucket") if request.param == "bucket" else epath.Path(tmp_path)


@pytest.fixture
def often(monkeypatch):
  """Signs of life are given and missed a hundred times as fast."""
  monkeypatch.setattr(ownership, "_SILENCE", 0.6)
  monkeypatch.setattr(ownership, "_SIGN_OF_LIFE", 0.1)


def test_a_second_owner_is_told_of_the_first(place, often):
  file = place / "owner.json"
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


def test_one_waits_for_an_owner_to_end(place, often):
  file, events = place / "owner.json", []

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


def test_a_killed_owner_is_replaced_at_once(place, often):
  own = (
    "import sys, time; from bis_jax.parallel import ownership; ownership._SIGN_OF_LIFE = 0.1; "
    "o = ownership.owned(sys.argv[1], 'x')"
  )
  killed = subprocess.Popen(
    [
      sys.executable,
      "-c",
      f"{own}; o.__enter__(); print('owns', flush=True); time.sleep(60)",
      str(place / "o"),
    ],
    stdout=subprocess.PIPE,
  )
  killed.stdout.readline()
  with pytest.raises(ownership.OwnedError, match=f"process {killed.pid} "):
    ownership.owned(place / "o", "x").__enter__()
  killed.kill()
  killed.wait()
  with ownership.owned(place / "o", "x"):
    pass


@pytest.mark.parametrize("locks", [True, False])  # not every shared file system's do
def test_an_owner_of_another_host_is_replaced_when_it_is_silent(place, often, monkeypatch, locks):
  if not locks:
    monkeypatch.setattr(ownership, "_lock", lambda path, held: None)
  file = place / "owner.json"
  elsewhere = {"host": "far", "process": 7, "since": "noon", "boot": "far 1", "token": ""}
  file.write_text(json.dumps(elsewhere))
  alive = threading.Timer(0.2, file.write_text, [json.dumps(elsewhere)])
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


def test_of_many_that_start_at_once_one_owns_a_bucket(bucket, often):
  owners, told, start = [], [], threading.Barrier(8)

  def own():
    start.wait()
    try:
      with ownership.owned(bucket / "owner.json", "the run"):
        owners.append(threading.get_ident())
        ended.wait()
    except ownership.OwnedError as error:
      told.append(str(error))
    if len(told) == 7:
      ended.set()

  ended, threads = threading.Event(), [threading.Thread(target=own) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  assert (len(owners), len(told)) == (1, 7)


def test_an_owner_that_was_cut_off_stops(place, often, monkeypatch):
  """At once: on SIGTERM a run saves a checkpoint, over those of the new owner."""
  stopped, kills = threading.Event(), []
  monkeypatch.setattr(ownership.os, "kill", lambda *kill: (kills.append(kill), stopped.set()))
  file = place / "owner.json"
  with ownership.owned(file, "the run"):
    theirs = json.dumps({"host": "far", "process": 7, "since": "noon", "boot": "far", "token": ""})
    file.write_text(theirs)
    assert stopped.wait(5)
  assert file.read_text() == theirs
  assert kills[-1] == (os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("place", ["a file/owner.json", "/proc/owner.json"])
def test_a_place_that_cannot_be_owned_is_named(tmp_path, place):
  (tmp_path / "a file").write_text("")
  with pytest.raises(UserError, match=r"the run can't be written \(.*: .*\): name another place"):
    ownership.owned(tmp_path / place, "the run").__enter__()
