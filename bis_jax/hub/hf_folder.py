"""A model as a Hugging Face folder: weights, config, tokenizer, image processor, model card."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bis_jax.hub import weights
from bis_jax.inputs import tiles
from bis_jax.models.backbones import ModelConfig
from bis_jax.models.internvl import InternVLConfig
from bis_jax.models.processor import Processor
from bis_jax.models.qwen2_5_vl import Qwen2_5_VLConfig


def write(
  out: pathlib.Path,
  params: Mapping[str, jax.Array],
  config: ModelConfig,
  processor: Processor,
  *,
  base: pathlib.Path | None,
  dtype: str,
  card: str,
  tied: bool = False,
) -> None:
  """Writes a model as a folder in the layout of `base`.

  Without a base the layout is one that plain Transformers loads, where there is one: InternVL with
  InternLM2.5 inside has only the release's, whose code loads it.

  Args:
    out: a folder that does not exist or is empty.
    params: every parameter by path, on devices of this process.
    config: the model's.
    processor: of text and images, as the model was trained with.
    base: checkpoint whose LM head has the rows other than `Yes` and `No`; None: they are zero.
    dtype: of the tensors, "float32", "bfloat16" or "float16".
    card: text of the model card.
    tied: the rows other than `Yes` and `No` are those of the embedding table.

  Raises:
    FileExistsError: `out` holds files.
  """
  if out.exists() and any(out.iterdir()):
    raise FileExistsError(f"{out} holds files: name a new or an empty folder, nothing was changed")
  out.mkdir(parents=True, exist_ok=True)
  _write_json(out / "config.json", hugging_face_config(config, processor, dtype, base))
  special = processor.prompt.special
  weights.save(
    out,
    params,
    config,
    yes_token=special.yes,
    no_token=special.no,
    base=base,
    dtype=dtype,
    tied=tied,
  )
  processor.tokenizer.save_pretrained(out)
  _write_json(out / "preprocessor_config.json", _preprocessor(processor))
  (out / "README.md").write_text(card, encoding="utf-8")


def hugging_face_config(
  config: ModelConfig, processor: Processor, dtype: str, base: pathlib.Path | None = None
) -> dict[str, Any]:
  """Returns the content of config.json.

  The LM head is never tied, because its two reward rows are apart from the embedding.
  """
  if isinstance(config, InternVLConfig):
    content = _internvl_config(config, processor, base)
  else:
    content = _qwen_config(config, processor)
  return content | {
    "tie_word_embeddings": False,
    "dtype": dtype,
    "step_marker_token_id": processor.prompt.special.prm,  # read back by `weights.load`
  }


def _qwen_config(config: Qwen2_5_VLConfig, processor: Processor) -> dict[str, Any]:
  special, token_id = processor.prompt.special, processor.tokenizer.convert_tokens_to_ids
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


def _internvl_config(
  config: InternVLConfig, processor: Processor, base: pathlib.Path | None
) -> dict[str, Any]:
  """What the base's config.json says beside ours, such as where the release's code is, stays."""
  layout = internvl_layout(config, base)
  content = config.to_hugging_face(layout)
  if layout == "hf":
    tokens = config.vision.side**2 // tiles.TOKEN_PATCHES
    content |= {"image_token_id": processor.prompt.special.image_pad, "image_seq_length": tokens}
  else:
    content |= {
      "dynamic_image_size": True,
      "force_image_size": config.vision.image_size,
      "max_dynamic_patch": processor.images.max_tiles,
      "min_dynamic_patch": 1,
      "use_thumbnail": True,
    }
  theirs = json.loads((base / "config.json").read_text()) if base else {}
  theirs.pop("torch_dtype", None)  # an older name of "dtype"
  parts = {
    key: theirs.get(key, {}) | value for key, value in content.items() if isinstance(value, dict)
  }
  return theirs | content | parts


def internvl_layout(config: InternVLConfig, base: pathlib.Path | None) -> str:
  """Returns "hf" for a folder that Transformers' own InternVL class loads, "hub" for the release's."""
  if base is None:
    return "hub" if config.text.architecture == "internlm2" else "hf"
  model_type = json.loads((base / "config.json").read_text())["model_type"]
  return "hf" if model_type == "internvl" else "hub"


def _preprocessor(processor: Processor) -> dict[str, Any]:
  images = processor.images
  if isinstance(images, tiles.InternVLImages):
    hugging_face = GotOcr2ImageProcessorPil(
      crop_to_patches=True,
      max_patches=images.max_tiles,
      size={"height": images.tile, "width": images.tile},
      image_mean=list(tiles.MEAN),
      image_std=list(tiles.STD),
    )
    return hugging_face.to_dict() | {"processor_class": "InternVLProcessor"}
  hugging_face = Qwen2VLImageProcessorPil(
    min_pixels=images.min_pixels, max_pixels=images.max_pixels
  )
  return hugging_face.to_dict() | {"processor_class": "Qwen2_5_VLProcessor"}


def _write_json(path: pathlib.Path, content: Any) -> None:
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
