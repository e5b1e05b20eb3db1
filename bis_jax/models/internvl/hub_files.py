"""The JSON files of an exported InternVL."""

import json
from collections.abc import Mapping
from typing import Any

from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from bis_jax.models.backbone import Processor
from bis_jax.models.internvl.config import InternVLConfig
from bis_jax.models.internvl.images import MEAN, STD, TOKEN_PATCHES, InternVLImages
from bis_jax.models.internvl.prompt import IMAGE_CONTEXT, IMAGE_END, IMAGE_START

_RELEASE = {  # classes of its code
  "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
  "AutoModel": "modeling_internvl_chat.InternVLChatModel",
}


def config_json(
  config: InternVLConfig, processor: Processor, base: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the base's config.json, which names the release's code, updated with ours."""
  if is_plain(config, base):
    content = config.to_hugging_face("hf") | {
      "image_token_id": processor.prompt.special.image_pad,
      "image_seq_length": config.vision.side**2 // TOKEN_PATCHES,
    }
  else:
    content = config.to_hugging_face("hub") | {
      "dynamic_image_size": True,
      "force_image_size": config.vision.image_size,
      "max_dynamic_patch": processor.images.max_tiles,
      "min_dynamic_patch": 1,
      "use_thumbnail": True,
      "auto_map": base.get("auto_map", _RELEASE),
    }
  theirs = {key: value for key, value in base.items() if key != "torch_dtype"}  # now "dtype"
  parts = {
    key: theirs.get(key, {}) | value for key, value in content.items() if isinstance(value, dict)
  }
  return theirs | content | parts


def is_plain(config: InternVLConfig, base: Mapping[str, Any]) -> bool:
  # An export has the layout of the base, if there is one. Transformers' InternVL supports the
  # Qwen2.5 decoder only.
  if not base:
    return config.text.architecture != "internlm2"
  return base["model_type"] == "internvl"


def preprocessor_json(images: InternVLImages) -> dict[str, Any]:
  processor = GotOcr2ImageProcessorPil(
    crop_to_patches=True,
    max_patches=images.max_tiles,
    size={"height": images.tile, "width": images.tile},
    image_mean=list(MEAN),
    image_std=list(STD),
  )
  return processor.to_dict() | {"processor_class": "InternVLProcessor"}


# A chat as our prompt: images, then the texts of the user and the assistant, each on a new line. vLLM
# sees by the loop over `message['content']` that parts are to be given as parts.
_CHAT = """\
{{ "<|im_start|>system\\n" + SYSTEM + "<|im_end|>\\n<|im_start|>user\\n<|im_end|>\\n<|im_start|>assistant\\n" }}
{%- set shown = namespace(images=0) %}
{%- for message in messages %}
{%- if message['content'] is string %}{{ "\\n" + message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == "image" %}{{ ("\\n" if shown.images else "") + "IMAGE" }}
{%- set shown.images = shown.images + 1 %}
{%- else %}{{ "\\n" + part['text'] }}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- endfor %}"""


def serving_files(
  config: InternVLConfig, processor: Processor, base: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns what vLLM reads with Transformers' InternVLProcessor; nothing for the release's code."""
  if not is_plain(config, base):
    return {}
  images, kind = processor.images, {"processor_class": "InternVLProcessor"}
  system = json.dumps(processor.prompt.system, ensure_ascii=False)
  return {
    "chat_template.jinja": _CHAT.replace("IMAGE", IMAGE_CONTEXT).replace("SYSTEM", system),
    "processor_config.json": kind | {"image_seq_length": config.vision.side**2 // TOKEN_PATCHES},
    "video_preprocessor_config.json": kind
    | {"video_processor_type": "InternVLVideoProcessor"}
    | {"size": {"height": images.tile, "width": images.tile}},
    "tokenizer_config.json": {
      "extra_special_tokens": {
        "start_image_token": IMAGE_START,
        "end_image_token": IMAGE_END,
        "context_image_token": IMAGE_CONTEXT,
        "video_token": "<|video_pad|>",  # of Qwen2.5; never in a prompt
      }
    },
  }
