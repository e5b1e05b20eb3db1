"""What every backbone's model config holds; field names are those of Hugging Face's configs."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Self


@dataclasses.dataclass(frozen=True)
class TextConfig:
  vocab_size: int  # in tables of sizes, 0 means the tokenizer's
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  rope_theta: float = 1e6
  rms_norm_eps: float = 1e-6

  def __post_init__(self):
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f"{self.num_attention_heads} query heads are not a multiple of "
        f"{self.num_key_value_heads} key heads"
      )

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_attention_heads

  @property
  def query_width(self) -> int:
    return self.num_attention_heads * self.head_dim

  @property
  def attention_bias(self) -> bool:
    """On queries, keys and values."""
    return True

  @property
  def qk_norm(self) -> bool:
    """RMSNorm over each head of the queries and of the keys."""
    return False


def shared_fields(config_class: type, *own: str) -> list[str]:
  """Returns the fields that a Hugging Face config holds under the same name: all but `own`."""
  return [field.name for field in dataclasses.fields(config_class) if field.name not in own]


TEXT_FIELDS = shared_fields(TextConfig, "rope_theta")


LORA = "lora"  # in place of a learning-rate factor


@dataclasses.dataclass(frozen=True)
class Adaptation:
  """What is frozen and how it is stored and adapted; see `adaptation`."""

  rules: tuple[tuple[str, float | str], ...]  # (regex, factor or LORA), the first match wins
  dtype: str  # of frozen parameters
  rank: int
  alpha: float
  dropout: float
  marker_token: int
  trained_dtype: str = "float32"  # of trained parameters but adapters

  def factor(self, path: str) -> float | str | None:
    return next((value for pattern, value in self.rules if re.search(pattern, path)), None)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  text: TextConfig
  vision: Any  # the vision tower, of the backbone's own class
  tie_word_embeddings: bool = (
    False  # the LM head of the published checkpoint is its embedding table
  )
  # Of activations and matrix products, "float32" or "bfloat16". Norm statistics, softmax, rotary
  # embedding and the two logits are float32 in either.
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = "none"  # see `layers.rematerialized`
  attention: str = "auto"  # backend of `attention.attention`
  adaptation: Adaptation | None = None  # None: whole parameters train, or are frozen in float32
  backbone: str = ""  # name of the record in `backbones.BACKBONES`

  @property
  def needs_random_key(self) -> bool:
    """Whether training steps need a `random_key` in the batch, for layers that draw."""
    return self.adaptation is not None and self.adaptation.dropout > 0

  def with_vocabulary(self, size: int) -> Self:
    return dataclasses.replace(self, text=dataclasses.replace(self.text, vocab_size=size))

  @classmethod
  def from_hugging_face(cls, raw: Mapping[str, Any]) -> Self:
    """Returns the architecture of a `config.json`; ValueError if it is not implemented."""
    raise NotImplementedError


def check_implemented(expected: Mapping[str, tuple[Any, Any]]) -> None:
  """Raises ValueError for the first {name: (implemented, found)} whose values differ."""
  for name, (implemented, found) in expected.items():
    if implemented != found:
      raise ValueError(f"{name} is {found!r}; only {implemented!r} is implemented")
