"""The prompt of Qwen2.5-VL:

    user turn:       <images>Question: {question}
    assistant turn:  Process: {step 1}<prm>\\n\\n{step 2}<prm>\\n\\n...{step n}<prm>

wrapped by the tokenizer's own chat template with its default system prompt.
"""

from dataclasses import dataclass
from typing import Any

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from bis_jax.inputs.prompt import (
  NEGATIVE,
  POSITIVE,
  STEP_MARKER,
  Frame,
  Prompt,
  SpecialTokens,
  plain_encoder,
)

IMAGE_PAD = "<|image_pad|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"

# Stand-ins for user text while the chat template is rendered; no template contains them.
_QUESTION_SLOT = "\x00question\x00"
_PROCESS_SLOT = "\x00process\x00"


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
  """Returns the tokenizer stored in `folder` with the step marker added after its last token.

  The marker gets id 151665, a row that the released embedding table already has.
  """
  tokenizer: Any = AutoTokenizer.from_pretrained(folder)
  if STEP_MARKER not in tokenizer.get_vocab():
    tokenizer.add_tokens([AddedToken(STEP_MARKER, special=True, normalized=False)])
  special_tokens(tokenizer)
  return tokenizer


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
  """Returns the ids of the special tokens; raises ValueError naming those that are missing."""
  names = {
    "prm": STEP_MARKER,
    "image_pad": IMAGE_PAD,
    "vision_start": VISION_START,
    "vision_end": VISION_END,
    "yes": POSITIVE,
    "no": NEGATIVE,
  }
  vocabulary = tokenizer.get_vocab()
  missing = [text for text in names.values() if text not in vocabulary]
  if missing:
    raise ValueError(
      f"The tokenizer in {tokenizer.name_or_path!r} lacks {', '.join(missing)}; "
      "use the tokenizer of a Qwen2.5-VL checkpoint."
    )
  return SpecialTokens(**{field: vocabulary[text] for field, text in names.items()})


class QwenPrompt(Prompt):
  def __init__(self, tokenizer: PreTrainedTokenizerBase, *, separator: str = "\n\n"):
    super().__init__(special_tokens(tokenizer), plain_encoder(tokenizer), separator)
    self._tokenizer = tokenizer
    self._templates: dict[int, _Template] = {}

  def frame(self, question: str, images: int) -> Frame:
    if images not in self._templates:
      self._templates[images] = _render(self._tokenizer, images)
    template = self._templates[images]
    text = f"{template.before_question}Question: {question}{template.after_question}"
    opening = (template.head, text, template.middle)
    return Frame(opening, f"{template.before_process}Process: ")


@dataclass(frozen=True)
class _Template:
  """What the chat template puts around the user's text, for some number of images.

  `head` and `middle` are token ids; the four texts touch the user's text without a special token
  between, so they are encoded together with it.
  """

  head: tuple[int, ...]
  before_question: str
  after_question: str
  middle: tuple[int, ...]
  before_process: str


def _render(tokenizer: PreTrainedTokenizerBase, images: int) -> _Template:
  content = [{"type": "image"}] * images + [{"type": "text", "text": _QUESTION_SLOT}]
  messages: Any = [
    {"role": "user", "content": content},
    {"role": "assistant", "content": [{"type": "text", "text": _PROCESS_SLOT}]},
  ]
  text: Any = tokenizer.apply_chat_template(messages, tokenize=False)
  if text.count(_QUESTION_SLOT) != 1 or text.count(_PROCESS_SLOT) != 1:
    raise ValueError(
      f"The chat template of the tokenizer in {tokenizer.name_or_path!r} does not render a user "
      "turn followed by an assistant turn; use the template released with Qwen2.5-VL."
    )
  before, rest = text.split(_QUESTION_SLOT)
  between = rest.split(_PROCESS_SLOT)[0]
  added = {token.content for token in tokenizer.added_tokens_decoder.values()}
  head, before_question = _cut_after_last(before, added)
  middle, before_process = _cut_after_last(between, added)
  after_question = middle[
    : min((middle.find(token) for token in added if token in middle), default=0)
  ]
  return _Template(
    head=tuple(tokenizer.encode(head, add_special_tokens=False)),
    before_question=before_question,
    after_question=after_question,
    middle=tuple(tokenizer.encode(middle[len(after_question) :], add_special_tokens=False)),
    before_process=before_process,
  )


def _cut_after_last(text: str, tokens: set[str]) -> tuple[str, str]:
  """Splits text behind its last special token; ("", text) if there is none."""
  end = max((text.rfind(token) + len(token) for token in tokens if token in text), default=0)
  return text[:end], text[end:]
