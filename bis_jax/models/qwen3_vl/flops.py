"""Rows and attention of Qwen3-VL's vision tower, for `model_flops`."""

import numpy as np

from bis_jax.models.qwen3_vl.config import Qwen3VLConfig

# The last merger follows the others here, so with a frozen tower its first product counts a gradient
# of its input that nothing needs: 0.1 % of a step of 8B.
STAGES = (
  "visual.patch_embed",
  "visual.blocks",
  "visual.deepstack_merger_list.fc1",
  "visual.deepstack_merger_list.fc2",
  "visual.merger.fc1",
  "visual.merger.fc2",
)


def vision_rows(config: Qwen3VLConfig, patches: np.ndarray) -> tuple[list[float], float]:
  """Returns the rows of each stage, and the pairs that attention compares."""
  vision, total = config.vision, float(patches.sum())
  merged = total / vision.spatial_merge_size**2
  pairs = vision.depth * float(np.square(patches).sum())
  return [total, total, *[merged] * 4], pairs
