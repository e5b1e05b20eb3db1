"""Folders are published whole, or not at all."""

import os
import tempfile

import pytest
from etils import epath

from bis_jax import files


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
