"""The arrays of a batch, and how samples are put into a row.

A batch is a dict of numpy arrays: B rows of this process, T tokens, P patch slots, R step markers.
All positions and indices count within their row.

    tokens         int32[B, T]      `image_pad` where an image feature goes
    segment_ids    int32[B, T]      1.. the sample in the row, 0 padding
    positions      int32[B, 3, T]   mRoPE, from 0 in every sample
    image_index    int32[B, T]      merge unit whose feature replaces the token, -1 elsewhere
    patches        float32[B, P, 1176]
    patch_segment  int32[B, P]      1.. the image in the row, 0 empty slot
    patch_window   int32[B, P]      1.. the window in the row, inside one block of 64; 0 empty slot
    patch_position int32[B, P, 2]   (row, column) of the patch in its image
    marker_index   int32[B, R]      token of the marker; 0 if unused
    marker_target  float32[B, R]    probability that the step is correct
    marker_weight  float32[B, R]    0 if ignored or unused
    example_index  int32[B, R]      the marker's example and
    step_index     int32[B, R]        step; -1 if unused. Both stay on the host.

InternVL's batches have no windows and no patch positions, `positions` int32[B, T], and `patches`
float32[B, P, 588], 1024 slots a tile, in reading order; `image_index` counts 256 tokens a tile.
(At 448 pixels: see `tiles`.)
"""

from collections.abc import Sequence

import numpy as np

from bis_jax.inputs import positions, tiles
from bis_jax.inputs.images import PATCH_VALUES, UNIT_PATCHES, Patches, QwenImages
from bis_jax.inputs.prompt import Sample
from bis_jax.inputs.tiles import TOKEN_PATCHES, InternVLImages, Tiles

Batch = dict[str, np.ndarray]
# Arrays that stay on the host: the model does not read them.
HOST_KEYS = ("example_index", "step_index")


def device_arrays(batch: Batch) -> Batch:
  """Returns the arrays that the model and the loss read."""
  return {key: array for key, array in batch.items() if key not in HOST_KEYS}


def empty_batch(
  images: QwenImages | InternVLImages,
  rows: int,
  row_tokens: int,
  row_patches: int,
  row_markers: int,
) -> Batch:
  """Returns a batch of rows that hold nothing, for what `images` makes of images."""
  batch = {
    "tokens": np.zeros((rows, row_tokens), np.int32),
    "segment_ids": np.zeros((rows, row_tokens), np.int32),
    "image_index": np.full((rows, row_tokens), -1, np.int32),
    "patch_segment": np.zeros((rows, row_patches), np.int32),
    "marker_index": np.zeros((rows, row_markers), np.int32),
    "marker_target": np.zeros((rows, row_markers), np.float32),
    "marker_weight": np.zeros((rows, row_markers), np.float32),
    "example_index": np.full((rows, row_markers), -1, np.int32),
    "step_index": np.full((rows, row_markers), -1, np.int32),
  }
  if isinstance(images, InternVLImages):
    return batch | {
      "positions": np.zeros((rows, row_tokens), np.int32),
      "patches": np.zeros((rows, row_patches, tiles.PATCH_VALUES), np.float32),
    }
  return batch | {
    "positions": np.zeros((rows, 3, row_tokens), np.int32),
    "patches": np.zeros((rows, row_patches, PATCH_VALUES), np.float32),
    "patch_window": np.zeros((rows, row_patches), np.int32),
    "patch_position": np.zeros((rows, row_patches, 2), np.int32),
  }


class RowWriter:
  """Puts samples one behind the other into the arrays of one row."""

  def __init__(self, arrays: Batch):
    """Takes the views of an empty batch that belong to the row, without the axis B."""
    self._arrays = arrays
    self._samples = self._tokens = self._patches = self._images = self._windows = self._markers = 0

  def add(
    self,
    sample: Sample,
    images: Sequence[Patches] | Sequence[Tiles],
    targets: np.ndarray,
    weights: np.ndarray,
    *,
    example_index: int,
  ) -> None:
    """Adds a sample with its images and float32[n] labels, of which the kept steps are used.

    The row must have room; the plan sees to that.
    """
    arrays, start = self._arrays, self._tokens
    here = slice(start, start + len(sample.tokens))
    self._samples += 1
    self._tokens = here.stop
    arrays["tokens"][here] = sample.tokens
    arrays["segment_ids"][here] = self._samples
    if arrays["positions"].ndim == 1:
      arrays["positions"][here] = np.arange(len(sample.tokens))
    else:
      arrays["positions"][:, here] = positions.mrope(
        len(sample.tokens), sample.image_spans, [image.grid for image in images]
      )
    for (first, count), image in zip(sample.image_spans, images, strict=True):
      units = self._add_tiles(image) if isinstance(image, Tiles) else self._add_image(image)
      arrays["image_index"][start + first : start + first + count] = units

    kept = len(sample.markers)
    used = slice(self._markers, self._markers + kept)
    self._markers = used.stop
    arrays["marker_index"][used] = start + sample.markers
    arrays["marker_target"][used] = targets[:kept]
    arrays["marker_weight"][used] = weights[:kept]
    arrays["example_index"][used] = example_index
    arrays["step_index"][used] = np.arange(kept)

  def _add_image(self, image: Patches) -> np.ndarray:
    """Adds one image; returns the merge unit in the row of each of its tokens."""
    arrays = self._arrays
    here = slice(self._patches, self._patches + len(image.window))
    filled = image.window > 0
    self._images += 1
    image.write_values(arrays["patches"][here])
    arrays["patch_segment"][here] = filled * self._images
    arrays["patch_window"][here] = filled * (image.window + self._windows)
    arrays["patch_position"][here] = image.position
    self._windows += int(image.window.max())
    self._patches = here.stop
    return here.start // UNIT_PATCHES + image.unit_slot

  def _add_tiles(self, image: Tiles) -> np.ndarray:
    """Adds the tiles of one image; returns the number in the row of each of its tokens."""
    here = slice(self._patches, self._patches + image.patch_slots)
    self._images += 1
    self._patches = here.stop
    image.write_values(self._arrays["patches"][here])
    self._arrays["patch_segment"][here] = self._images
    return here.start // TOKEN_PATCHES + np.arange(image.image_tokens)
