"""The arrays of a batch, and how samples are put into a row.

A batch is a dict of numpy arrays: B rows of this process, T tokens, P patch slots, R step markers.
All positions and indices count within their row.

    tokens         int32[B, T]      `image_pad` where an image feature goes
    segment_ids    int32[B, T]      1.. the sample in the row, 0 padding
    positions      int32[B, ..., T] of the backbone's kind, from 0 in every sample
    image_index    int32[B, T]      image feature that replaces the token, -1 elsewhere
    patches        float32[B, P, C] normalized values
    patch_segment  int32[B, P]      1.. the image in the row, 0 empty slot
    marker_index   int32[B, R]      token of the marker; 0 if unused
    marker_target  float32[B, R]    probability that the step is correct
    marker_weight  float32[B, R]    0 if ignored or unused
    example_index  int32[B, R]      the marker's example and
    step_index     int32[B, R]        step; -1 if unused. Both stay on the host.

A backbone may add arrays: see `empty` of its image processor.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from bis_jax.inputs.images import Batch, ImagePatches, ImageProcessor
from bis_jax.inputs.prompt import Sample

# Arrays that stay on the host: the model does not read them.
HOST_KEYS = ("example_index", "step_index")


def device_arrays(batch: Batch) -> Batch:
  return {key: array for key, array in batch.items() if key not in HOST_KEYS}


def empty_batch(images: ImageProcessor, rows: int, budgets: Iterable[int]) -> Batch:
  """Returns `rows` empty rows; `budgets` as `pack.BUDGETS`."""
  row_tokens, row_patches, row_markers = map(int, budgets)
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
  return batch | images.empty(rows, row_tokens, row_patches)


class RowWriter:
  """Appends samples to the arrays of one row; the row must have room, which the plan ensures."""

  def __init__(self, images: ImageProcessor, arrays: Batch):
    """`arrays` are views of one row of an empty batch, without the axis B."""
    self._processor, self._arrays = images, arrays
    self._samples = self._tokens = self._patches = self._images = self._markers = 0

  def add(
    self,
    sample: Sample,
    images: Sequence[ImagePatches],
    targets: np.ndarray,
    weights: np.ndarray,
    *,
    example_index: int,
  ) -> None:
    """Adds a sample with its images and float32[n] labels, of which the kept steps are used."""
    arrays, start = self._arrays, self._tokens
    here = slice(start, start + len(sample.tokens))
    self._samples += 1
    self._tokens = here.stop
    arrays["tokens"][here] = sample.tokens
    arrays["segment_ids"][here] = self._samples
    positions = self._processor.positions(len(sample.tokens), sample.image_spans, images)
    arrays["positions"][..., here] = positions
    for (first, count), image in zip(sample.image_spans, images, strict=True):
      self._images += 1
      self._patches, features = image.add_to(arrays, self._patches, self._images)
      arrays["image_index"][start + first : start + first + count] = features

    kept = len(sample.markers)
    used = slice(self._markers, self._markers + kept)
    self._markers = used.stop
    arrays["marker_index"][used] = start + sample.markers
    arrays["marker_target"][used] = targets[:kept]
    arrays["marker_weight"][used] = weights[:kept]
    arrays["example_index"][used] = example_index
    arrays["step_index"][used] = np.arange(kept)
