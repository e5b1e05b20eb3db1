"""Sizes of InternVL2.5 and InternVL3, as frozen dataclasses with Hugging Face's field names."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """The decoder.

  Attributes:
    vocab_size: rows of the embedding table; the step marker's, which the published checkpoints lack,
      is the last.
    architecture: "internlm2" or "qwen2": how a published checkpoint names and cuts its tensors.
    attention_bias: on queries, keys and values.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  architecture: str = "internlm2"
  attention_bias: bool = False
  rope_theta: float = 1e6
  rms_norm_eps: float = 1e-5

  def __post_init__(self):
    if self.architecture not in ("internlm2", "qwen2"):
      raise ValueError(f"architecture is {self.architecture!r}, not 'internlm2' or 'qwen2'")
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f"{self.num_attention_heads} query heads do not divide over "
        f"{self.num_key_value_heads} key heads"
      )

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The vision tower; the defaults are InternViT-300M-448px-V2.5.

  Attributes:
    qkv_bias: on queries, keys and values.
    qk_normalization: RMSNorm over all heads of the queries and of the keys.
  """

  num_hidden_layers: int = 24
  hidden_size: int = 1024
  intermediate_size: int = 4096
  num_attention_heads: int = 16
  image_size: int = 448
  patch_size: int = 14
  num_channels: int = 3
  qkv_bias: bool = True
  qk_normalization: bool = False
  layer_norm_eps: float = 1e-6

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_attention_heads

  @property
  def side(self) -> int:
    """Patches along a side of a tile."""
    return self.image_size // self.patch_size

  @property
  def patch_values(self) -> int:
    return self.num_channels * self.patch_size**2


# Fields that a Hugging Face config holds under the same name.
_TEXT_FIELDS = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
  "rms_norm_eps",
)
_VISION_FIELDS = (
  "num_hidden_layers",
  "hidden_size",
  "intermediate_size",
  "num_attention_heads",
  "num_channels",
  "layer_norm_eps",
)


@dataclasses.dataclass(frozen=True)
class InternVLConfig:
  """A whole model and how it is computed.

  Attributes:
    text: the decoder.
    vision: the vision tower.
    tie_word_embeddings: whether the LM head of the published checkpoint is its embedding table.
    dtype: of activations and matrix products, "float32" or "bfloat16". Norm statistics, softmax,
      rotary embedding and the two logits are float32 in either.
    param_dtype: of the parameters.
    remat: what the backward pass recomputes; see `layers.rematerialised`.
    attention: backend of `attention.attention`.
    drop_path: in training, the share of tiles that leave out a branch of the tower's last layer,
      growing to that linearly from 0 at the first. The released run trained with 0.1 by accident,
      in a tower frozen otherwise. Acts where a batch holds a `drop_path_key`.
  """

  text: TextConfig
  vision: VisionConfig
  tie_word_embeddings: bool = False
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = "none"
  attention: str = "auto"
  drop_path: float = 0.0

  @classmethod
  def tiny(cls, vocab_size: int = 512, architecture: str = "internlm2") -> "InternVLConfig":
    """The smallest model that has every part, with tiles of 56 x 56 pixels; for tests."""
    return cls(
      text=TextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        architecture=architecture,
        attention_bias=architecture == "qwen2",
      ),
      vision=VisionConfig(
        num_hidden_layers=3,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        image_size=56,
      ),
    )

  @classmethod
  def toy(cls, vocab_size: int) -> "InternVLConfig":
    """A model for the embedded corpus, pre-trained and trained in minutes on two CPU cores.

    A picture of the corpus, 112 x 112 pixels, makes four tiles and the thumbnail.
    """
    return cls(
      text=TextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        architecture="qwen2",
        attention_bias=True,
      ),
      vision=VisionConfig(
        num_hidden_layers=1,
        hidden_size=48,
        intermediate_size=96,
        num_attention_heads=4,
        image_size=56,
      ),
    )

  @classmethod
  def internvl2_5_8b(cls) -> "InternVLConfig":
    """InternVL2.5-8B: InternViT-300M and InternLM2.5-7B."""
    return cls(
      text=TextConfig(
        vocab_size=92554,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
      ),
      vision=VisionConfig(),
      dtype="bfloat16",
    )

  @classmethod
  def internvl3_8b(cls) -> "InternVLConfig":
    """InternVL3-8B: InternViT-300M and Qwen2.5-7B."""
    return cls(
      text=TextConfig(
        vocab_size=151675,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        architecture="qwen2",
        attention_bias=True,
        rms_norm_eps=1e-6,
      ),
      vision=VisionConfig(),
      dtype="bfloat16",
    )

  @classmethod
  def internvl3_14b(cls) -> "InternVLConfig":
    """InternVL3-14B: InternViT-300M and Qwen2.5-14B."""
    return cls(
      text=TextConfig(
        vocab_size=151675,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        architecture="qwen2",
        attention_bias=True,
        rms_norm_eps=1e-6,
      ),
      vision=VisionConfig(),
      dtype="bfloat16",
    )

  @classmethod
  def from_hugging_face(cls, raw: Mapping[str, Any]) -> "InternVLConfig":
    """Returns the architecture that a `config.json` describes, the hub's or Transformers' own.

    `vocab_size` is that of the file. Rope scaling is read past: it changes positions beyond
    32,768 only.

    Raises:
      ValueError: it is no InternVL, or one of a form that is not implemented here.
    """
    if raw["model_type"] not in ("internvl_chat", "internvl"):
      raise ValueError(f"model_type is {raw['model_type']!r}, not 'internvl_chat' or 'internvl'")
    hub = raw["model_type"] == "internvl_chat"
    text, vision = raw["llm_config" if hub else "text_config"], raw["vision_config"]
    architecture = text["model_type"]
    rope = text.get("rope_parameters") or {}
    config = cls(
      text=TextConfig(
        **{field: text[field] for field in _TEXT_FIELDS},
        architecture=architecture,
        attention_bias=architecture == "qwen2",
        rope_theta=rope.get("rope_theta", text.get("rope_theta")),
      ),
      vision=VisionConfig(
        **{field: vision[field] for field in _VISION_FIELDS},
        image_size=_side(vision["image_size"]),
        patch_size=_side(vision["patch_size"]),
        qkv_bias=vision["qkv_bias" if hub else "attention_bias"],
        qk_normalization=vision["qk_normalization" if hub else "use_qk_norm"],
      ),
      tie_word_embeddings=raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
    )
    expected = {
      "norm_type": ("layer_norm", vision.get("norm_type", "layer_norm")),
      "hidden_act of the tower": ("gelu", vision.get("hidden_act", "gelu")),
      "hidden_act of the decoder": ("silu", text.get("hidden_act", "silu")),
      "bias of the decoder": (False, text.get("bias", False)),
      "use_sliding_window": (False, text.get("use_sliding_window", False)),
      "downsample_ratio": (0.5, raw.get("downsample_ratio", 0.5)),
      "ps_version": ("v2", raw.get("ps_version", "v2")),
      "select_layer": (-1, raw.get("select_layer", raw.get("vision_feature_layer", -1))),
    }
    for name, (implemented, found) in expected.items():
      if implemented != found:
        raise ValueError(f"{name} is {found!r}; only {implemented!r} is implemented")
    return config

  def to_hugging_face(self, layout: str = "hub") -> dict[str, Any]:
    """Returns the `config.json` of this architecture; ids and the release's code are left out.

    Args:
      layout: "hub", or "hf" for Transformers' own InternVL class, which knows the Qwen2.5 text
        side.
    """
    text = {field: getattr(self.text, field) for field in _TEXT_FIELDS}
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
      vision |= {"use_qk_norm": self.vision.qk_normalization, "norm_type": "layer_norm"}
      return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "tie_word_embeddings": self.tie_word_embeddings,
        "vision_feature_layer": -1,
        "text_config": text,
        "vision_config": vision,
      }
    if self.text.architecture == "internlm2":
      text["bias"] = False
    vision |= {"model_type": "intern_vit_6b", "hidden_act": "gelu", "norm_type": "layer_norm"}
    for field in ("image_size", "patch_size", "qkv_bias", "qk_normalization"):
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
  """Returns the side of a square given as one number or two."""
  sides = size if isinstance(size, list | tuple) else [size]
  if len(set(sides)) != 1:
    raise ValueError(f"image and patch sizes must be square, not {size}")
  return sides[0]
