"""JAX's persistent cache of compiled programs, with a digest in every entry."""

import hashlib
import pathlib

import jax
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

from bis_jax import files
from bis_jax.console import log

_DIGEST_BYTES = 16


def use(folder: pathlib.Path) -> None:
  """Lets JAX keep compiled programs in `folder` and reuse those that are undamaged."""
  # JAX itself would run a program with a flipped byte, and never replaces a file that was cut.
  jax.config.update("jax_compilation_cache_dir", str(folder))
  compilation_cache.reset_cache()
  compilation_cache._cache, compilation_cache._cache_initialized = _CheckedCache(folder), True


class _CheckedCache(CacheInterface):
  def __init__(self, folder: pathlib.Path):
    self._path = folder

  # pyrefly: ignore[bad-override]  # JAX declares no result
  def get(self, key: str) -> bytes | None:
    path = self._path / key
    if not path.is_file():
      return None
    data = path.read_bytes()
    if data[:_DIGEST_BYTES] == _digest(data[_DIGEST_BYTES:]):
      return data[_DIGEST_BYTES:]
    log.warning("%s is damaged: compiling the program again", path)
    path.unlink(missing_ok=True)
    return None

  def put(self, key: str, value: bytes) -> None:
    with files.replacing(self._path / key) as file:
      file.write(_digest(value) + value)


def _digest(data: bytes) -> bytes:
  return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
