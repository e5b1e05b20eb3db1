"""Compiled programs on disk or in a bucket: used if they are whole, compiled again if they are damaged."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from bis_jax.compilation import program_cache

pytestmark = pytest.mark.usefixtures("own_programs")


@contextlib.contextmanager
def settings_restored():
  before = {name: getattr(jax.config, name) for name in SETTINGS}
  for name, value in SETTINGS.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(params=["disk", "bucket"])
def folder(tmp_path, request):
  with settings_restored():
    place = request.getfixturevalue("bucket") if request.param == "bucket" else tmp_path
    yield epath.Path(place) / "programs"


SETTINGS = {
  "jax_compilation_cache_dir": None,
  "jax_persistent_cache_min_compile_time_secs": 0,
  "jax_raise_persistent_cache_errors": True,
  "jax_persistent_cache_enable_xla_caches": "xla_gpu_per_fusion_autotune_cache_dir",
}


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_a_damaged_program_is_compiled_again(folder, caplog, damage):
  """Mutation caught: JAX's own cache, which runs a program with a flipped byte."""

  def run():
    program_cache.use(folder)  # forgets the programs in memory that it wrote
    jax.clear_caches()
    return jax.jit(lambda x: x * 3 + 1)(jnp.arange(4)).tolist()

  assert run() == [1, 4, 7, 10]
  (entry,) = [path for path in folder.iterdir() if "lambda" in path.name]
  whole = entry.read_bytes()
  assert run() == [1, 4, 7, 10] and entry.read_bytes() == whole and "damaged" not in caplog.text
  flipped = bytes([*whole[:-5], whole[-5] ^ 1, *whole[-4:]])
  entry.write_bytes({"flipped": flipped, "cut": whole[:100], "emptied": b""}[damage])
  assert run() == [1, 4, 7, 10]
  assert f"{entry} is damaged: compiling the program again" in caplog.text
  caplog.clear()
  assert run() == [1, 4, 7, 10] and "damaged" not in caplog.text


def test_a_program_has_one_name_wherever_the_cache_is(tmp_path, bucket):
  """Mutation caught: XLA's own caches, whose path is part of the name."""
  names = []
  with settings_restored():
    for place in (tmp_path / "here", bucket / "programs", tmp_path / "moved"):
      program_cache.use(epath.Path(place))
      jax.clear_caches()
      jax.jit(lambda x: x * 5 + 2)(jnp.arange(4))
      names.append({path.name for path in epath.Path(place).iterdir()})
  assert names[0] and names[0] == names[1] == names[2]
