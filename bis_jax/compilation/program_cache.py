"""JAX's persistent cache of compiled programs, with a digest in every entry."""

import hashlib
import os

import jax
from etils import epath
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

from bis_jax import files
from bis_jax.console import log

_DIGEST_BYTES = 16


def use(folder: epath.PathLike) -> None:
  """Lets JAX keep compiled programs in `folder` and reuse those that are undamaged."""
  # JAX itself would run a program with a flipped byte, and never replaces a file that was cut.
  folder = epath.Path(folder)
  jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
  # XLA's own caches are local files without digests, and keys of programs would depend on their path.
  jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
  compilation_cache.reset_cache()
  compilation_cache._cache, compilation_cache._cache_initialized = _CheckedCache(folder), True


class _CheckedCache(CacheInterface):
  def __init__(self, folder: epath.Path):
    self._path = folder  # pyrefly: ignore[bad-assignment]  # JAX declares pathlib's

  # pyrefly: ignore[bad-override]  # JAX declares no result
  def get(self, key: str) -> bytes | None:
    path = self._path / key
    try:
      data = path.read_bytes()
    except FileNotFoundError:
      return None
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
