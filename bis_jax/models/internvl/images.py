"""InternVL's image preprocessing: tiles of 448 x 448 pixels, cut into patches for the vision tower.

An image is resized to the grid of at most `max_tiles` tiles with the closest aspect ratio, and cut;
if that gives more than one tile, the whole image (thumbnail) is added as the last tile:

    800 x 500 pixels, aspect 1.6: 3 x 2 tiles (aspect 1.5)
    tile 0  tile 1  tile 2
    tile 3  tile 4  tile 5      and tile 6, the thumbnail: 7 tiles, 7 * 256 image tokens

Small models have smaller tiles, of the vision tower's `image_size`.

Source: `dynamic_preprocess` and `find_closest_aspect_ratio` of the InternVL release, without its
JPEG augmentation of training images, so that training and evaluation see the same pixels.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bis_jax.inputs.images import Batch, patchify

PATCH = 14  # pixels along a side
TOKEN_PATCHES = 4  # two by two become one image token
PATCH_VALUES = 3 * PATCH * PATCH  # channels x pixels: 588

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, by channel
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Tiles:
  """One image as the vision tower reads it: n tiles in reading order, the thumbnail last."""

  pixels: np.ndarray  # uint8[n, P, 3, 196], the P patches of each tile in reading order
  grid: tuple[int, int]  # (rows, columns) of tiles, without the thumbnail

  @property
  def image_tokens(self) -> int:
    return self.pixels.shape[0] * self.pixels.shape[1] // TOKEN_PATCHES

  def add_to(self, row: Batch, slot: int, number: int) -> tuple[int, np.ndarray]:
    here = slice(slot, slot + self.image_tokens * TOKEN_PATCHES)
    self.write_values(row["patches"][here])
    row["patch_segment"][here] = number
    return here.stop, slot // TOKEN_PATCHES + np.arange(self.image_tokens)

  def write_values(self, out: np.ndarray) -> None:
    """Writes normalized values into contiguous float32[n * P, 588]."""
    values = out.reshape(self.pixels.shape)
    for channel, table in enumerate(_value_tables()):
      values[:, :, channel] = table.take(self.pixels[:, :, channel])


@dataclass(frozen=True)
class InternVLImages:
  """See `inputs.images.ImageProcessor`."""

  max_tiles: int = 6  # of one image, the thumbnail not counted
  tile: int = 448  # pixels along a side of a tile, a multiple of 28

  @property
  def slot_multiple(self) -> int:
    return (self.tile // PATCH) ** 2  # 1024 at 448 pixels

  def grid(self, height: int, width: int) -> tuple[int, int]:
    # Of the grids with the closest aspect ratio (width / height, differences in float64) the first
    # by number of tiles; but each further one instead, if the image has more than half its pixels.
    aspect, area = width / height, width * height
    best, best_difference = (1, 1), float("inf")
    for rows, columns in _grids(self.max_tiles):
      difference = abs(aspect - columns / rows)
      large = area > 0.5 * self.tile**2 * rows * columns
      if difference < best_difference or (difference == best_difference and large):
        best, best_difference = (rows, columns), difference
    return best

  def cost(self, height: int, width: int) -> tuple[int, int]:
    rows, columns = self.grid(height, width)
    return self._cost(rows * columns)

  def largest_cost(self) -> tuple[int, int]:
    return self._cost(self.max_tiles)

  def _cost(self, tiles: int) -> tuple[int, int]:
    slots = (tiles + (tiles > 1)) * self.slot_multiple  # with the thumbnail
    return slots // TOKEN_PATCHES, slots

  def patches(self, image: Image.Image) -> Tiles:
    grid = self.grid(image.height, image.width)

    def cut(rows: int, columns: int) -> np.ndarray:
      size = (columns * self.tile, rows * self.tile)
      resized = image.resize(size, Image.Resampling.BICUBIC)
      return patchify(resized, rows, columns, self.tile // PATCH)

    tiles = [cut(*grid)] if grid == (1, 1) else [cut(*grid), cut(1, 1)]
    return Tiles(np.concatenate(tiles), grid)

  def empty(self, rows: int, row_tokens: int, row_patches: int) -> Batch:
    return {
      "positions": np.zeros((rows, row_tokens), np.int32),
      "patches": np.zeros((rows, row_patches, PATCH_VALUES), np.float32),
    }

  def positions(self, length: int, spans: np.ndarray, images: Sequence[Tiles]) -> np.ndarray:
    return np.arange(length)


@functools.cache
def _grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
  sides = range(1, max_tiles + 1)
  grids = [(r, c) for r in sides for c in sides if r * c <= max_tiles]
  return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


@functools.cache
def _value_tables() -> np.ndarray:
  """Returns float32[3, 256]: the normalized value of every 8-bit value, one row per channel."""
  levels = np.arange(256, dtype=np.float32) / np.float32(255)
  mean, std = (np.array(x, np.float32)[:, None] for x in (MEAN, STD))
  return (levels[None] - mean) / std
