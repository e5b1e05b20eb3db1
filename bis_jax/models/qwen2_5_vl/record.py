"""The record of Qwen2.5-VL."""

import functools
from typing import Any

from ml_collections import ConfigDict

from bis_jax.models.backbone import Backbone
from bis_jax.models.qwen2_5_vl import hub_files
from bis_jax.models.qwen2_5_vl.config import SIZES
from bis_jax.models.qwen2_5_vl.flops import STAGES, vision_rows
from bis_jax.models.qwen2_5_vl.hub_layout import layout
from bis_jax.models.qwen2_5_vl.images import UNIT, UNIT_PATCHES, QwenImages
from bis_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from bis_jax.models.qwen2_5_vl.prompt import QwenPrompt, load_tokenizer
from bis_jax.models.setting import Setting
from bis_jax.parallel.sharding import P

_SHARDING = (
  (r"blocks\..*\.(qkv|gate_proj|up_proj)\.kernel$", P(None, "fsdp", "tensor")),
  (r"blocks\..*\.(proj|down_proj)\.kernel$", P(None, "tensor", "fsdp")),
  (r"patch_embed\.proj\.kernel$", P("fsdp", "tensor")),
  (r"merger\.mlp\.0\.kernel$", P("fsdp", "tensor")),
  (r"merger\.mlp\.2\.kernel$", P("tensor", "fsdp")),
)

_SETTINGS = {
  "min_pixels": Setting(4 * UNIT**2, ">= 1", "of an image after the resize", toy=UNIT**2),
  "max_pixels": Setting(
    1280 * UNIT**2, f">= {UNIT**2}", f"likewise; {UNIT**2} per image token", toy=140**2
  ),
}


def pixel_faults(name: str, unit: int, config: ConfigDict, images: Any) -> list[str]:
  """Returns the faults of the limits of pixels in a section; an image token is `unit` pixels wide."""
  inputs, faults, tokens = config.inputs, [], images.max_pixels // unit**2
  allows = f"config.{name}.max_pixels ({images.max_pixels}) allows images of"
  if images.min_pixels > images.max_pixels:
    faults.append(
      f"config.{name}.min_pixels ({images.min_pixels}) must not exceed "
      f"config.{name}.max_pixels ({images.max_pixels})"
    )
  if tokens >= inputs.max_length:
    faults.append(
      f"{allows} {tokens} tokens, more than config.inputs.max_length ({inputs.max_length}) holds: "
      f"lower max_pixels to at most {(inputs.max_length // 2) * unit**2} or raise max_length"
    )
  if UNIT_PATCHES * tokens > inputs.row_patches:
    faults.append(
      f"{allows} {UNIT_PATCHES * tokens} patches, more than config.inputs.row_patches "
      f"({inputs.row_patches}) holds: lower max_pixels or raise row_patches"
    )
  return faults


QWEN2_5_VL = Backbone(
  name="qwen2_5_vl",
  sizes=SIZES,
  model=Qwen2_5_VL,
  sharding=_SHARDING,
  tower=r"visual\.(?!merger)",
  stages=STAGES,
  vision_rows=vision_rows,
  load_tokenizer=load_tokenizer,
  make_prompt=lambda tokenizer, separator, own: QwenPrompt(tokenizer, separator=separator),
  make_images=lambda model, own: QwenImages(own.min_pixels, own.max_pixels),
  rollout_tokens=618,  # 565,149 rollouts in 42,602 rows of 8192 tokens (benchmarks/packing.py)
  prefix_tokens=350,
  settings=_SETTINGS,
  config_faults=functools.partial(pixel_faults, "qwen2_5_vl", UNIT),
  row_patches=24_576,
  toy_row_patches=128,
  checkpoint="Qwen/Qwen2.5-VL-7B-Instruct",
  layout=layout,
  config_json=hub_files.config_json,
  preprocessor_json=hub_files.preprocessor_json,
  serving_files=lambda model, processor, base: {},
  is_plain=lambda model, base: True,
  published=lambda raw: {},
  card="qwen2_5_vl/card.md",
)
