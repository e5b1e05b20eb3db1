"""The JSON files of an exported Qwen3-VL; `config.json` has the ids of Qwen2.5-VL's."""

from typing import Any

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bis_jax.models.qwen3_vl.images import MEAN, PATCH, STD, Qwen3Images


def preprocessor_json(images: Qwen3Images) -> dict[str, Any]:
  limits = {"min_pixels": images.min_pixels, "max_pixels": images.max_pixels}
  own = {"patch_size": PATCH, "image_mean": MEAN, "image_std": STD}
  # Transformers 4.57 ignores `size` and reads the limits, 5 either.
  return (
    Qwen2VLImageProcessorPil(**limits, **own).to_dict()
    | limits
    | {"processor_class": "Qwen3VLProcessor"}
  )
