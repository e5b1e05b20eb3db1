"""Every backbone has its own processor, and a recipe's settings are those of the paper."""

import dataclasses

import pytest

from bis_jax.models.backbones import BackboneError
from bis_jax.models.internvl.images import InternVLImages
from bis_jax.models.internvl.prompt import SYSTEM
from bis_jax.models.processor import image_processor, make_processor
from bis_jax.models.qwen2_5_vl.images import QwenImages
from configs import internvl3_14b_bis10, internvl_bis10, qwen_bis10
from tests.in_memory import encode


def test_the_image_processor_is_the_backbones():
  """Six tiles of 448 pixels, which is the tower's own size; the toy's are smaller."""
  assert image_processor(internvl_bis10.get_config()) == InternVLImages(6, 448)
  assert image_processor(internvl3_14b_bis10.get_config()) == InternVLImages(6, 448)
  assert image_processor(internvl_bis10.get_config("toy")) == InternVLImages(4, 56)
  assert image_processor(qwen_bis10.get_config()) == QwenImages(4 * 784, 1280 * 784)


def test_the_system_prompt_is_the_released_one_unless_another_is_asked_for(shared):
  folder = str(shared / "data/tokenizers/internlm2_5")
  c = internvl_bis10.get_config()
  released = make_processor(c, folder)
  c.internvl.system = "Be brief."
  other = make_processor(c, folder)
  [system] = released.tokenizer.encode([f"system\n{SYSTEM}"])
  [brief] = other.tokenizer.encode(["system\nBe brief."])
  for processor, words in ((released, system), (other, brief)):
    sample = encode(processor.prompt, "Q", ["one"], max_length=500)
    assert sample.tokens.tolist()[2 : 2 + len(words)] == words
  assert dataclasses.asdict(released.prompt.special) == dataclasses.asdict(other.prompt.special)


def test_another_backbones_tokenizer_is_refused(shared):
  with pytest.raises(
    BackboneError, match=r"internlm2_5 holds no tokenizer for qwen2_5_vl: .*image_pad"
  ):
    make_processor(qwen_bis10.get_config(), str(shared / "data/tokenizers/internlm2_5"))
