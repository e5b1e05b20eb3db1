"""The names of Qwen3-VL's tensors in checkpoints, the same on the hub and in Transformers."""

from collections.abc import Mapping
from typing import Any

from bis_jax.models.hub_layout import Layout
from bis_jax.models.qwen3_vl.config import Qwen3VLConfig


def layout(config: Qwen3VLConfig, checkpoint: Mapping[str, Any]) -> Layout:
  vision = config.vision
  patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
  return Layout(
    lm_head="lm_head.weight",
    embedding="model.language_model.embed_tokens.weight",
    stacks=("visual.blocks.", "visual.deepstack_merger_list.", "language_model.layers."),
    names=((r"\.fc([12])\.", r".linear_fc\1."), (r"^(?=visual|language_model)", "model.")),
    aliases=(),
    shapes={"visual.patch_embed.proj.kernel": (vision.hidden_size, vision.in_channels, *patch)},
  )
