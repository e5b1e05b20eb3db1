"""Sizes of Qwen2.5-VL, as frozen dataclasses with the field names of Hugging Face's config."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """The decoder. `mrope_section` splits half a head's frequencies into time, height and width."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  mrope_section: tuple[int, int, int] = (16, 24, 24)
  rope_theta: float = 1e6
  rms_norm_eps: float = 1e-6

  def __post_init__(self):
    if 2 * sum(self.mrope_section) != self.head_dim:
      raise ValueError(
        f"mrope_section {self.mrope_section} must add up to half of the head dim {self.head_dim}"
      )
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f"{self.num_attention_heads} query heads do not divide over "
        f"{self.num_key_value_heads} key heads"
      )

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_attention_heads

  @property
  def attention_bias(self) -> bool:
    """On queries, keys and values."""
    return True


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The vision tower: the last block of every `full_attention_period` sees whole images."""

  depth: int = 32
  hidden_size: int = 1280
  intermediate_size: int = 3420
  num_heads: int = 16
  full_attention_period: int = 8
  in_channels: int = 3
  patch_size: int = 14
  temporal_patch_size: int = 2
  spatial_merge_size: int = 2
  window_size: int = 112
  rope_theta: float = 1e4
  rms_norm_eps: float = 1e-6

  def __post_init__(self):
    if self.depth % self.full_attention_period:
      raise ValueError(
        f"depth {self.depth} must be a multiple of full_attention_period "
        f"{self.full_attention_period}"
      )

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def patch_values(self) -> int:
    return self.in_channels * self.temporal_patch_size * self.patch_size**2

  @property
  def fullatt_block_indexes(self) -> tuple[int, ...]:
    return tuple(range(self.full_attention_period - 1, self.depth, self.full_attention_period))


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
  "depth",
  "hidden_size",
  "intermediate_size",
  "num_heads",
  "patch_size",
  "temporal_patch_size",
  "spatial_merge_size",
  "window_size",
)


@dataclasses.dataclass(frozen=True)
class Qwen2_5_VLConfig:
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
  """

  text: TextConfig
  vision: VisionConfig
  tie_word_embeddings: bool = False
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = "none"
  attention: str = "auto"

  @classmethod
  def tiny(cls, vocab_size: int = 512) -> "Qwen2_5_VLConfig":
    """The smallest model that has every part; for tests."""
    return cls(
      text=TextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(2, 3, 3),
      ),
      vision=VisionConfig(
        depth=4, hidden_size=32, intermediate_size=48, num_heads=2, full_attention_period=2
      ),
    )

  @classmethod
  def toy(cls, vocab_size: int) -> "Qwen2_5_VLConfig":
    """A model for the embedded corpus, pre-trained and trained in minutes on two CPU cores."""
    return cls(
      text=TextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(2, 3, 3),
      ),
      vision=VisionConfig(
        depth=1, hidden_size=48, intermediate_size=96, num_heads=4, full_attention_period=1
      ),
    )

  @classmethod
  def qwen_3b(cls) -> "Qwen2_5_VLConfig":
    """Qwen2.5-VL-3B-Instruct."""
    return cls(
      text=TextConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
      ),
      vision=VisionConfig(),
      tie_word_embeddings=True,
      dtype="bfloat16",
    )

  @classmethod
  def qwen_7b(cls) -> "Qwen2_5_VLConfig":
    """Qwen2.5-VL-7B-Instruct."""
    return cls(
      text=TextConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
      ),
      vision=VisionConfig(),
      dtype="bfloat16",
    )

  @classmethod
  def from_hugging_face(cls, raw: Mapping[str, Any]) -> "Qwen2_5_VLConfig":
    """Returns the architecture that a `config.json` describes, text keys nested or at the top.

    Raises:
      ValueError: it is no Qwen2.5-VL, or one of a form that is not implemented here.
    """
    text, vision = raw.get("text_config") or raw, raw["vision_config"]
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    period = vision["fullatt_block_indexes"][0] + 1
    config = cls(
      text=TextConfig(
        **{field: text[field] for field in _TEXT_FIELDS},
        mrope_section=tuple(rope["mrope_section"]),
        rope_theta=rope.get("rope_theta", text.get("rope_theta")),
      ),
      vision=VisionConfig(
        **{field: vision[field] for field in _VISION_FIELDS},
        in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
        full_attention_period=period,
      ),
      tie_word_embeddings=raw.get("tie_word_embeddings", False),
    )
    expected = {
      "model_type": ("qwen2_5_vl", raw["model_type"]),
      "out_hidden_size": (config.text.hidden_size, vision["out_hidden_size"]),
      "fullatt_block_indexes": (
        config.vision.fullatt_block_indexes,
        tuple(vision["fullatt_block_indexes"]),
      ),
      "use_sliding_window": (False, text.get("use_sliding_window", False)),
      "hidden_act": ("silu", text.get("hidden_act", "silu")),
    }
    for name, (implemented, found) in expected.items():
      if implemented != found:
        raise ValueError(f"{name} is {found!r}; only {implemented!r} is implemented")
    return config

  def to_hugging_face(self) -> dict[str, Any]:
    """Returns the `config.json` of this architecture, for plain Transformers; ids are left out."""
    text = {field: getattr(self.text, field) for field in _TEXT_FIELDS}
    vision = {field: getattr(self.vision, field) for field in _VISION_FIELDS}
    rope = {"rope_type": "default", "rope_theta": self.text.rope_theta}
    return {
      "architectures": ["Qwen2_5_VLForConditionalGeneration"],
      "model_type": "qwen2_5_vl",
      "tie_word_embeddings": self.tie_word_embeddings,
      "text_config": {
        "model_type": "qwen2_5_vl_text",
        "hidden_act": "silu",
        "max_position_embeddings": 128_000,
        "use_sliding_window": False,
        "rope_parameters": {**rope, "mrope_section": list(self.text.mrope_section)},
        **text,
      },
      "vision_config": {
        "model_type": "qwen2_5_vl_vision",
        "hidden_act": "silu",
        "in_channels": self.vision.in_channels,
        "fullatt_block_indexes": list(self.vision.fullatt_block_indexes),
        "out_hidden_size": self.text.hidden_size,
        "tokens_per_second": 2,
        **vision,
      },
    }
