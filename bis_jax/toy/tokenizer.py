"""The toy corpus's tokenizer: byte-level BPE, trained on the corpus's own text."""

import itertools
import json
import pathlib
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# Qwen2.5-VL's, in its order; the first is also the padding token.
SPECIAL_TOKENS = (
  "<|endoftext|>",
  "<|im_start|>",
  "<|im_end|>",
  "<|object_ref_start|>",
  "<|object_ref_end|>",
  "<|box_start|>",
  "<|box_end|>",
  "<|quad_start|>",
  "<|quad_end|>",
  "<|vision_start|>",
  "<|vision_end|>",
  "<|vision_pad|>",
  "<|image_pad|>",
  "<|video_pad|>",
)
VOCABULARY_SIZE = 1024  # upper limit; the text has too few words to reach it

# A word or one digit, with the blank before it; then punctuation, line ends and blanks. (Qwen2.5's
# own pattern separates blanks from digits, which would cost one more token per number.)
_PATTERN = r" ?\p{L}+| ?\p{N}|[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"
_CHAT_TEMPLATE = (
  "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
  "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
  "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
  "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
  "{% if content['type'] == 'image' or 'image' in content %}"
  "<|vision_start|><|image_pad|><|vision_end|>"
  "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
  "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONFIG = {
  "tokenizer_class": "PreTrainedTokenizerFast",
  "model_max_length": 32768,
  "eos_token": "<|im_end|>",
  "pad_token": "<|endoftext|>",
  "bos_token": None,
  "unk_token": None,
  "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
  "chat_template": _CHAT_TEMPLATE,
  "clean_up_tokenization_spaces": False,
  "split_special_tokens": False,
  "errors": "replace",
}
# Words that the prompt puts around questions and steps, so that they are few tokens, too.
_PROMPT_TEXT = (
  "system\nYou are a helpful assistant.",
  "user\n",
  "assistant\n",
  "Yes No Yes No",  # the words of the reward head
  "Question: ",
  "\nProcess: ",
  "\n\n",
)


def train_tokenizer(texts: Iterable[str], folder: pathlib.Path) -> None:
  """Writes `folder`/tokenizer.json and tokenizer_config.json, for AutoTokenizer to load."""
  # It depends on the words of the texts and not on their frequency, so corpora that differ only in
  # their solutions have the same one. Unknown text falls back to bytes. Special tokens come last,
  # as in Qwen2.5-VL.
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=VOCABULARY_SIZE,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  split = tokenizer.pre_tokenizer.pre_tokenize_str
  every = itertools.chain(_PROMPT_TEXT, texts)
  words = sorted({text[start:end] for text in every for _, (start, end) in split(text)})
  tokenizer.train_from_iterator(words * 2, trainer)  # a pair seen once is not merged
  tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
  folder.mkdir(parents=True)
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps(_CONFIG, indent=2) + "\n")
