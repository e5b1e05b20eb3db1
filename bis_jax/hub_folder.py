"""A model as a Hugging Face folder: weights, config, tokenizer, image processor, model card."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bis_jax.inputs.images import QwenImages
from bis_jax.inputs.prompt import special_tokens
from bis_jax.models import weights
from bis_jax.models.qwen2_5_vl import Qwen2_5_VLConfig


def write(
  out: pathlib.Path,
  params: Mapping[str, jax.Array],
  config: Qwen2_5_VLConfig,
  tokenizer: PreTrainedTokenizerBase,
  images: QwenImages,
  *,
  base: pathlib.Path | None,
  dtype: str,
  card: str,
  tied: bool = False,
) -> None:
  """Writes a model as a folder that plain Transformers loads.

  Args:
    out: a folder that does not exist or is empty.
    params: every parameter by path, on devices of this process.
    config: the model's.
    tokenizer: with the step marker.
    images: the pixel limits that the model was trained with.
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
  special = special_tokens(tokenizer)
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
  tokenizer.save_pretrained(out)
  processor = Qwen2VLImageProcessorPil(min_pixels=images.min_pixels, max_pixels=images.max_pixels)
  processor_class = {"processor_class": "Qwen2_5_VLProcessor"}
  _write_json(out / "preprocessor_config.json", processor.to_dict() | processor_class)
  _write_json(out / "config.json", hugging_face_config(config, tokenizer, dtype))
  (out / "README.md").write_text(card, encoding="utf-8")


def hugging_face_config(
  config: Qwen2_5_VLConfig, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> dict[str, Any]:
  """Returns the content of config.json.

  The LM head is never tied, because its two reward rows are apart from the embedding.
  """
  special = special_tokens(tokenizer)
  content = config.to_hugging_face() | {
    "tie_word_embeddings": False,
    "dtype": dtype,
    "image_token_id": special.image_pad,
    "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    "vision_start_token_id": special.vision_start,
    "vision_end_token_id": special.vision_end,
    "step_marker_token_id": special.prm,  # read back by `weights.load`; Transformers keeps it
  }
  content["text_config"] |= {
    "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
  }
  return content


def _write_json(path: pathlib.Path, content: Any) -> None:
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
