"""A small tokenizer with Qwen's template and special tokens, and the real one."""

import json

import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from bis_jax.models.qwen2_5_vl import prompt

ADDED = (
  "<|endoftext|>",
  "<|im_start|>",
  "<|im_end|>",
  "<|vision_start|>",
  "<|vision_end|>",
  "<|image_pad|>",
  "<|video_pad|>",
)
# The template released with Qwen2.5-VL, without its branch for videos.
TEMPLATE = (
  "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
  "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
  "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
  "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
  "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
  "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
  "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory):
  """A byte-level BPE of about 300 pieces, trained with its special tokens in the vocabulary."""
  backend = Tokenizer(models.BPE())
  backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_WORDS), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=320,
    special_tokens=list(ADDED),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  text = ["Yes No Question: Process: The number of red circles is three.\n\n"] * 20
  backend.train_from_iterator(text, trainer)
  backend.add_tokens(["<tool_call>"])  # added, but not special
  folder = tmp_path_factory.mktemp("tokenizer")
  backend.save(str(folder / "tokenizer.json"))
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return str(folder)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_tokenizer_folder):
  """The small tokenizer, loaded."""
  return prompt.load_tokenizer(tiny_tokenizer_folder)


@pytest.fixture(scope="session")
def qwen_tokenizer(shared) -> transformers.PreTrainedTokenizerBase:
  """Qwen2.5-VL's own tokenizer; skips where ../shared is absent."""
  return prompt.load_tokenizer(str(shared / "data/tokenizers/qwen2_5_vl"))


@pytest.fixture(scope="session")
def tiny_prompt(tiny_tokenizer):
  """The formatter on the small tokenizer."""
  return prompt.QwenPrompt(tiny_tokenizer)


@pytest.fixture(scope="session")
def qwen_prompt(qwen_tokenizer):
  """The formatter on Qwen2.5-VL's own tokenizer."""
  return prompt.QwenPrompt(qwen_tokenizer)
