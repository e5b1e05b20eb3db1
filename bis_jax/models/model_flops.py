"""Floating-point operations of a training step that the model asks for, whatever is recomputed.

A product of [m, k] and [k, n] counts 2 m k n. Norms, activations and the update are left out.
"""

from collections.abc import Iterable

import numpy as np

from bis_jax.models.backbones import ModelConfig
from bis_jax.models.internvl import InternVLConfig
from bis_jax.models.qwen2_5_vl import Qwen2_5_VLConfig

TEXT = "language_model"
# Kernels in the order in which activations pass them. Gradients flow back to the first trained one.
_QWEN = ("visual.patch_embed", "visual.blocks", "visual.merger.mlp.0", "visual.merger.mlp.2", TEXT)
_INTERNVL = ("vision_model.patch_embedding", "vision_model.layers", "mlp1.fc1", "mlp1.fc2", TEXT)


def step_flops(
  config: ModelConfig,
  trained: set[str],
  token_segments: Iterable[int],
  image_patches: Iterable[int],
) -> dict[str, float]:
  """Returns the operations of one step: {"text", "text attention", "vision", "vision attention"}.

  A trained kernel counts three products (forward, its gradient, the gradient of its input), a
  frozen one the forward, and the gradient of its input where something before it is trained.

  Args:
    config: of the model.
    trained: stages with trained kernels, from `trained_stages`.
    token_segments: tokens of every packed rollout of the step; it attends to itself, causally.
    image_patches: patch slots of every image of the step.
  """
  text = config.text
  tokens = np.asarray(list(token_segments), np.float64)
  patches = np.asarray(list(image_patches), np.float64)
  d, key_width = text.hidden_size, text.num_key_value_heads * text.head_dim
  decoder = text.num_hidden_layers * (
    2 * d * d + 2 * d * key_width + 3 * d * text.intermediate_size
  )
  vision = _internvl_vision if isinstance(config, InternVLConfig) else _qwen_vision
  stages, kernels, seen = vision(config, patches)
  kernels = [*kernels, (decoder, tokens.sum())]
  flops, before = {}, False
  for stage, (multiplications, rows) in zip(stages, kernels, strict=True):
    passes = 1 + (stage in trained) + before
    before |= stage in trained
    flops[stage] = 2 * multiplications * rows * passes

  back = 3 if tower_trained(trained) else 1
  causal = text.num_hidden_layers * np.square(tokens).sum() / 2
  return {
    "text": flops.pop(TEXT),
    "text attention": 3 * 4 * d * causal,
    "vision": sum(flops.values()),
    "vision attention": back * 4 * config.vision.hidden_size * seen,
  }


# A stage's kernels: multiplications a row of their input, and rows.
_Kernels = list[tuple[float, float]]


def _qwen_vision(
  config: Qwen2_5_VLConfig, patches: np.ndarray
) -> tuple[tuple[str, ...], _Kernels, float]:
  """Returns the stages, their kernels before the text's, and the pairs that attention compares."""
  vision = config.vision
  width, merge = vision.hidden_size, vision.spatial_merge_size**2
  block = 4 * width * width + 3 * width * vision.intermediate_size
  kernels = [
    (vision.patch_values * width, patches.sum()),
    (vision.depth * block, patches.sum()),
    ((merge * width) ** 2, patches.sum() / merge),
    (merge * width * config.text.hidden_size, patches.sum() / merge),
  ]
  full = vision.depth // vision.full_attention_period
  window = (vision.window_size // vision.patch_size) ** 2
  seen = full * np.square(patches).sum() + (vision.depth - full) * window * patches.sum()
  return _QWEN, kernels, seen


def _internvl_vision(
  config: InternVLConfig, patches: np.ndarray
) -> tuple[tuple[str, ...], _Kernels, float]:
  """Likewise; every tile is a sequence of its patches and the class token."""
  vision, d = config.vision, config.text.hidden_size
  width, length = vision.hidden_size, vision.side**2 + 1
  tiles, image_tokens = patches.sum() / vision.side**2, patches.sum() / 4
  layer = 4 * width * width + 2 * width * vision.intermediate_size
  kernels = [
    (vision.patch_values * width, patches.sum()),
    (vision.num_hidden_layers * layer, tiles * length),
    (4 * width * d, image_tokens),
    (d * d, image_tokens),
  ]
  return _INTERNVL, kernels, vision.num_hidden_layers * tiles * length**2


def trained_stages(factor: dict[str, float]) -> set[str]:
  """Returns the stages whose kernels have a learning-rate factor above 0, for `step_flops`."""
  return {
    stage
    for stage in {*_QWEN, *_INTERNVL}
    if any(f > 0 for path, f in factor.items() if path.startswith(stage))
  }


def tower_trained(stages: set[str]) -> bool:
  """Returns whether gradients flow into the layers of the vision tower."""
  return bool(stages & {*_QWEN[:2], *_INTERNVL[:2]})
