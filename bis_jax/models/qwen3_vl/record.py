"""The record of Qwen3-VL."""

import functools

from bis_jax.models.backbone import Backbone
from bis_jax.models.qwen2_5_vl.hub_files import config_json
from bis_jax.models.qwen2_5_vl.prompt import QwenPrompt, load_tokenizer
from bis_jax.models.qwen2_5_vl.record import pixel_faults
from bis_jax.models.qwen3_vl.config import SIZES
from bis_jax.models.qwen3_vl.flops import STAGES, vision_rows
from bis_jax.models.qwen3_vl.hub_files import preprocessor_json
from bis_jax.models.qwen3_vl.hub_layout import layout
from bis_jax.models.qwen3_vl.images import UNIT, Qwen3Images
from bis_jax.models.qwen3_vl.model import Qwen3VL
from bis_jax.models.setting import Setting
from bis_jax.parallel.sharding import P

_SHARDING = (
  (r"blocks\..*\.(qkv|fc1)\.kernel$", P(None, "fsdp", "tensor")),
  (r"blocks\..*\.(proj|fc2)\.kernel$", P(None, "tensor", "fsdp")),
  (r"patch_embed\.proj\.kernel$", P("fsdp", "tensor")),
  (r"pos_embed\.embedding$", P(None, "fsdp")),
  (r"\.merger\.fc1\.kernel$", P("fsdp", "tensor")),
  (r"\.merger\.fc2\.kernel$", P("tensor", "fsdp")),
  (r"deepstack_merger_list\.fc1\.kernel$", P(None, "fsdp", "tensor")),
  (r"deepstack_merger_list\.fc2\.kernel$", P(None, "tensor", "fsdp")),
)

_SETTINGS = {
  "min_pixels": Setting(64 * UNIT**2, ">= 1", "of an image after the resize", toy=UNIT**2),
  "max_pixels": Setting(
    1280 * UNIT**2, f">= {UNIT**2}", f"likewise; {UNIT**2} per image token", toy=160**2
  ),
}


QWEN3_VL = Backbone(
  name="qwen3_vl",
  sizes=SIZES,
  model=Qwen3VL,
  sharding=_SHARDING,
  tower=r"visual\.(?!merger|deepstack)",
  stages=STAGES,
  vision_rows=vision_rows,
  load_tokenizer=load_tokenizer,
  make_prompt=lambda tokenizer, separator, own: QwenPrompt(tokenizer, separator=separator),
  make_images=lambda model, own: Qwen3Images(own.min_pixels, own.max_pixels),
  # Of 4,026 rollouts 12 % less than Qwen2.5-VL in the same packing (benchmarks/packing.py), and 11
  # tokens less, of its system prompt.
  rollout_tokens=534,
  prefix_tokens=266,
  settings=_SETTINGS,
  config_faults=functools.partial(pixel_faults, "qwen3_vl", UNIT),
  row_patches=22_784,
  toy_row_patches=128,
  checkpoint="Qwen/Qwen3-VL-8B-Instruct",
  layout=layout,
  config_json=config_json,
  preprocessor_json=preprocessor_json,
  serving_files=lambda model, processor, base: {},
  is_plain=lambda model, base: True,
  published=lambda raw: {},
  card="qwen3_vl/card.md",
  refused=dict.fromkeys(
    ("30b-a3b", "235b-a22b"), "its decoder mixes experts, which is not implemented"
  ),
)
