"""Rows and attention of Qwen2.5-VL's vision tower, for `model_flops`."""

import numpy as np

from bis_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig

STAGES = ("visual.patch_embed", "visual.blocks", "visual.merger.mlp.0", "visual.merger.mlp.2")


def vision_rows(config: Qwen2_5_VLConfig, patches: np.ndarray) -> tuple[list[float], float]:
  """Returns the rows of each stage, and the pairs that attention compares."""
  vision, total = config.vision, float(patches.sum())
  merged = total / vision.spatial_merge_size**2
  full = vision.depth // vision.full_attention_period
  window = (vision.window_size // vision.patch_size) ** 2
  pairs = full * float(np.square(patches).sum()) + (vision.depth - full) * window * total
  return [total, total, merged, merged], pairs
