"""Pixels, grids and windows equal Transformers'; odd files decode as a person expects."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from bis_jax.images import decode
from bis_jax.models.qwen2_5_vl import images
from bis_jax.models.qwen2_5_vl.images import BLOCK, UNIT, QwenImages

LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 768 * 28 * 28}
# Squares of the released figures, and grids that the window does not divide on one or both sides.
SIZES = [(s, s) for s in (224, 280, 336, 364, 392, 448, 504, 560, 672)] + [
  (224, 364),
  (364, 224),
  (280, 672),
  (28, 28),
  (30, 700),
  (333, 451),
  (700, 1300),
]


def picture(height, width, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
  return Image.fromarray(pixels)


def values_of(patches):
  values = np.zeros((len(patches.window), images.PATCH_VALUES), np.float32)
  patches.write_values(values)
  return values


def unit_slots(patches):
  """Slots of every patch in the order of the Hugging Face processor."""
  return (patches.unit_slot[:, None] * 4 + np.arange(4)).reshape(-1)


def processor(limits=LIMITS):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return Qwen2VLImageProcessorPil(**limits)


@pytest.mark.parametrize("height, width", SIZES)
def test_values_and_grid_equal_the_hugging_face_processor(height, width):
  """Mutations caught: unit_slot inverted (argsort) or in window order, a transposed grid.

  At 448 x 448 the window order is its own inverse, so that size alone would catch neither.
  """
  image = picture(height, width)
  patches = QwenImages(**LIMITS).patches(image)
  reference = processor()(images=[image])
  rows, columns = patches.grid
  assert reference["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
  values = values_of(patches)
  np.testing.assert_array_equal(values[unit_slots(patches)], reference["pixel_values"])
  empty = np.setdiff1d(np.arange(len(values)), unit_slots(patches))
  assert not values[empty].any() and not patches.window[empty].any()


def reference_windows(rows, columns):
  """The unit sets of Transformers' attention windows, as a set of tuples in reading order."""
  grid = torch.tensor([[1, 2 * rows, 2 * columns]])
  order, ends = get_vision_window_index(grid, 2, 112, 14)
  return {
    tuple(sorted(order[start:end].tolist()))
    for start, end in zip((ends // 4)[:-1].tolist(), (ends // 4)[1:].tolist(), strict=True)
  }


@settings(max_examples=60)
@given(rows=st.integers(1, 26), columns=st.integers(1, 26))
def test_windows_and_positions_equal_transformers(rows, columns):
  """Mutations caught: windows cut across columns first, (column, row) for (row, column)."""
  limits = QwenImages(min_pixels=UNIT * UNIT, max_pixels=26 * 26 * UNIT * UNIT)
  patches = limits.patches(Image.new("RGB", (columns * UNIT, rows * UNIT)))
  assert patches.grid == (rows, columns)
  window = patches.window[unit_slots(patches)].reshape(rows * columns, 4)
  assert (window == window[:, :1]).all()
  found = {tuple(np.flatnonzero(window[:, 0] == number).tolist()) for number in np.unique(window)}
  assert found == reference_windows(rows, columns)
  position = patches.position[unit_slots(patches)]
  reference = get_vision_position_ids(torch.tensor([[1, 2 * rows, 2 * columns]]), 2)
  np.testing.assert_array_equal(position, reference.numpy())


@settings(max_examples=100)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40))
def test_no_window_straddles_a_block(rows, columns):
  layout = images._layout(rows, columns)
  slots = layout.blocks * BLOCK
  assert sorted(set(layout.unit_slot)) == sorted(layout.unit_slot)  # every unit its own slot
  block = np.arange(slots) // BLOCK
  for number in range(1, layout.window.max() + 1):
    members = layout.window == number
    assert 0 < members.sum() <= BLOCK and len(set(block[members])) == 1
  assert (layout.window > 0).sum() == 4 * rows * columns
  # First-fit of sorted pieces: at most one block is left half empty or more.
  filled = np.bincount(block, weights=layout.window > 0)
  assert (filled <= BLOCK / 2).sum() <= 1


@settings(max_examples=60)
@given(height=st.integers(1, 900), width=st.integers(1, 900))
def test_cost_without_decoding_is_what_the_patches_take(height, width):
  limits = QwenImages(min_pixels=28 * 28, max_pixels=100 * 28 * 28)
  patches = limits.patches(Image.new("L", (width, height)).convert("RGB"))
  assert limits.cost(height, width) == (len(patches.unit_slot), len(patches.window))
  assert len(patches.unit_slot) == patches.grid[0] * patches.grid[1]


def test_released_preprocessor_settings_on_real_images(shared):
  """Photographs, scans and drawings, some with the wrong suffix for their format."""
  reference = Qwen2VLImageProcessorPil.from_pretrained(
    str(shared / "data/tokenizers/qwen2_5_vl"), **LIMITS
  )
  for path in sorted((shared / "data/images").iterdir()):
    data = path.read_bytes()
    image = decode(data)
    patches = QwenImages(**LIMITS).patches(image)
    expected = reference(
      images=[Image.open(path)],
      size={"shortest_edge": LIMITS["min_pixels"], "longest_edge": LIMITS["max_pixels"]},
    )
    assert expected["image_grid_thw"].tolist()[0][1:] == [2 * side for side in patches.grid]
    np.testing.assert_array_equal(
      values_of(patches)[unit_slots(patches)], expected["pixel_values"], err_msg=path.name
    )


@pytest.mark.parametrize("width, height", [(1, 1), (1, 5000), (5000, 1), (7, 1400)])
def test_tiny_and_very_long_images_have_patches(width, height):
  limits = QwenImages(min_pixels=56 * 56, max_pixels=1280 * 28 * 28)
  patches = limits.patches(picture(height, width))
  assert limits.cost(height, width) == (len(patches.unit_slot), len(patches.window))
  assert 4 <= len(patches.unit_slot) <= 1280
  assert (patches.grid[0] > patches.grid[1]) == (height > width)
