"""Sizes of Qwen3-VL's dense models, as frozen dataclasses with Hugging Face's field names."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from bis_jax.models import model_config
from bis_jax.models.model_config import TEXT_FIELDS, ModelConfig, check_implemented, shared_fields

_TEXT_FIELDS = [*TEXT_FIELDS, "head_dim"]


@dataclasses.dataclass(frozen=True)
class TextConfig(model_config.TextConfig):
  """The decoder; of half a head's frequencies, `mrope_section` read time, height and width."""

  rope_theta: float = 5e6
  head_dim: int = 128  # pyrefly: ignore  # of its own here, not that of the widths
  mrope_section: tuple[int, int, int] = (24, 20, 20)

  def __post_init__(self):
    super().__post_init__()
    if 2 * sum(self.mrope_section) != self.head_dim:
      raise ValueError(
        f"mrope_section {self.mrope_section} must add up to half of the head dim {self.head_dim}"
      )

  @property
  def attention_bias(self) -> bool:
    return False

  @property
  def qk_norm(self) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The vision tower; states after the blocks `deepstack_visual_indexes` are features, too."""

  depth: int = 27
  hidden_size: int = 1152
  intermediate_size: int = 4304
  num_heads: int = 16
  num_position_embeddings: int = 2304
  deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
  in_channels: int = 3
  patch_size: int = 16
  temporal_patch_size: int = 2
  spatial_merge_size: int = 2
  layer_norm_eps: float = 1e-6
  rope_theta: float = 1e4

  def __post_init__(self):
    indexes = self.deepstack_visual_indexes
    if list(indexes) != sorted({*indexes} & {*range(self.depth)}):
      raise ValueError(f"deepstack_visual_indexes {indexes} must ascend below depth {self.depth}")

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def patch_values(self) -> int:
    return self.in_channels * self.temporal_patch_size * self.patch_size**2

  @property
  def grid_side(self) -> int:
    """Learned positions along a side."""
    return math.isqrt(self.num_position_embeddings)


_VISION_FIELDS = shared_fields(
  VisionConfig, "deepstack_visual_indexes", "layer_norm_eps", "rope_theta"
)


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig(ModelConfig):
  text: TextConfig
  vision: VisionConfig
  backbone: str = "qwen3_vl"

  @classmethod
  def from_hugging_face(cls, raw: Mapping[str, Any]) -> "Qwen3VLConfig":
    text, vision = raw["text_config"], raw["vision_config"]
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    config = cls(
      text=TextConfig(
        **{field: text[field] for field in _TEXT_FIELDS},
        mrope_section=tuple(rope["mrope_section"]),
        rope_theta=rope.get("rope_theta", text.get("rope_theta")),
      ),
      vision=VisionConfig(
        **{field: vision[field] for field in _VISION_FIELDS},
        deepstack_visual_indexes=tuple(vision["deepstack_visual_indexes"]),
      ),
      tie_word_embeddings=raw.get("tie_word_embeddings", False),
    )
    expected = {
      "model_type": ("qwen3_vl", raw["model_type"]),
      "rope_type": ("default", rope.get("rope_type", "default")),
      "out_hidden_size": (config.text.hidden_size, vision["out_hidden_size"]),
      "attention_bias": (False, text.get("attention_bias", False)),
      "hidden_act of the decoder": ("silu", text.get("hidden_act", "silu")),
      "hidden_act of the tower": ("gelu_pytorch_tanh", vision["hidden_act"]),
    }
    check_implemented(expected)
    return config

  def to_hugging_face(self) -> dict[str, Any]:
    """Returns the `config.json` of this architecture, for plain Transformers; ids are left out."""
    rope = {"rope_type": "default", "mrope_section": list(self.text.mrope_section)}
    rope |= {"mrope_interleaved": True}
    return {
      "architectures": ["Qwen3VLForConditionalGeneration"],
      "model_type": "qwen3_vl",
      "tie_word_embeddings": self.tie_word_embeddings,
      "text_config": {
        "model_type": "qwen3_vl_text",
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": 262_144,
        "rope_parameters": rope | {"rope_theta": self.text.rope_theta},
        # Transformers 4.57 and the release read these two.
        "rope_scaling": rope,
        "rope_theta": self.text.rope_theta,
        **{field: getattr(self.text, field) for field in _TEXT_FIELDS},
      },
      "vision_config": {
        "model_type": "qwen3_vl",
        "hidden_act": "gelu_pytorch_tanh",
        "out_hidden_size": self.text.hidden_size,
        "deepstack_visual_indexes": list(self.vision.deepstack_visual_indexes),
        **{field: getattr(self.vision, field) for field in _VISION_FIELDS},
      },
    }


_SMALL_VISION = VisionConfig(24, 1024, 4096, deepstack_visual_indexes=(5, 11, 17))
_TINY_VISION = VisionConfig(4, 32, 48, 2, 36, (1, 2))
_TOY_VISION = VisionConfig(1, 48, 96, 4, 64, (0,))
SIZES = {
  # The smallest model that has every part, for tests.
  "tiny": Qwen3VLConfig(
    TextConfig(0, 64, 96, 3, 4, 2, head_dim=32, mrope_section=(6, 5, 5)), _TINY_VISION
  ),
  # For the toy corpus: pre-trained and trained in minutes on two CPU cores.
  "toy": Qwen3VLConfig(
    TextConfig(0, 64, 192, 3, 4, 2, head_dim=16, mrope_section=(4, 2, 2)), _TOY_VISION
  ),
  # With heads of 32: vLLM has no attention of 16 on a CPU.
  "toy32": Qwen3VLConfig(
    TextConfig(0, 128, 256, 3, 4, 2, head_dim=32, mrope_section=(6, 5, 5)), _TOY_VISION
  ),
  "2b": Qwen3VLConfig(
    TextConfig(151936, 2048, 6144, 28, 16, 8),
    _SMALL_VISION,
    tie_word_embeddings=True,
    dtype="bfloat16",
  ),
  "4b": Qwen3VLConfig(
    TextConfig(151936, 2560, 9728, 36, 32, 8),
    _SMALL_VISION,
    tie_word_embeddings=True,
    dtype="bfloat16",
  ),
  "8b": Qwen3VLConfig(TextConfig(151936, 4096, 12288, 36, 32, 8), VisionConfig(), dtype="bfloat16"),
  "32b": Qwen3VLConfig(
    TextConfig(151936, 5120, 25600, 64, 64, 8), VisionConfig(), dtype="bfloat16"
  ),
}
