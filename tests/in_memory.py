"""Examples whose images are in memory."""

import copy
import functools
from collections.abc import Sequence

import numpy as np

from bis_jax.images import decode
from bis_jax.inputs.pipeline import Example
from bis_jax.inputs.prompt import expand


def in_memory(
  id: str,
  question: str,
  steps: Sequence[str],
  images: Sequence[bytes],
  targets: np.ndarray,
  weights: np.ndarray,
) -> Example:
  sizes = [decode(image).size[::-1] for image in images]
  read = functools.partial(copy.copy, tuple(images))
  return Example(id, question, tuple(steps), sizes, read, targets, weights)


def encode(prompt, question, steps, image_token_counts=(), *, max_length):
  """Returns the sample of one text."""
  [(compact, dropped, prefix)] = prompt.encode_batch(
    [(question, steps)], [image_token_counts], max_length=max_length
  )
  return expand(compact, image_token_counts, prompt.special, dropped, prefix)
