"""Multimodal rotary positions (mRoPE), computed on the host.

Source: Transformers `Qwen2_5_VLModel.get_rope_index`.
"""

from collections.abc import Sequence

import numpy as np


def mrope(length: int, image_spans: np.ndarray, grids: Sequence[tuple[int, int]]) -> np.ndarray:
  """Returns int32[3, length]: the (time, height, width) position of each token of one sample.

  Text counts up, the same in all three. An image of 2 x 3 tokens that starts at position 5 has

      time    5 5 5 5 5 5
      height  5 5 5 6 6 6
      width   5 6 7 5 6 7

  and the text after it goes on at 5 + max(2, 3) = 8.

  Args:
    length: tokens of the sample.
    image_spans: int[images, 2], (start, length) of each image's tokens, in order.
    grids: (rows, columns) of image tokens of each image.
  """
  # Where text counts: +1 a token, and a whole image advances by its longer side.
  step = np.ones(length, np.int64)
  for (start, count), grid in zip(image_spans, grids, strict=True):
    step[start : start + count] = 0
    step[start + count - 1] = max(grid)
  base = np.cumsum(step) - step
  positions = np.broadcast_to(base, (3, length)).astype(np.int32)
  for (start, count), (rows, columns) in zip(image_spans, grids, strict=True):
    positions[1, start : start + count] += np.repeat(np.arange(rows, dtype=np.int32), columns)
    positions[2, start : start + count] += np.tile(np.arange(columns, dtype=np.int32), rows)
  return positions
