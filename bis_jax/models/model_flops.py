"""Model FLOPs of one training step, as used for MFU: rematerialization is not counted.

A product of [m, k] and [k, n] counts 2 m k n. Norms, activations and the update are left out.
"""

import functools
import math
from collections.abc import Iterable, Mapping

import numpy as np

from bis_jax.models import backbones
from bis_jax.models.adaptation import ADAPTERS, is_adapter
from bis_jax.models.model_config import ModelConfig

_TEXT = "language_model"


def step_flops(
  config: ModelConfig,
  trained: set[str],
  token_segments: Iterable[float],
  image_patches: Iterable[float],
  shared_tokens: Iterable[float] = (0.0,),
) -> dict[str, float]:
  """Returns the FLOPs of one step: {"text", "text attention", "vision", "vision attention"}.

  `token_segments` are the tokens of every packed rollout of the step, which attend causally, and
  `image_patches` the patch slots of every image. In rows with streams, they are the tokens of every
  prefix and of every continuation, and `shared_tokens` those of the prefix behind which each is.
  """
  # A trained kernel counts three products (forward, its gradient, the gradient of its input), a
  # frozen one the forward, and the gradient of its input if something before it is trained, or an
  # adapter of its own stage.
  text = config.text
  tokens = np.asarray(list(token_segments), np.float64)
  patches = np.asarray(list(image_patches), np.float64)
  rows, pairs = backbones.get(config.backbone).vision_rows(config, patches)
  flops, before = {}, False
  for (stage, (size, adapters)), count in zip(
    _kernel_sizes(config).items(), (*rows, tokens.sum()), strict=True
  ):
    passes = 1 + (stage in trained) + (before or adapters > 0)
    before |= stage in trained or adapters > 0
    flops[stage] = 2 * count * (size * passes + 3 * adapters)

  back = 3 if tower_trained(config, trained) else 1
  before = np.asarray(list(shared_tokens), np.float64)
  causal = text.num_hidden_layers * (np.square(tokens) / 2 + tokens * before).sum()
  return {
    "text": flops.pop(_TEXT),
    "text attention": 3 * 4 * text.query_width * causal,
    "vision": sum(flops.values()),
    "vision attention": back * 4 * config.vision.hidden_size * pairs,
  }


@functools.cache
def _kernel_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
  """Returns the multiplications per row of each stage and of its adapters, in forward order."""
  _, shapes = backbones.shapes(config)

  def size(stage: str, names: str | tuple[str, ...]) -> int:
    own = (path for path in shapes if path.startswith(stage) and path.endswith(names))
    return sum(math.prod(shapes[path].shape) for path in own)

  stages = (*backbones.get(config.backbone).stages, _TEXT)
  return {stage: (size(stage, ".kernel"), size(stage, ADAPTERS)) for stage in stages}


def trained_stages(config: ModelConfig, factor: Mapping[str, float]) -> set[str]:
  """Returns the stages whose kernels have a learning-rate factor above 0, for `step_flops`."""
  return {
    stage
    for stage in (*backbones.get(config.backbone).stages, _TEXT)
    if any(f > 0 for p, f in factor.items() if p.startswith(stage) and not is_adapter(p))
  }


def tower_trained(config: ModelConfig, stages: set[str]) -> bool:
  """Returns whether gradients flow into the layers of the vision tower."""
  tower, sizes = backbones.get(config.backbone).stages[:2], _kernel_sizes(config)
  return any(stage in stages or sizes[stage][1] for stage in tower)
