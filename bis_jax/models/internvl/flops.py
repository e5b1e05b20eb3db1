"""Kernels and attention of InternVL's vision tower, for `model_flops`."""

import numpy as np

from bis_jax.models.internvl.config import InternVLConfig

STAGES = ("vision_model.patch_embedding", "vision_model.layers", "mlp1.fc1", "mlp1.fc2")


def vision_flops(
  config: InternVLConfig, patches: np.ndarray
) -> tuple[list[tuple[float, float]], float]:
  """Returns (multiplications per row, rows) of each stage, and the pairs of attention."""
  # Every tile is a sequence of its patches and the class token.
  vision, d = config.vision, config.text.hidden_size
  width, length = vision.hidden_size, vision.side**2 + 1
  total = float(patches.sum())
  tiles, image_tokens = total / vision.side**2, total / 4
  layer = 4 * width * width + 2 * width * vision.intermediate_size
  kernels: list[tuple[float, float]] = [
    (vision.patch_values * width, total),
    (vision.num_hidden_layers * layer, tiles * length),
    (4 * width * d, image_tokens),
    (d * d, image_tokens),
  ]
  return kernels, vision.num_hidden_layers * tiles * length**2
