"""The arrays of a batch, and how samples are put into a row.

A batch is a dict of numpy arrays: B rows of this process, T tokens, P patch slots, R step markers.
All positions and indices count within their row.

    tokens         int32[B, T]      `image_pad` where an image feature goes
    segment_ids    int32[B, T]      1.. the group in the row, 0 padding
    positions      int32[B, ..., T] of the backbone's kind, from 0 in every sample
    image_index    int32[B, T]      image feature that replaces the token, -1 elsewhere
    patches        float32[B, P, C] normalized values
    patch_segment  int32[B, P]      1.. the image in the row, 0 empty slot
    marker_index   int32[B, R]      token of the marker; 0 if unused
    marker_rollout int32[B, R]      1.. the sample in the row, 0 if unused
    marker_target  float32[B, R]    probability that the step is correct
    marker_weight  float32[B, R]    0 if ignored or unused
    example_index  int32[B, R]      the marker's example and
    step_index     int32[B, R]        step; -1 if unused. Both stay on the host.

A group is one sample, unless rows have L streams of S tokens. Then the T tokens are first those of
prefixes and then those of the streams; a group is the prefix that some samples share, and the rest
of each in a stream of its own:

    stream_ids     int32[B, L, S]   segment_ids of the streams

    tokens        [image question | step 1 prm step 2 prm | step 1 prm _]   of two solutions
    segment_ids   [  1      1     |   1     1    1     1  |   1     1  0]   and two streams

Rows whose keys and values are remembered (see `Decoder.with_memory`) have

    slots          int32[B, T]      where those of the token are kept; NO_SLOT: nowhere

A backbone may add arrays: see `empty` of its image processor.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from bis_jax.inputs.images import Batch, ImagePatches, ImageProcessor
from bis_jax.inputs.prompt import Sample

# Arrays that stay on the host: the model does not read them.
HOST_KEYS = ("example_index", "step_index")
NO_SLOT = np.iinfo(np.int32).max


def device_arrays(batch: Batch) -> Batch:
  return {key: array for key, array in batch.items() if key not in HOST_KEYS}


def empty_batch(
  images: ImageProcessor, rows: int, budgets: Iterable[int], streams: tuple[int, int] = (0, 0)
) -> Batch:
  """Returns `rows` empty rows; `budgets` as `pack.BUDGETS`, `streams` are (number, tokens of each)."""
  row_tokens, row_patches, row_markers = map(int, budgets)
  batch: Batch = {
    "tokens": np.zeros((rows, row_tokens), np.int32),
    "segment_ids": np.zeros((rows, row_tokens), np.int32),
    "image_index": np.full((rows, row_tokens), -1, np.int32),
    "patch_segment": np.zeros((rows, row_patches), np.int32),
    "marker_index": np.zeros((rows, row_markers), np.int32),
    "marker_rollout": np.zeros((rows, row_markers), np.int32),
    "marker_target": np.zeros((rows, row_markers), np.float32),
    "marker_weight": np.zeros((rows, row_markers), np.float32),
    "example_index": np.full((rows, row_markers), -1, np.int32),
    "step_index": np.full((rows, row_markers), -1, np.int32),
  }
  if streams[0]:
    batch["stream_ids"] = np.zeros((rows, *streams), np.int32)
  return batch | images.empty(rows, row_tokens, row_patches)


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a sample goes: its first `split` tokens before the streams, the others into a stream."""

  split: int
  stream: int  # -1: into none
  group: int  # 0.. in the row; its samples come one after the other, and have the same `split`


class RowWriter:
  """Appends samples to the arrays of one row; the row must have room, which the plan ensures."""

  def __init__(self, images: ImageProcessor, arrays: Batch):
    """`arrays` are views of one row of an empty batch, without the axis B."""
    self._processor, self._arrays = images, arrays
    streams = arrays["stream_ids"].shape if "stream_ids" in arrays else (0, 0)
    first = len(arrays["tokens"]) - streams[0] * streams[1]
    self._ends = [0, *(first + stream * streams[1] for stream in range(streams[0]))]
    self._rollouts = self._patches = self._images = self._markers = 0
    self._group, self._start = -1, 0
    self._of_group: Sequence[ImagePatches] = ()

  def add(
    self,
    sample: Sample,
    images: Sequence[ImagePatches],
    targets: np.ndarray,
    weights: np.ndarray,
    *,
    example_index: int,
    place: Place | None = None,
    slots: np.ndarray | None = None,
  ) -> None:
    """Adds a sample with its images and float32[n] labels, of which the kept steps are used.

    Of a group's samples, the first alone has images. `place` None is that of rows without streams,
    `slots` int32[t] are those of the sample's tokens.
    Raises ValueError if a sample has other tokens in its prefix than its group.
    """
    length = len(sample.tokens)
    place = place or Place(length, -1, self._group + 1)
    new = place.group != self._group
    if new:
      self._group, self._start, self._of_group = place.group, self._ends[0], images
    images = self._of_group
    here = self._start + np.arange(length)  # the row's token of each of the sample
    if place.stream >= 0:
      here[place.split :] += self._ends[place.stream + 1] - self._start - place.split
      self._ends[place.stream + 1] += length - place.split
    if new:
      self._ends[0] += place.split
    elif (self._arrays["tokens"][here] != sample.tokens)[: place.split].any():
      raise ValueError("its question or its images are not those of its group")
    written = 0 if new else place.split
    self._write(sample, images, here, written)
    if slots is not None:
      self._arrays["slots"][here[written:]] = slots[written:]

    kept = len(sample.markers)
    used = slice(self._markers, self._markers + kept)
    self._markers, self._rollouts = used.stop, self._rollouts + 1
    arrays = self._arrays
    arrays["marker_index"][used] = here[sample.markers]
    arrays["marker_rollout"][used] = self._rollouts
    arrays["marker_target"][used] = targets[:kept]
    arrays["marker_weight"][used] = weights[:kept]
    arrays["example_index"][used] = example_index
    arrays["step_index"][used] = np.arange(kept)

  def _write(
    self, sample: Sample, images: Sequence[ImagePatches], here: np.ndarray, written: int
  ) -> None:
    """Writes the sample's tokens from the one numbered `written` on, with the images among them."""
    arrays, new = self._arrays, here[written:]
    arrays["tokens"][new] = sample.tokens[written:]
    arrays["segment_ids"][new] = self._group + 1
    positions = self._processor.positions(len(here), sample.image_spans, images)
    arrays["positions"][..., new] = positions[..., written:]
    if "stream_ids" in arrays:
      streams = arrays["stream_ids"]
      streams[:] = arrays["segment_ids"][-streams.size :].reshape(streams.shape)
    if not written:
      for (first, count), image in zip(sample.image_spans, images, strict=True):
        self._images += 1
        self._patches, features = image.add_to(arrays, self._patches, self._images)
        arrays["image_index"][here[first : first + count]] = features
