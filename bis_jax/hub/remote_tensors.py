"""Safetensors files in an object store: what is needed of a tensor is read by range."""

import functools
import json
import math
import os
from typing import Any, Self

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError

from bis_jax.storage import filesystem

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_PIECE = 16 << 20  # bytes of a request; several are under way at once
_MAX_HEADER = 100_000_000  # bytes, that of safetensors itself


class RemoteTensors:
  """What `safetensors.safe_open` returns, as far as it is used here."""

  def __init__(self, file: epath.Path):
    self._file = os.fspath(file)
    self._start, self._tensors = _header(self._file)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    pass

  def keys(self) -> list[str]:
    return [key for key in self._tensors if key != "__metadata__"]

  def get_slice(self, key: str) -> "RemoteTensor":
    return RemoteTensor(self._file, self._start, self._tensors[key])


class RemoteTensor:
  """A tensor of which slices are read."""

  def __init__(self, file: str, start: int, described: dict[str, Any]):
    self._file, self._dtype = file, described["dtype"]
    self._shape = tuple(described["shape"])
    self._start = start + described["data_offsets"][0]

  def get_shape(self) -> tuple[int, ...]:
    return self._shape

  def get_dtype(self) -> str:
    return self._dtype

  def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
    """Returns a slice; all columns of its rows are read, rows being the first axis that is not 1."""
    index = index if isinstance(index, tuple) else (index,)
    axis = next((i for i, size in enumerate(self._shape) if size > 1), 0)
    rows = slice(*(index[axis] if axis < len(index) else slice(None)).indices(self._shape[axis]))
    dtype = np.dtype(_DTYPES[self._dtype])
    row_bytes = math.prod(self._shape[axis + 1 :]) * dtype.itemsize
    data = _read(
      self._file, self._start + rows.start * row_bytes, (rows.stop - rows.start) * row_bytes
    )
    shape = (*self._shape[:axis], rows.stop - rows.start, *self._shape[axis + 1 :])
    rest = tuple(slice(None) if i == axis else part for i, part in enumerate(index))
    return np.frombuffer(data, dtype).reshape(shape)[rest]


def forget() -> None:
  """Forgets what was read of files; call it before reading, as they may have changed."""
  _header.cache_clear()
  _read.cache_clear()


@functools.lru_cache(maxsize=256)
def _header(file: str) -> tuple[int, dict[str, Any]]:
  """Returns the offset of the tensors' bytes and the description of each tensor."""
  store = filesystem(file)
  size = store.info(file)["size"]
  length = int.from_bytes(store.cat_file(file, start=0, end=8), "little")
  if size < 8 or not 0 < length <= min(_MAX_HEADER, size - 8):
    raise SafetensorError("the header is invalid")
  try:
    tensors = json.loads(store.cat_file(file, start=8, end=8 + length))
    end = max(t["data_offsets"][1] for key, t in tensors.items() if key != "__metadata__")
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise SafetensorError(f"the header is invalid: {error}") from error
  if end != size - 8 - length:
    raise SafetensorError(f"the file has {size:,} bytes, its header names {8 + length + end:,}")
  return 8 + length, tensors


@functools.lru_cache(maxsize=1)  # several devices of a host may hold columns of the same rows
def _read(file: str, start: int, size: int) -> bytes:
  starts = list(range(start, start + size, _PIECE))
  ends = [*starts[1:], start + size]
  pieces = filesystem(file).cat_ranges([file] * len(starts), starts, ends, on_error="raise")
  return b"".join(pieces)
