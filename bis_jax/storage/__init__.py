"""Object stores: which URLs may be paths, and what is needed to open them."""

import functools
import os
import pathlib
import re
from typing import Any

from etils import epath
from etils.epath import backend

from bis_jax.errors import UserError

SCHEMES = ("gs", "s3", "az", "hf")  # that etils.epath opens
_TENSORSTORE_FAILURE = re.compile(
  r"(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|ABORTED"
  r"|CURL error)[^\n[]{0,200}"
)

# The same code opens gs:// whether TensorFlow is installed or not, and works in forked processes.
os.environ.setdefault("EPATH_USE_TF", "false")
os.register_at_fork(after_in_child=backend.fsspec_backend._get_filesystem.cache_clear)


@functools.cache
def _fsspec() -> Any:
  """Returns fsspec with the file systems of this package."""
  import fsspec  # with the first URL: that takes a tenth of a selection from a score table

  for name in ("gs", "gcs"):
    fsspec.register_implementation(
      name, "bis_jax.storage.gcs.FileSystem", clobber=True, errtxt="pip install 'bis_jax[gcs]'"
    )
  for name in (*SCHEMES, "gcs"):  # other processes write there too
    fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
  return fsspec


def is_url(path: epath.PathLike) -> bool:
  """Returns whether a path is in an object store; raises UserError for what can't be opened."""
  scheme, colon, _ = os.fspath(path).partition("://")
  if not colon:
    return False
  if scheme not in SCHEMES:
    known = ", ".join(f"{name}://" for name in SCHEMES)
    raise UserError(f"{path} can't be opened: a path is local or starts with one of {known}")
  try:
    _fsspec().get_filesystem_class(scheme)
  except ImportError as error:
    raise UserError(f"a package to open {path} is missing: {error}") from error
  return True


def filesystem(path: epath.PathLike) -> Any:
  """Returns the fsspec file system of a URL, safe after a fork."""
  _fsspec()
  return type(backend.fsspec_backend).fs(backend.fsspec_backend, path)


backend.fsspec_backend.fs = filesystem  # for every library that opens URLs by epath


def failure(error: BaseException | None) -> OSError | None:
  """Returns the failure of a bucket that is behind any library's error, None if none is."""
  while error is not None:
    if isinstance(error, ConnectionError | PermissionError | TimeoutError):
      return error
    if found := _TENSORSTORE_FAILURE.search(str(error)):
      bucket = re.search(r"gs://[^/\s]+", str(error))
      return ConnectionError(
        f"{bucket[0] if bucket else 'a bucket'} can't be reached ({found[0].strip()}): run the same "
        "command again when it can"
      )
    error = error.__cause__ or error.__context__
  return None


def require_bucket(path: epath.PathLike) -> None:
  """Raises UserError if there is no bucket for a URL; OSError if it may not be used."""
  bucket = "/".join(os.fspath(path).split("/")[:3])
  if not filesystem(bucket).exists(bucket):
    raise UserError(f"there is no bucket {bucket} for {path}: correct its name, or make it")


def listing(url: epath.PathLike) -> dict[str, dict[str, Any]]:
  """Returns what an object store knows of every file in a folder, by name: "size" and more."""
  place = os.fspath(url)
  skipped = len(place.partition("://")[2]) + 1
  found = filesystem(url).find(place, detail=True)
  return {path[skipped:]: about for path, about in sorted(found.items())}


def upload(local: pathlib.Path, url: epath.Path) -> None:
  """Uploads a file; it appears whole, in one step, and replaces another one."""
  filesystem(url).put_file(os.fspath(local), os.fspath(url))
