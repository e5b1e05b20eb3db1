"""Qwen2.5-VL's resize rule, and patches in the order in which its vision tower reads them.

Layout. A patch is 14 x 14 pixels; 2 x 2 patches make a merge unit, which becomes one image token;
4 x 4 units (112 x 112 pixels, 64 patches) make an attention window, smaller at the right and lower
edges. The tower sees patches in blocks of 64 slots. A window never straddles two blocks, small
windows share one, and unused slots are zero:

    6 x 6 units, windows of 16, 8, 8 and 4 units:
    block 0  [window 1: 16 units]                         image tokens  0..3, 6..9, 12..15, 18..21
    block 1  [window 2: 8 units][window 3: 8 units]       image tokens  4, 5, 10, 11, ... 24..27 ...
    block 2  [window 4: 4 units][12 units empty]          image tokens  28, 29, 34, 35

Sources: Transformers `models/qwen2_vl/image_processing_pil_qwen2_vl.py` (resize, values, patches)
and `vision_utils.get_vision_window_index` (windows), `Qwen2_5_VLModel.get_rope_index` (positions).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
  Qwen2VLImageProcessorPil,
  smart_resize,
)

from bis_jax.inputs.images import Batch, patchify

PATCH = 14  # pixels along a side
MERGE = 2  # patches along a side of a merge unit
UNIT = PATCH * MERGE  # pixels along a side of a merge unit: one image token
UNIT_PATCHES = MERGE * MERGE
WINDOW = 4  # merge units along a side of an attention window
BLOCK = WINDOW * WINDOW * UNIT_PATCHES  # patch slots of a block: 64
PATCH_VALUES = 3 * 2 * PATCH * PATCH  # channels x frames x pixels: 1176; a still image fills both

MAX_ASPECT = 200  # Transformers refuses longer images; here they are squeezed to this


@dataclass(frozen=True)
class Patches:
  """One image as the vision tower reads it. S slots, a multiple of 64; U = image tokens."""

  pixels: np.ndarray  # uint8[U, 4, 3, 196], the patches of each merge unit, units in reading order
  window: np.ndarray  # int32[S], 1.. the window of the slot, 0 at empty slots
  position: np.ndarray  # int32[S, 2], (row, column) of the patch in the image, 0 at empty slots
  unit_slot: np.ndarray  # int32[U], the merge unit (slot // 4) of each image token in reading order
  grid: tuple[int, int]  # (rows, columns) of merge units; U is their product

  @property
  def blocks(self) -> int:
    return len(self.window) // BLOCK

  @property
  def image_tokens(self) -> int:
    return len(self.unit_slot)

  def add_to(self, row: Batch, slot: int, number: int) -> tuple[int, np.ndarray]:
    here, filled = slice(slot, slot + len(self.window)), self.window > 0
    self.write_values(row["patches"][here])
    row["patch_segment"][here] = filled * number
    windows = row["patch_window"][:slot].max(initial=0)  # windows are numbered through the row
    row["patch_window"][here] = filled * (self.window + windows)
    row["patch_position"][here] = self.position
    return here.stop, slot // UNIT_PATCHES + self.unit_slot

  def write_values(self, out: np.ndarray) -> None:
    """Writes normalized values into contiguous float32[S, 1176]; empty slots stay as they are."""
    values = out.reshape(-1, UNIT_PATCHES, 3, 2, PATCH * PATCH)
    for channel, table in enumerate(_value_tables()):
      values[self.unit_slot, :, channel] = table.take(self.pixels[:, :, channel, None])


@dataclass(frozen=True)
class UnitImages:
  """Images of merge units of `unit` pixels; the limits are of height x width after the resize."""

  unit: ClassVar[int]
  min_pixels: int
  max_pixels: int

  def grid(self, height: int, width: int) -> tuple[int, int]:
    # Past the longest aspect ratio that Transformers accepts, the image is squeezed to it.
    height, width = min(height, MAX_ASPECT * width), min(width, MAX_ASPECT * height)
    resized = smart_resize(height, width, self.unit, self.min_pixels, self.max_pixels)
    return resized[0] // self.unit, resized[1] // self.unit

  def units(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns the pixels of an image's merge units as `patchify` does, and its grid."""
    rows, columns = self.grid(image.height, image.width)
    size = (columns * self.unit, rows * self.unit)
    if image.size != size:
      image = image.resize(size, Image.Resampling.BICUBIC)
    return patchify(image, rows, columns, MERGE), (rows, columns)

  def positions(self, length: int, spans: np.ndarray, images: Sequence[Any]) -> np.ndarray:
    return mrope(length, spans, [image.grid for image in images])


