"""Benchmark items as examples of the input pipeline."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from bis_jax.evaluation.visual_process_bench import BenchmarkItem, encoded_images, shown_sizes
from bis_jax.inputs.pipeline import Example


class BenchmarkExamples:
  """Benchmark items, to be scored; targets and weights are 0."""

  def __init__(self, items: Sequence[BenchmarkItem], images: str, *, blank: bool = False):
    """Holds items; `images` is `config.evaluation.images`; `blank` greys every image out."""
    self._items, self._images, self._blank = items, images, blank

  def __len__(self) -> int:
    return len(self._items)

  def __getitem__(self, i: int) -> Example:
    item = self._items[i]
    zeros = np.zeros(len(item.steps), np.float32)
    return Example(
      id=f"item {item.index}",
      question=item.question,
      steps=item.steps,
      images=tuple(map(_grey, self.image_sizes(i)))
      if self._blank
      else encoded_images(item, self._images),
      targets=zeros,
      weights=zeros,
    )

  def text(self, i: int) -> tuple[str, tuple[str, ...]]:
    """Returns (question, steps) of item i."""
    return self._items[i].question, self._items[i].steps

  def image_sizes(self, i: int) -> list[tuple[int, int]]:
    """Returns (height, width) in pixels of every image of item i."""
    return shown_sizes(self._items[i], self._images)


def _grey(size: tuple[int, int]) -> bytes:
  """Returns an encoded grey image of (height, width)."""
  encoded = io.BytesIO()
  Image.new("RGB", size[::-1], (128, 128, 128)).save(encoded, "PNG")
  return encoded.getvalue()
