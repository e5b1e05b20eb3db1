"""Floating-point operations of a training step that the model asks for, whatever is recomputed.

A product of [m, k] and [k, n] counts 2 m k n. Norms, activations and the update are left out.
"""

from collections.abc import Iterable

import numpy as np

from bis_jax.models.qwen2_5_vl import Qwen2_5_VLConfig

# Kernels in the order in which activations pass them. Gradients flow back to the first trained one.
_STAGES = ("visual.patch_embed", "visual.blocks", "visual.merger.mlp.0", "visual.merger.mlp.2")


def step_flops(
  config: Qwen2_5_VLConfig,
  trained: set[str],
  token_segments: Iterable[int],
  image_patches: Iterable[int],
) -> dict[str, float]:
  """Returns the operations of one step: {"text", "text attention", "vision", "vision attention"}.

  A trained kernel counts three products (forward, its gradient, the gradient of its input), a
  frozen one the forward, and the gradient of its input where something before it is trained.

  Args:
    config: of the model.
    trained: stages with trained kernels, of _STAGES and "language_model".
    token_segments: tokens of every packed rollout of the step; it attends to itself, causally.
    image_patches: patch slots of every image of the step.
  """
  text, vision = config.text, config.vision
  tokens = np.asarray(list(token_segments), np.float64)
  patches = np.asarray(list(image_patches), np.float64)
  d, key_width = text.hidden_size, text.num_key_value_heads * text.head_dim
  decoder = text.num_hidden_layers * (
    2 * d * d + 2 * d * key_width + 3 * d * text.intermediate_size
  )
  width, merge = vision.hidden_size, vision.spatial_merge_size**2
  block = 4 * width * width + 3 * width * vision.intermediate_size
  kernels = {  # stage -> (multiplications a row of its input, rows)
    "visual.patch_embed": (vision.patch_values * width, patches.sum()),
    "visual.blocks": (vision.depth * block, patches.sum()),
    "visual.merger.mlp.0": ((merge * width) ** 2, patches.sum() / merge),
    "visual.merger.mlp.2": (merge * width * d, patches.sum() / merge),
    "language_model": (decoder, tokens.sum()),
  }
  passes, before = {}, False
  for stage in (*_STAGES, "language_model"):
    passes[stage] = 1 + (stage in trained) + before
    before |= stage in trained
  flops = {stage: 2 * n * rows * passes[stage] for stage, (n, rows) in kernels.items()}

  full = vision.depth // vision.full_attention_period
  window = (vision.window_size // vision.patch_size) ** 2
  seen = full * np.square(patches).sum() + (vision.depth - full) * window * patches.sum()
  back = 1 + 2 * (passes["visual.blocks"] > 1)
  causal = text.num_hidden_layers * np.square(tokens).sum() / 2
  return {
    "text": flops.pop("language_model"),
    "text attention": 3 * 4 * d * causal,
    "vision": sum(flops.values()),
    "vision attention": back * 4 * width * seen,
  }


def trained_stages(factor: dict[str, float]) -> set[str]:
  """Returns the stages whose kernels have a learning-rate factor above 0, for `step_flops`."""
  return {
    stage
    for stage in (*_STAGES, "language_model")
    if any(f > 0 for path, f in factor.items() if path.startswith(stage))
  }
