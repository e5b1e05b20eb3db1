"""Reads tensors of safetensors files slice by slice into the shards of parameters."""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (teaches NumPy, and with it safetensors, bfloat16)
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open

from bis_jax.hub.remote_tensors import RemoteTensors
from bis_jax.models.hub_layout import HubTensor, RowRanges
from bis_jax.storage import is_url

_TILE = 256
_REQUESTS = 16  # layers that are read at the same time from a bucket

Block = tuple[slice, ...]  # of a parameter, one slice per axis


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor as described in the header of its file; `dtype` in safetensors' spelling."""

  file: epath.Path
  key: str
  shape: tuple[int, ...]
  dtype: str


def open_tensors(file: epath.Path) -> Any:
  """Opens a safetensors file; raises SafetensorError if it is damaged."""
  return RemoteTensors(file) if is_url(file) else safe_open(file, framework="numpy")


def by_rows(tensor: HubTensor, struct: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
  """Returns a sharding in which every device holds whole rows of the files, if they divide.

  In it every process reads its share of a remote file once; columns of rows are not read alone.
  """
  axis = len(struct.shape) - 1 if tensor.transposed else int(tensor.stacked)
  sharding = struct.sharding
  if not isinstance(sharding, NamedSharding) or axis >= len(struct.shape):
    return sharding
  if struct.shape[axis] % sharding.mesh.size:
    return sharding
  return NamedSharding(sharding.mesh, PartitionSpec(*[None] * axis, sharding.mesh.axis_names))


def read_parameter(
  tensor: HubTensor, stored: Sequence[StoredTensor], out: np.ndarray, block: Block
) -> None:
  """Fills `out` with a block of a parameter; rows that the file lacks are left as they are."""
  if not tensor.stacked:
    _read_layer(tensor, stored[0], out, block=block)
    return
  layers = stored[block[0]]
  read = functools.partial(_read_layer, tensor, block=block[1:])
  # Requests wait for a bucket most of the time; a local file is read one layer after the other.
  with concurrent.futures.ThreadPoolExecutor(_REQUESTS if is_url(layers[0].file) else 1) as threads:
    for _ in threads.map(read, layers, out):
      pass


def _read_layer(tensor: HubTensor, stored: StoredTensor, out: np.ndarray, *, block: Block) -> None:
  # Opened for this read alone: pages of a mapped file count as resident memory until it is closed.
  with open_tensors(stored.file) as opened:
    view = opened.get_slice(stored.key)
    if not tensor.transposed:
      lead = (slice(0, 1),) * (len(stored.shape) - len(block))
      for rows, place in _row_slices(tensor.row_ranges, block[0]):
        rows = slice(rows.start, min(rows.stop, stored.shape[len(lead)]))
        if rows.start < rows.stop:
          value = view[(*lead, rows, *block[1:])]
          out[place][: rows.stop - rows.start] = value.reshape(value.shape[len(lead) :])
      return
    for rows, place in _row_slices(tensor.row_ranges, block[1]):
      if len(stored.shape) == 2:
        value = view[rows, block[0]]
      else:  # the convolution over patches
        value = view[rows]
        value = value.reshape(len(value), -1)[:, block[0]]
      _copy_transposed(out[:, place], value)


def _row_slices(row_ranges: RowRanges | None, wanted: slice) -> Iterator[tuple[slice, slice]]:
  """Yields (rows of the file, rows of the block) for a slice of the parameter's axis."""
  if row_ranges is None:
    yield wanted, slice(0, wanted.stop - wanted.start)
    return
  offset = 0  # of a range on the parameter's axis
  for start, stop in row_ranges:
    low, high = max(wanted.start, offset), min(wanted.stop, offset + stop - start)
    if low < high:
      rows = slice(start + low - offset, start + high - offset)
      yield rows, slice(low - wanted.start, high - wanted.start)
    offset += stop - start


def _copy_transposed(out: np.ndarray, source: np.ndarray) -> None:
  # Tiles that fit the CPU cache are two to five times as fast as out[:] = source.T.
  for i in range(0, out.shape[0], _TILE):
    for j in range(0, out.shape[1], _TILE):
      out[i : i + _TILE, j : j + _TILE] = source[j : j + _TILE, i : i + _TILE].T


def assemble(struct: jax.ShapeDtypeStruct, read: Callable[[np.ndarray, Block], None]) -> jax.Array:
  """Returns the array whose local shards `read` fills, one at a time; equal shards are read once."""
  assert struct.sharding is not None
  places = struct.sharding.addressable_devices_indices_map(struct.shape)
  holders: dict[tuple, list[jax.Device]] = collections.defaultdict(list)
  for device, block in places.items():
    bounds = (s.indices(n)[:2] for s, n in zip(block or (), struct.shape, strict=True))
    holders[tuple(bounds)].append(device)
  shards = {}
  for bounds, devices in holders.items():
    out = np.zeros([stop - start for start, stop in bounds], struct.dtype)
    read(out, tuple(slice(*b) for b in bounds))
    for device in devices:
      # Waits: copies are made in the background, and blocks of many would wait with them.
      shards[device] = jax.block_until_ready(jax.device_put(out, device))
  return jax.make_array_from_single_device_arrays(
    struct.shape, struct.sharding, [shards[device] for device in places]
  )
