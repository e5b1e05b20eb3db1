"""The prompt of Qwen2.5-VL and Qwen3-VL:

    user turn:       <images>Question: {question}
    assistant turn:  Process: {step 1}<prm>\\n\\n{step 2}<prm>\\n\\n...{step n}<prm>

wrapped by the tokenizer's own chat template, which of Qwen2.5-VL has a default system prompt.
"""

import functools
import re
from typing import Any

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from bis_jax.inputs.prompt import (
  NEGATIVE,
  POSITIVE,
  STEP_MARKER,
  Frame,
  PlainEncoder,
  Prompt,
  SpecialTokens,
  TokenizerError,
  check_vocabulary,
)

IMAGE_PAD = "<|image_pad|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"

# Stand-ins for user text while the chat template is rendered; no template contains them.
_QUESTION_SLOT = "\x00question\x00"
_PROCESS_SLOT = "\x00process\x00"


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
  """Returns the tokenizer stored in `folder` with the step marker added after its last token."""
  # The marker gets id 151665, a row that the released embedding table already has.
  tokenizer: Any = AutoTokenizer.from_pretrained(folder)
  if STEP_MARKER not in tokenizer.get_vocab():
    tokenizer.add_tokens([AddedToken(STEP_MARKER, special=True, normalized=False)])
  special_tokens(tokenizer)
  return tokenizer


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
  """Returns the ids of the special tokens; raises TokenizerError naming those that are missing."""
  images, vocabulary = (IMAGE_PAD, VISION_START, VISION_END), tokenizer.get_vocab()
  needed = (STEP_MARKER, *images, POSITIVE, NEGATIVE)
  check_vocabulary(vocabulary, needed, tokenizer.name_or_path, "Qwen2.5-VL or Qwen3-VL")
  return SpecialTokens.of(vocabulary, *images)


class QwenPrompt(Prompt):
  def __init__(self, tokenizer: PreTrainedTokenizerBase, *, separator: str = "\n\n"):
    super().__init__(special_tokens(tokenizer), PlainEncoder(tokenizer), separator)
    self._tokenizer = tokenizer
    self._openings: dict[int, list[list[int] | str]] = {}

  def frame(self, question: str, images: int) -> Frame:
    if images not in self._openings:
      self._openings[images] = self._render(images)
    *parts, last = self._openings[images]
    question = f"Question: {question}"
    opening = (p.replace(_QUESTION_SLOT, question) if isinstance(p, str) else p for p in parts)
    return Frame(tuple(opening), f"{last}Process: ", shared=str(last))

  def _render(self, images: int) -> list[list[int] | str]:
    """Returns the chat template up to the process: token ids, and texts next to the user's."""
    tokenizer = self._tokenizer
    content = [{"type": "image"}] * images + [{"type": "text", "text": _QUESTION_SLOT}]
    messages: Any = [
      {"role": "user", "content": content},
      {"role": "assistant", "content": [{"type": "text", "text": _PROCESS_SLOT}]},
    ]
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False)
    if text.count(_QUESTION_SLOT) != 1 or text.count(_PROCESS_SLOT) != 1:
      raise TokenizerError(
        f"The chat template of the tokenizer in {tokenizer.name_or_path!r} does not render a user "
        "turn followed by an assistant turn; use the template released with the weights."
      )
    added = "|".join(re.escape(token.content) for token in tokenizer.added_tokens_decoder.values())
    *parts, last = re.split(f"({added})", text.partition(_PROCESS_SLOT)[0])
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    return [*(part if _QUESTION_SLOT in part else encode(part) for part in parts if part), last]
