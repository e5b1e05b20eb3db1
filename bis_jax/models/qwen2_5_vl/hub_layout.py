"""The names of Qwen2.5-VL's tensors in checkpoints.

Two spellings exist: the hub's (`visual.*`, `model.*`), which `save_pretrained` writes too, and that
of newer Transformers in memory (`model.visual.*`, `model.language_model.*`).
"""

from collections.abc import Mapping
from typing import Any

from bis_jax.models.hub_layout import Layout
from bis_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig


def layout(config: Qwen2_5_VLConfig, checkpoint: Mapping[str, Any]) -> Layout:
  vision = config.vision
  patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
  return Layout(
    lm_head="lm_head.weight",
    embedding="model.embed_tokens.weight",
    stacks=("visual.blocks.", "language_model.layers."),
    names=((r"^language_model\.", "model."),),
    aliases=((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")),
    in_memory=((r"^model\.", "model.language_model."), (r"^visual\.", "model.visual.")),
    shapes={"visual.patch_embed.proj.kernel": (vision.hidden_size, vision.in_channels, *patch)},
  )
