"""Kernels and attention of Qwen2.5-VL's vision tower, for `model_flops`."""

import numpy as np

from bis_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig

STAGES = ("visual.patch_embed", "visual.blocks", "visual.merger.mlp.0", "visual.merger.mlp.2")


def vision_flops(
  config: Qwen2_5_VLConfig, patches: np.ndarray
) -> tuple[list[tuple[float, float]], float]:
  """Returns (multiplications per row, rows) of each stage, and the pairs that attention compares."""
  vision = config.vision
  width, merge = vision.hidden_size, vision.spatial_merge_size**2
  block = 4 * width * width + 3 * width * vision.intermediate_size
  total = float(patches.sum())
  kernels: list[tuple[float, float]] = [
    (vision.patch_values * width, total),
    (vision.depth * block, total),
    ((merge * width) ** 2, total / merge),
    (merge * width * config.text.hidden_size, total / merge),
  ]
  full = vision.depth // vision.full_attention_period
  window = (vision.window_size // vision.patch_size) ** 2
  pairs = full * float(np.square(patches).sum()) + (vision.depth - full) * window * total
  return kernels, pairs
