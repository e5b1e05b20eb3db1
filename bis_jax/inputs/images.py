"""The protocol of a backbone's image preprocessor, and what both preprocessors share."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

Batch = dict[str, np.ndarray]


class ImagePatches(Protocol):
  @property
  def image_tokens(self) -> int: ...

  def add_to(self, row: Batch, slot: int, number: int) -> tuple[int, np.ndarray]:
    """Writes the image into a row's patch slots from `slot` on, as the row's image `number`.

    Returns the next free slot, and the row's feature for each image token.
    """
    ...


class ImageProcessor(Protocol):
  """A backbone's image preprocessing, the same in training, evaluation and scoring; picklable."""

  @property
  def slot_multiple(self) -> int: ...  # patch slots of a row are a multiple of this

  def cost(self, height: int, width: int) -> tuple[int, int]:
    """Returns (image tokens, patch slots) of a stored image of that size."""
    ...

  def patches(self, image: Image.Image) -> ImagePatches: ...

  def empty(self, rows: int, row_tokens: int, row_patches: int) -> Batch:
    """Returns the arrays that only this backbone has, or in a shape of its own, for empty rows."""
    ...

  def positions(self, length: int, spans: np.ndarray, images: Sequence[Any]) -> np.ndarray:
    """Returns int32[..., length], the positions of a sample's tokens.

    `spans` is int[images, 2], the (start, length) of each image's tokens, in order; `images` are
    from `patches`.
    """
    ...


def patchify(image: Image.Image, rows: int, columns: int, side: int) -> np.ndarray:
  """Returns uint8[rows * columns, side ** 2, 3, pixels]: the patches of an RGB image by cells."""
  # Cells of `side` x `side` patches are in reading order, and so are the patches of a cell.
  patch = image.height // (rows * side)
  # [cell rows, patch rows, pixel rows, cell columns, patch columns, pixel columns, channel]
  pixels = np.asarray(image).reshape(rows, side, patch, columns, side, patch, 3)
  return pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, side**2, 3, -1)
