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
  positions = np.empty((3, length), np.int32)
  token = position = 0
  for (start, count), (rows, columns) in zip(image_spans, grids, strict=True):
    positions[:, token:start] = np.arange(position, position + start - token)
    position += start - token
    token = start + count
    positions[0, start:token] = position
    positions[1, start:token] = position + np.arange(rows).repeat(columns)
    positions[2, start:token].reshape(rows, columns)[:] = position + np.arange(columns)
    position += max(rows, columns)
  positions[:, token:] = np.arange(position, position + length - token)
  return positions
