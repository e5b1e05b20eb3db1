"""Folders that several runs share: made once, checked before use, made again if damaged."""

import concurrent.futures
import threading

import pytest

from bis_jax import files
from bis_jax.corpus import shared
from bis_jax.errors import UserError

CONTENTS = {"a", "b", shared.RECORD}


def make(part):
  (part / "a").write_bytes(b"one")
  (part / "b").mkdir()
  (part / "b/c").write_bytes(b"two")


def made(out, make=make, seed=0):
  shared.made(out, "the thing", {"seed": seed}, make, CONTENTS)
  return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_any_damage_is_named_and_made_good(tmp_path, caplog):
  """Mutation caught: a file is used without a look at its digest."""
  out = tmp_path / "out"
  whole = made(out)
  for name, data in whole.items():
    for at in range(0, len(data), 7):
      damaged = [data[:at], bytes([*data[:at], data[at] ^ 2, *data[at + 1 :]])]
      for change in [*damaged, None] if at == 0 else damaged:
        (out / name).unlink() if change is None else (out / name).write_bytes(change)
        caplog.clear()
        now = made(out)
        # White space of the record may differ.
        assert (
          now == whole
          and f"{name} is damaged: making the thing again" in caplog.text
          or (name == shared.RECORD and {**now, name: data} == whole)
        )


def test_another_folder_is_left_alone(tmp_path):
  before = made(tmp_path / "out")
  with pytest.raises(UserError, match="out holds the thing of .*0.*, not of .*1.*: delete it"):
    made(tmp_path / "out", seed=1)
  assert made(tmp_path / "out") == before
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine/thesis").write_text("...")
  for name in ("mine", "mine/thesis"):
    with pytest.raises(UserError, match="holds something else than the thing"):
      made(tmp_path / name)
  assert (tmp_path / "mine/thesis").exists()


def test_one_process_makes_it_and_the_others_wait(tmp_path, caplog):
  """Mutation caught: no owner, so that each process makes it."""
  caplog.set_level("INFO", "bis_jax")
  begun, ready, calls = threading.Event(), threading.Event(), []

  def slow(part):
    calls.append(part)
    begun.set()
    ready.wait(10)
    make(part)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    starts = [pool.submit(made, tmp_path / "out", slow)]
    begun.wait(10)
    starts.append(pool.submit(made, tmp_path / "out", slow))
    while "waiting" not in caplog.text:
      pass
    ready.set()
    assert starts[0].result() == starts[1].result()
  assert len(calls) == 1 and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
  def fail(part):
    make(part)
    raise RuntimeError("write() failed: No space left on device; writing a")

  with pytest.raises(
    UserError, match="no space left to write .*out: .* bytes are free there; make"
  ):
    made(tmp_path / "out", fail)
  with pytest.raises(UserError, match="no space left to write .*: .*, 9,999,999,999,999,999 bytes"):
    files.require_room(tmp_path / "a/b", 9_999_999_999_999_999)
  assert not list(tmp_path.iterdir())
