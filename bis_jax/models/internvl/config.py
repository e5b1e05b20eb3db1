"""Sizes of InternVL2.5 and InternVL3, as frozen dataclasses with Hugging Face's field names."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from bis_jax.models import model_config
from bis_jax.models.model_config import TEXT_FIELDS, ModelConfig, check_implemented, shared_fields


@dataclasses.dataclass(frozen=True)
class TextConfig(model_config.TextConfig):
  # The last of the `vocab_size` rows is the step marker's, which published checkpoints lack.
  architecture: str = "internlm2"  # or "qwen2": names and fusion of tensors in checkpoints, biases
  rms_norm_eps: float = 1e-5

  def __post_init__(self):
    super().__post_init__()
    if self.architecture not in ("internlm2", "qwen2"):
      raise ValueError(f"architecture is {self.architecture!r}, not 'internlm2' or 'qwen2'")

  @property
  def attention_bias(self) -> bool:
    return self.architecture == "qwen2"


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The vision tower; the defaults are InternViT-300M-448px-V2.5."""

  num_hidden_layers: int = 24
  hidden_size: int = 1024
  intermediate_size: int = 4096
  num_attention_heads: int = 16
  image_size: int = 448
  patch_size: int = 14
  num_channels: int = 3
  qkv_bias: bool = True  # on queries, keys and values
  qk_normalization: bool = False  # RMSNorm over all heads of the queries and of the keys
  layer_norm_eps: float = 1e-6
  norm_type: str = "layer_norm"  # or "rms_norm"

  def __post_init__(self):
    if self.norm_type not in ("layer_norm", "rms_norm"):
      raise ValueError(f"norm_type is {self.norm_type!r}, not 'layer_norm' or 'rms_norm'")

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_attention_heads

  @property
  def side(self) -> int:
    return self.image_size // self.patch_size  # patches along a side of a tile

  @property
  def patch_values(self) -> int:
    return self.num_channels * self.patch_size**2


_VISION_FIELDS = shared_fields(
  VisionConfig, "image_size", "patch_size", "qkv_bias", "qk_normalization", "norm_type"
)


@dataclasses.dataclass(frozen=True)
class InternVLConfig(ModelConfig):
  text: TextConfig
  vision: VisionConfig
  backbone: str = "internvl"
  # In training, the share of tiles that leave out a branch of the tower's last layer, increasing to
  # that linearly from 0 at the first. The released run trained with 0.1 by accident, in an otherwise
  # frozen tower.
  drop_path: float = 0.0

  @property
  def needs_random_key(self) -> bool:
    return self.drop_path > 0 or super().needs_random_key

  @classmethod
  def from_hugging_face(cls, raw: Mapping[str, Any]) -> "InternVLConfig":
    # Rope scaling is ignored: it changes positions beyond 32,768 only.
    if raw["model_type"] not in ("internvl_chat", "internvl"):
      raise ValueError(f"model_type is {raw['model_type']!r}, not 'internvl_chat' or 'internvl'")
    hub = raw["model_type"] == "internvl_chat"
    text, vision = raw["llm_config" if hub else "text_config"], raw["vision_config"]
    rope = text.get("rope_parameters") or {}
    config = cls(
      text=TextConfig(
        **{field: text[field] for field in TEXT_FIELDS},
        architecture=text["model_type"],
        rope_theta=rope.get("rope_theta", text.get("rope_theta")),
      ),
      vision=VisionConfig(
        **{field: vision[field] for field in _VISION_FIELDS},
        image_size=_side(vision["image_size"]),
        patch_size=_side(vision["patch_size"]),
        qkv_bias=vision["qkv_bias" if hub else "attention_bias"],
        qk_normalization=vision["qk_normalization" if hub else "use_qk_norm"],
        norm_type=vision.get("norm_type", "layer_norm"),
      ),
      tie_word_embeddings=raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
    )
    expected = {
      "hidden_act of the tower": ("gelu", vision.get("hidden_act", "gelu")),
      "hidden_act of the decoder": ("silu", text.get("hidden_act", "silu")),
      "bias of the decoder": (False, text.get("bias", False)),
      "use_sliding_window": (False, text.get("use_sliding_window", False)),
      "downsample_ratio": (0.5, raw.get("downsample_ratio", 0.5)),
      "ps_version": ("v2", raw.get("ps_version", "v2")),
      "select_layer": (-1, raw.get("select_layer", raw.get("vision_feature_layer", -1))),
    }
    check_implemented(expected)
    return config

  def to_hugging_face(self, layout: str = "hub") -> dict[str, Any]:
    """Returns the `config.json` of this architecture, without ids; "hf" is Transformers' own."""
    text = {field: getattr(self.text, field) for field in TEXT_FIELDS}
    vision = {field: getattr(self.vision, field) for field in _VISION_FIELDS}
    text |= {
      "model_type": self.text.architecture,
      "hidden_act": "silu",
      "max_position_embeddings": 32768,
      "rope_theta": self.text.rope_theta,
      "tie_word_embeddings": self.tie_word_embeddings,
    }
    if layout == "hf":
      size, patch = self.vision.image_size, self.vision.patch_size
      vision |= {"model_type": "internvl_vision", "hidden_act": "gelu"}
      vision |= {"image_size": [size, size], "patch_size": [patch, patch]}
      vision |= {"attention_bias": self.vision.qkv_bias}
      vision |= {"use_qk_norm": self.vision.qk_normalization}
      vision |= {"norm_type": self.vision.norm_type}
      return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "tie_word_embeddings": self.tie_word_embeddings,
        "vision_feature_layer": -1,
        "text_config": text,
        "vision_config": vision,
      }
    text["architectures"] = ["Qwen2ForCausalLM"]
    if self.text.architecture == "internlm2":
      text |= {"architectures": ["InternLM2ForCausalLM"], "bias": False}
    vision |= {"architectures": ["InternVisionModel"]}
    vision |= {"model_type": "intern_vit_6b", "hidden_act": "gelu"}
    for field in ("image_size", "patch_size", "qkv_bias", "qk_normalization", "norm_type"):
      vision[field] = getattr(self.vision, field)
    return {
      "architectures": ["InternVLChatModel"],
      "model_type": "internvl_chat",
      "downsample_ratio": 0.5,
      "ps_version": "v2",
      "select_layer": -1,
      "template": "internvl2_5",
      "tie_word_embeddings": self.tie_word_embeddings,
      "llm_config": text,
      "vision_config": vision,
    }


