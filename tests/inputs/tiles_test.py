"""Tiling equals the rule as stated here, and as Transformers has it; pixels equal the release's."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from bis_jax.models.internvl.images import PATCH_VALUES, InternVLImages


def stated_grid(height, width, max_tiles):
  """The rule in words: the closest grids; the largest of them that the image fills half of, or,
  if it fills none, the smallest."""
  grids = [(r, c) for r in range(1, 13) for c in range(1, 13) if r * c <= max_tiles]
  difference = {grid: abs(width / height - grid[1] / grid[0]) for grid in grids}
  closest = [grid for grid in grids if difference[grid] == min(difference.values())]
  smallest, *larger = sorted(closest, key=lambda grid: grid[0] * grid[1])
  filled = [(r, c) for r, c in larger if 2 * height * width > 448 * 448 * r * c]
  return filled[-1] if filled else smallest


def _sizes():
  """(height, width): every aspect ratio of a short side's pixels from 1:20 to 20:1, small to large."""
  for short in (7, 40, 223, 448, 1000):
    for long in np.unique(np.linspace(short, 20 * short, 1500).astype(int)).tolist():
      yield short, long
      yield long, short


def _ties():
  """Sizes whose aspect ratio is exactly between two grids, around every limit of the area rule."""
  for rows, columns in ((1, 1), (8, 12), (12, 8), (8, 10), (4, 5), (2, 3), (4, 7), (2, 5), (2, 9)):
    for scale in range(1, 260):
      yield rows * scale, columns * scale
      yield columns * scale, rows * scale
  for side in range(310, 1100):  # of a square: 1 x 1 or 2 x 2 tiles, from 2 * 448 * 448 pixels on
    yield side, side
    yield 4 * (side // 4), 5 * (side // 4)


@pytest.mark.parametrize("max_tiles", [1, 4, 6])
def test_grid_equals_the_stated_rule(max_tiles):
  """Mutations caught: >= for > in the area rule; the area rule left out; rows and columns exchanged."""
  images = InternVLImages(max_tiles)
  seen = set()
  for size in [*_sizes(), *_ties()]:
    grid = images.grid(*size)
    assert grid == stated_grid(*size, max_tiles), size
    seen.add(grid)
  assert len(seen) == len([1 for r in range(1, 7) for c in range(1, 7) if r * c <= max_tiles])


def test_grid_equals_transformers():
  images = InternVLImages(6)
  for height, width in [*_sizes()][::7] + [*_ties()][::5]:
    columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), 1, 6)
    assert images.grid(height, width) == (rows, columns), (height, width)


@pytest.mark.parametrize(
  ("size", "grid"),
  [
    ((633, 633), (1, 1)),  # 400,689 pixels, fewer than half of 2 x 2 tiles
    ((634, 634), (2, 2)),  # 401,956
    ((400, 500), (1, 1)),  # aspect 1.25 is as far from 1 as from 1.5
    ((600, 750), (2, 2)),
    ((800, 1000), (2, 3)),
    ((200, 300), (2, 3)),  # small, but no tie
    ((20, 400), (1, 6)),
    ((400, 20), (6, 1)),
  ],
)
def test_known_grids(size, grid):
  assert InternVLImages(6).grid(*size) == grid


@pytest.mark.parametrize("tile", [448, 56])
@pytest.mark.parametrize("size", [(448, 448), (500, 800), (90, 900), (634, 634), (37, 21)])
def test_values_equal_the_released_steps(size, tile):
  """Resize, crop, thumbnail, then torchvision's ToTensor and Normalize; in torch, tile by tile."""
  height, width = size
  pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
  image = Image.fromarray(pixels)
  images = InternVLImages(6, tile)
  rows, columns = images.grid(height, width)
  resized = image.resize((tile * columns, tile * rows), Image.Resampling.BICUBIC)
  crops = [
    resized.crop((tile * c, tile * r, tile * (c + 1), tile * (r + 1)))
    for r in range(rows)
    for c in range(columns)
  ]
  if len(crops) > 1:
    crops.append(image.resize((tile, tile), Image.Resampling.BICUBIC))
  mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
  chw = torch.stack([torch.tensor(np.array(crop)).permute(2, 0, 1) for crop in crops])
  chw = (chw.float().div(255) - mean[:, None, None]) / std[:, None, None]
  # What a convolution of 14 x 14 with stride 14 multiplies with its flattened kernel.
  reference = torch.nn.functional.unfold(chw, 14, stride=14).transpose(1, 2)

  tiles = images.patches(image)
  slots = (tile // 14) ** 2 * len(crops)
  values = np.zeros((slots, PATCH_VALUES), np.float32)
  tiles.write_values(values)
  assert images.cost(height, width) == (slots // 4, slots)
  assert tiles.image_tokens == slots // 4
  assert tiles.grid == (rows, columns)
  np.testing.assert_array_equal(values, reference.reshape(values.shape).numpy())
