"""gs:// through gcsfs, with errors that name bucket and remedy and writes that name a generation."""

import logging
import re
from typing import Any

import aiohttp
import gcsfs.core
import google.auth.exceptions
from fsspec import asyn
from gcsfs.retry import HttpError

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises, with a traceback

_UNREACHABLE = (HttpError, aiohttp.ClientError, google.auth.exceptions.GoogleAuthError, OSError)


class FileSystem(gcsfs.core.GCSFileSystem):
  """All file systems of gs:// in this process are of this class; its failures are OSErrors."""

  async def _request(self, method: str, path: str, *args: Any, **options: Any) -> Any:
    try:
      return await super()._request(method, path, *args, **options)
    except FileNotFoundError as error:
      if "/upload/" not in path:
        raise
      bucket = _bucket(path)
      raise FileNotFoundError(f"there is no bucket {bucket}: correct its name") from error
    except FileExistsError:
      raise
    except _UNREACHABLE as error:
      bucket = _bucket(self._format_path(path, args))
      if str(error).startswith("Forbidden") or getattr(error, "code", 0) == 401:
        raise PermissionError(
          f"Forbidden: this account may not use {bucket}: give it the role Storage Object User, or "
          "log in with `gcloud auth application-default login`"
        ) from error
      reason = str(error).partition("\n")[0] or type(error).__name__
      raise ConnectionError(
        f"{bucket} can't be reached ({reason}): run the same command again when it can"
      ) from error

  # fsspec takes any failure of a request for "it is not there", and Orbax that for a damaged step.
  # pyrefly: ignore[bad-override]  # gcsfs's is read as one that returns False only
  async def _isfile(self, path: str) -> bool:
    return await self._kind(path) == "file"

  async def _isdir(self, path: str) -> bool:
    return await self._kind(path) == "directory"

  async def _kind(self, path: str) -> str:
    try:
      return (await self._info(path))["type"]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
      return ""

  async def _swap(self, path: str, data: bytes, generation: int) -> int:
    bucket, key, _ = self.split_path(path)
    written: Any = await self._call(
      "POST",
      f"{self._location}/upload/storage/v1/b/{bucket}/o",
      uploadType="media",
      name=key,
      ifGenerationMatch=str(generation),
      data=data,
      json_out=True,
    )
    return int(written["generation"])

  # Replaces a generation, 0 for none, and returns the new one; FileExistsError if another one is there.
  swap = asyn.sync_wrapper(_swap)


def _bucket(url: str) -> str:
  found = re.search(r"/b/([^/?]+)", url)
  return f"gs://{found[1]}" if found else "gs://"
