"""Qwen3-VL's resize rule, and patches in the order in which its vision tower reads them.

A patch is 16 x 16 pixels; 2 x 2 patches make a merge unit, which becomes one image token. The units
of an image are in reading order, without empty slots between them. Text and image tokens have the
positions of Qwen2.5-VL.

Sources: Transformers `models/qwen2_vl/image_processing_pil_qwen2_vl.py`, with the sizes and the
normalization in `preprocessor_config.json` of the release, and `Qwen3VLModel.get_rope_index`.
"""

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bis_jax.inputs.images import Batch
from bis_jax.models.qwen2_5_vl.images import MERGE, UNIT_PATCHES, UnitImages

PATCH = 16  # pixels along a side
UNIT = PATCH * MERGE  # pixels along a side of a merge unit: one image token
PATCH_VALUES = 3 * 2 * PATCH * PATCH  # channels x frames x pixels: 1536; a still image fills both
MEAN = STD = [0.5, 0.5, 0.5]


@dataclass(frozen=True)
class Patches:
  """One image as the vision tower reads it: U merge units, one image token each."""

  pixels: np.ndarray  # uint8[U, 4, 3, 256], the patches of each merge unit, units in reading order
  grid: tuple[int, int]  # (rows, columns) of merge units; U is their product

  @property
  def image_tokens(self) -> int:
    return len(self.pixels)

  def add_to(self, row: Batch, slot: int, number: int) -> tuple[int, np.ndarray]:
    here = slice(slot, slot + UNIT_PATCHES * self.image_tokens)
    self.write_values(row["patches"][here])
    row["patch_segment"][here] = number
    row["patch_position"][here] = _patch_positions(*self.grid)
    row["patch_grid"][here] = [MERGE * size for size in self.grid]
    return here.stop, slot // UNIT_PATCHES + np.arange(self.image_tokens)

  def write_values(self, out: np.ndarray) -> None:
    """Writes normalized values into contiguous float32[4 * U, 1536]."""
    values = out.reshape(-1, UNIT_PATCHES, 3, 2, PATCH * PATCH)
    values[:] = _value_table().take(self.pixels[:, :, :, None])


class Qwen3Images(UnitImages):
  """See `inputs.images.ImageProcessor`."""

  unit = UNIT

  @property
  def slot_multiple(self) -> int:
    return UNIT_PATCHES

  def cost(self, height: int, width: int) -> tuple[int, int]:
    rows, columns = self.grid(height, width)
    return rows * columns, rows * columns * UNIT_PATCHES

  def patches(self, image: Image.Image) -> Patches:
    return Patches(*self.units(image))

  def empty(self, rows: int, row_tokens: int, row_patches: int) -> Batch:
    return {
      "positions": np.zeros((rows, 3, row_tokens), np.int32),  # mRoPE: time, height, width
      "patches": np.zeros((rows, row_patches, PATCH_VALUES), np.float32),
      # (row, column) of the patch in its image, and (rows, columns) of that
      "patch_position": np.zeros((rows, row_patches, 2), np.int32),
      "patch_grid": np.zeros((rows, row_patches, 2), np.int32),
    }


@functools.lru_cache(maxsize=4096)
def _patch_positions(rows: int, columns: int) -> np.ndarray:
  """Returns int32[4 * U, 2], (row, column) of every patch by merge units."""
  unit = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1)
  corners = np.array([(0, 0), (0, 1), (1, 0), (1, 1)])
  return (MERGE * unit[:, None] + corners).reshape(-1, 2).astype(np.int32)


@functools.cache
def _value_table() -> np.ndarray:
  """Returns float32[256]: the normalized value of every 8-bit value, the same in all channels."""
  processor = Qwen2VLImageProcessorPil(image_mean=MEAN, image_std=STD)
  levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
  values = processor.rescale(levels, processor.rescale_factor)
  return processor.normalize(values, MEAN, STD)[0, 0]
