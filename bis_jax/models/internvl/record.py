"""The record of InternVL2.5 and InternVL3."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bis_jax.inputs.prompt import Prompt
from bis_jax.models.backbone import Backbone
from bis_jax.models.internvl import hub_files
from bis_jax.models.internvl.config import SIZES
from bis_jax.models.internvl.flops import STAGES, vision_rows
from bis_jax.models.internvl.hub_layout import layout
from bis_jax.models.internvl.images import InternVLImages
from bis_jax.models.internvl.model import InternVL
from bis_jax.models.internvl.prompt import (
  SYSTEM,
  InternVLPrompt,
  TextTokenizer,
  VisualPRMPrompt,
  load_tokenizer,
)
from bis_jax.models.setting import Setting
from bis_jax.parallel.sharding import P

_SHARDING = (
  (r"vision_model\.layers\..*\.fc1\.kernel$", P(None, "fsdp", "tensor")),
  (r"vision_model\.layers\..*\.(proj|fc2)\.kernel$", P(None, "tensor", "fsdp")),
  (r"vision_model\.patch_embedding\.kernel$", P("fsdp", "tensor")),
  (r"vision_model\.position_embedding$", P(None, "fsdp")),
  (r"mlp1\.fc1\.kernel$", P("fsdp", "tensor")),
  (r"mlp1\.fc2\.kernel$", P("tensor", "fsdp")),
  (r"(ls[12]|class_embedding)$", P()),
)

_SETTINGS = {
  "max_tiles": Setting(
    6, ">= 1 and <= 1024", "per image without its thumbnail; 256 tokens each", toy=4
  ),
  # The tokenizer of the toy corpus lacks the Chinese words of the released prompt.
  "system": Setting("", None, 'system prompt; "": released', toy="You are a helpful assistant."),
  "prompt": Setting(
    "step_markers",
    ("step_markers", "visualprm"),
    "visualprm: that of VisualPRM-8B, for scoring alone; no inputs.separator",
  ),
  "drop_path": Setting(0.0, ">= 0 and < 1", "of the vision tower; the release has 0.1 by accident"),
}


def _config_faults(config: ConfigDict, images: InternVLImages) -> list[str]:
  inputs, faults = config.inputs, []
  if config.internvl.prompt == "visualprm":
    faults.append(
      "config.internvl.prompt=visualprm is for scoring with published weights: train with step_markers"
    )
  tokens, patches = images.largest_cost()
  allows = f"config.internvl.max_tiles ({images.max_tiles}) allows images of"
  if tokens >= inputs.max_length:
    faults.append(
      f"{allows} {tokens} tokens, thumbnail included, more than config.inputs.max_length "
      f"({inputs.max_length}) holds: lower max_tiles, or raise max_length above {tokens}"
    )
  if patches > inputs.row_patches:
    faults.append(
      f"{allows} {patches} patches, thumbnail included, more than config.inputs.row_patches "
      f"({inputs.row_patches}) holds: lower max_tiles, or raise row_patches to at least {patches}"
    )
  if inputs.row_patches % images.slot_multiple:
    faults.append(
      f"config.inputs.row_patches ({inputs.row_patches}) is not a whole number of tiles, of "
      f"{images.slot_multiple} patches each: make it {inputs.row_patches // images.slot_multiple + 1}"
      f" * {images.slot_multiple}"
    )
  return faults


def _make_prompt(tokenizer: TextTokenizer, separator: str, own: ConfigDict) -> Prompt:
  system = own.system or SYSTEM
  if own.prompt == "visualprm":
    return VisualPRMPrompt(tokenizer, system=system)
  return InternVLPrompt(tokenizer, separator=separator, system=system)


def _published(raw: Mapping[str, Any]) -> dict[str, Any]:
  classes = [*raw.get("architectures", ()), *raw.get("auto_map", {}).values()]
  is_visual_prm = any(str(name).endswith("InternVLRewardModel") for name in classes)
  return {"internvl.prompt": "visualprm"} if is_visual_prm else {}


INTERNVL = Backbone(
  name="internvl",
  sizes=SIZES,
  model=InternVL,
  sharding=_SHARDING,
  tower=r"vision_model\.",
  stages=STAGES,
  vision_rows=vision_rows,
  load_tokenizer=load_tokenizer,
  make_prompt=_make_prompt,
  make_images=lambda model, own: InternVLImages(own.max_tiles, model.vision.image_size),
  rollout_tokens=1398,  # 20,000 rollouts in 3,414 rows of 8192 tokens (benchmarks/packing.py)
  prefix_tokens=1130,
  settings=_SETTINGS,
  model_settings=("drop_path",),
  refused={"3-9b": "its decoder and tokenizer are InternLM3's, which are not implemented"},
  config_faults=_config_faults,
  row_patches=28 * 1024,  # as full of tiles as of tokens
  toy_row_patches=192,
  checkpoint="OpenGVLab/InternVL2_5-8B",
  layout=layout,
  config_json=hub_files.config_json,
  preprocessor_json=hub_files.preprocessor_json,
  serving_files=hub_files.serving_files,
  is_plain=hub_files.is_plain,
  published=_published,
  card="internvl/card.md",
)
