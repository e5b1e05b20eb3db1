"""Sizes of Qwen2.5-VL, as frozen dataclasses with the field names of Hugging Face's config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from bis_jax.models import model_config
from bis_jax.models.model_config import TEXT_FIELDS, ModelConfig, check_implemented, shared_fields


@dataclasses.dataclass(frozen=True)
class TextConfig(model_config.TextConfig):
  """The decoder. `mrope_section` splits half a head's frequencies into time, height and width."""

  mrope_section: tuple[int, int, int] = (16, 24, 24)

  def __post_init__(self):
    super().__post_init__()
    if 2 * sum(self.mrope_section) != self.head_dim:
      raise ValueError(
        f"mrope_section {self.mrope_section} must add up to half of the head dim {self.head_dim}"
      )


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


_VISION_FIELDS = shared_fields(
  VisionConfig, "full_attention_period", "in_channels", "rope_theta", "rms_norm_eps"
)


@dataclasses.dataclass(frozen=True)
class Qwen2_5_VLConfig(ModelConfig):
  text: TextConfig
  vision: VisionConfig
  backbone: str = "qwen2_5_vl"

  @classmethod
  def from_hugging_face(cls, raw: Mapping[str, Any]) -> "Qwen2_5_VLConfig":
    # Older files hold the keys of the decoder at the top.
    text, vision = raw.get("text_config") or raw, raw["vision_config"]
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    period = vision["fullatt_block_indexes"][0] + 1
    config = cls(
      text=TextConfig(
        **{field: text[field] for field in TEXT_FIELDS},
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
    check_implemented(expected)
    return config

  def to_hugging_face(self) -> dict[str, Any]:
    """Returns the `config.json` of this architecture, for plain Transformers; ids are left out."""
    text = {field: getattr(self.text, field) for field in TEXT_FIELDS}
    vision = {field: getattr(self.vision, field) for field in _VISION_FIELDS}
    sections = {"mrope_section": list(self.text.mrope_section)}
    rope = {"rope_type": "default", "rope_theta": self.text.rope_theta, **sections}
    return {
      "architectures": ["Qwen2_5_VLForConditionalGeneration"],
      "model_type": "qwen2_5_vl",
      "tie_word_embeddings": self.tie_word_embeddings,
      "text_config": {
        "model_type": "qwen2_5_vl_text",
        "hidden_act": "silu",
        "max_position_embeddings": 128_000,
        "use_sliding_window": False,
        "rope_parameters": rope,
        # Transformers 4.57 and the release read these two.
        "rope_scaling": {"type": "mrope", **sections},
        "rope_theta": self.text.rope_theta,
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


_TINY_VISION = VisionConfig(
  depth=4, hidden_size=32, intermediate_size=48, num_heads=2, full_attention_period=2
)
_LARGE_VISION = VisionConfig(intermediate_size=3456)
_TOY_VISION = VisionConfig(
  depth=1, hidden_size=48, intermediate_size=96, num_heads=4, full_attention_period=1
)
SIZES = {
  # The smallest model that has every part, for tests.
  "tiny": Qwen2_5_VLConfig(TextConfig(0, 64, 96, 3, 4, 2, mrope_section=(2, 3, 3)), _TINY_VISION),
  # For the toy corpus: pre-trained and trained in minutes on two CPU cores.
  "toy": Qwen2_5_VLConfig(TextConfig(0, 64, 192, 3, 4, 2, mrope_section=(2, 3, 3)), _TOY_VISION),
  # With heads of 32: vLLM has no attention of 16 on a CPU.
  "toy32": Qwen2_5_VLConfig(TextConfig(0, 128, 256, 3, 4, 2, mrope_section=(4, 6, 6)), _TOY_VISION),
  "3b": Qwen2_5_VLConfig(
    TextConfig(151936, 2048, 11008, 36, 16, 2),
    VisionConfig(),
    tie_word_embeddings=True,
    dtype="bfloat16",
  ),
  "7b": Qwen2_5_VLConfig(
    TextConfig(152064, 3584, 18944, 28, 28, 4), VisionConfig(), dtype="bfloat16"
  ),
  "32b": Qwen2_5_VLConfig(
    TextConfig(152064, 5120, 27648, 64, 40, 8), _LARGE_VISION, dtype="bfloat16"
  ),
  "72b": Qwen2_5_VLConfig(
    TextConfig(152064, 8192, 29568, 80, 64, 8), _LARGE_VISION, dtype="bfloat16"
  ),
}