def _side(size: int | list[int]) -> int:
  sides = size if isinstance(size, list | tuple) else [size]
  if len(set(sides)) != 1:
    raise ValueError(f"image and patch sizes must be square, not {size}")
  return sides[0]


_QWEN2 = functools.partial(TextConfig, 151675, architecture="qwen2", rms_norm_eps=1e-6)
_INTERNVIT_6B = VisionConfig(
  45, 3200, 12800, 25, qkv_bias=False, qk_normalization=True, norm_type="rms_norm"
)


def _released(text: TextConfig, vision: VisionConfig = VisionConfig()) -> InternVLConfig:  # noqa: B008
  return InternVLConfig(text, vision, dtype="bfloat16")


SIZES = {
  # The smallest model that has every part, with tiles of 56 x 56 pixels, for tests.
  "tiny": InternVLConfig(TextConfig(0, 64, 96, 3, 4, 2), VisionConfig(3, 32, 48, 4, image_size=56)),
  # For the toy corpus, whose pictures of 112 x 112 pixels make four tiles and the thumbnail.
  "toy": InternVLConfig(
    TextConfig(0, 64, 192, 3, 4, 2, architecture="qwen2"), VisionConfig(1, 48, 96, 4, image_size=56)
  ),
  "toy32": InternVLConfig(  # as that of Qwen2.5-VL
    TextConfig(0, 128, 256, 3, 4, 2, architecture="qwen2"),
    VisionConfig(1, 48, 96, 4, image_size=56),
  ),
  # InternViT-300M, or InternViT-6B from 26B on, with InternLM2.5 and Qwen2.5 of about the size's name.
  "2.5-1b": _released(_QWEN2(896, 4864, 24, 14, 2)),
  "2.5-2b": _released(TextConfig(92554, 2048, 8192, 24, 16, 8)),
  "2.5-4b": _released(_QWEN2(2048, 11008, 36, 16, 2)),
  "2.5-8b": _released(TextConfig(92554, 4096, 14336, 32, 32, 8)),
  "2.5-26b": _released(TextConfig(92554, 6144, 16384, 48, 48, 8), _INTERNVIT_6B),
  "2.5-38b": _released(_QWEN2(5120, 27648, 64, 40, 8), _INTERNVIT_6B),
  "2.5-78b": _released(_QWEN2(8192, 29568, 80, 64, 8), _INTERNVIT_6B),
  "3-1b": _released(_QWEN2(896, 4864, 24, 14, 2)),
  "3-2b": _released(_QWEN2(1536, 8960, 28, 12, 2)),
  "3-8b": _released(_QWEN2(3584, 18944, 28, 28, 4)),
  "3-14b": _released(_QWEN2(5120, 13824, 48, 40, 8)),
  "3-38b": _released(_QWEN2(5120, 27648, 64, 40, 8), _INTERNVIT_6B),
  "3-78b": _released(_QWEN2(8192, 29568, 80, 64, 8), _INTERNVIT_6B),
}
