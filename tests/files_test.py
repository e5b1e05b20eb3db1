"""Folders are published whole, or not at all."""

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
