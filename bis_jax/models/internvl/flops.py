"""Rows and attention of InternVL's vision tower, for `model_flops`."""

import numpy as np

from bis_jax.models.internvl.config import InternVLConfig

STAGES = ("vision_model.patch_embedding", "vision_model.layers", "mlp1.fc1", "mlp1.fc2")


def vision_rows(config: InternVLConfig, patches: np.ndarray) -> tuple[list[float], float]:
  """Returns the rows of each stage, and the pairs that attention compares."""
  # Every tile is a sequence of its patches and the class token.
  vision, total = config.vision, float(patches.sum())
  tiles, length = total / vision.side**2, vision.side**2 + 1
  rows = [total, tiles * length, total / 4, total / 4]
  return rows, vision.num_hidden_layers * tiles * length**2
