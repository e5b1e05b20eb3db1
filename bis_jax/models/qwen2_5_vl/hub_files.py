"""The JSON files of an exported Qwen2.5-VL."""

from collections.abc import Mapping
from typing import Any

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bis_jax.models.backbone import Processor
from bis_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from bis_jax.models.qwen2_5_vl.images import QwenImages


def config_json(
  config: Qwen2_5_VLConfig, processor: Processor, base: Mapping[str, Any]
) -> dict[str, Any]:
  special, tokenizer = processor.prompt.special, processor.tokenizer
  token_id = tokenizer.convert_tokens_to_ids
  content = config.to_hugging_face() | {
    "image_token_id": special.image_pad,
    "video_token_id": token_id("<|video_pad|>"),
    "vision_start_token_id": special.vision_start,
    "vision_end_token_id": special.vision_end,
  }
  content["text_config"] |= {
    "bos_token_id": token_id("<|endoftext|>"),
    "eos_token_id": token_id("<|im_end|>"),
  }
  return content


def preprocessor_json(images: QwenImages) -> dict[str, Any]:
  limits = {"min_pixels": images.min_pixels, "max_pixels": images.max_pixels}
  # Transformers 4.57 ignores `size` and reads these limits, 5 either.
  return (
    Qwen2VLImageProcessorPil(**limits).to_dict()
    | limits
    | {"processor_class": "Qwen2_5_VLProcessor"}
  )