class QwenImages(UnitImages):
  """See `inputs.images.ImageProcessor`."""

  unit = UNIT

  @property
  def slot_multiple(self) -> int:
    return BLOCK

  def cost(self, height: int, width: int) -> tuple[int, int]:
    rows, columns = self.grid(height, width)
    return rows * columns, _layout(rows, columns).blocks * BLOCK

  def patches(self, image: Image.Image) -> Patches:
    pixels, grid = self.units(image)
    return replace(_layout(*grid), pixels=pixels)

  def empty(self, rows: int, row_tokens: int, row_patches: int) -> Batch:
    return {
      "positions": np.zeros((rows, 3, row_tokens), np.int32),  # mRoPE: time, height, width
      "patches": np.zeros((rows, row_patches, PATCH_VALUES), np.float32),
      # 1.. the window in the row, inside one block of 64; 0 empty slot
      "patch_window": np.zeros((rows, row_patches), np.int32),
      # (row, column) of the patch in its image
      "patch_position": np.zeros((rows, row_patches, 2), np.int32),
    }


def mrope(length: int, image_spans: np.ndarray, grids: Sequence[tuple[int, int]]) -> np.ndarray:
  """Returns int32[3, length]: the mRoPE (time, height, width) position of each token of one sample.

  Text has the same number in all three. An image of 2 x 3 tokens that starts at position 5 has

      time    5 5 5 5 5 5
      height  5 5 5 6 6 6
      width   5 6 7 5 6 7

  and the text after it continues at 5 + max(2, 3) = 8.
  """
  positions = np.empty((3, length), np.int32)
  token = position = 0
  for (start, count), (rows, columns) in zip(image_spans, grids, strict=True):
    positions[:, token:start] = np.arange(position, position + start - token)
    position += start - token
    token = start + count
    positions[0, start:token] = position
    positions[1, start:token] = position + np.arange(rows).repeat(columns)
    positions[2, start:token].reshape(rows, columns)[:] = position + np.arange(columns)
    position += max(rows, columns)
  positions[:, token:] = np.arange(position, position + length - token)
  return positions


@functools.cache
def _value_tables() -> np.ndarray:
  """Returns float32[3, 256]: the normalized value of every 8-bit value, one row per channel."""
  processor = Qwen2VLImageProcessorPil()
  levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
  values = processor.normalize(
    processor.rescale(levels, processor.rescale_factor), processor.image_mean, processor.image_std
  )
  return values.reshape(3, 256)


@functools.lru_cache(maxsize=4096)
def _layout(rows: int, columns: int) -> Patches:
  # Without pixels; its arrays are read-only because they are cached. Windows, larger first, each
  # into the first block with room.
  units = np.arange(rows * columns).reshape(rows, columns)
  windows = [
    units[top : top + WINDOW, left : left + WINDOW].reshape(-1)
    for top in range(0, rows, WINDOW)
    for left in range(0, columns, WINDOW)
  ]
  capacity = BLOCK // UNIT_PATCHES
  used: list[int] = []  # units in each block
  unit_slot = np.zeros(rows * columns, np.int32)
  unit_window = np.zeros(rows * columns, np.int32)
  for number, members in enumerate(sorted(windows, key=len, reverse=True), start=1):
    rooms = (b for b, units_in in enumerate(used) if units_in + len(members) <= capacity)
    block = next(rooms, len(used))
    if block == len(used):
      used.append(0)
    unit_slot[members] = block * capacity + used[block] + np.arange(len(members))
    unit_window[members] = number
    used[block] += len(members)

  window = np.zeros((len(used) * capacity, UNIT_PATCHES), np.int32)
  window[unit_slot] = unit_window[:, None]
  position = np.zeros((*window.shape, 2), np.int32)
  corners = MERGE * np.stack(np.divmod(units.reshape(-1), columns), axis=1)
  position[unit_slot] = corners[:, None] + [(0, 0), (0, 1), (1, 0), (1, 1)]
  window, position = window.reshape(-1), position.reshape(-1, 2)
  for array in (window, position, unit_slot):
    array.flags.writeable = False
  return Patches(np.zeros(0, np.uint8), window, position, unit_slot, (rows, columns))
