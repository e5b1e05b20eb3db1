"""The one formatter: question and steps to token ids with a step marker after every step.

Training, evaluation and scoring all build their text here, so a step is read in the same words
everywhere. The text of a sample is

    user turn:       <images>Question: {question}
    assistant turn:  Process: {step 1}<prm>\\n\\n{step 2}<prm>\\n\\n...{step n}<prm>

wrapped by the tokenizer's own chat template (default system prompt). What the template writes after
the last marker is left out: attention is causal and nothing after a marker can change its score.

User text never becomes a special token. Pieces between special tokens are encoded one by one by a
copy of the tokenizer that knows no added tokens at all, and the special ids are put between them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

STEP_MARKER = "<prm>"
IMAGE_PAD = "<|image_pad|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
POSITIVE, NEGATIVE = "Yes", "No"

# Stand-ins for user text while the chat template is rendered; no template contains them.
_QUESTION_SLOT = "\x00question\x00"
_PROCESS_SLOT = "\x00process\x00"


@dataclass(frozen=True)
class SpecialTokens:
  """Ids of the tokens that the model side needs to know.

  Attributes:
    prm: the step marker. image_pad: stands for one merged image feature.
    vision_start, vision_end: around every image.
    yes, no: the words whose language-model head rows initialise the reward head.
  """

  prm: int
  image_pad: int
  vision_start: int
  vision_end: int
  yes: int
  no: int


@dataclass(frozen=True)
class Sample:
  """One tokenised sample.

  Attributes:
    tokens: int32[t], every image already spread over its `image_pad` tokens.
    markers: int32[m], positions of the step markers in `tokens`; marker i belongs to step i.
    image_spans: int32[images, 2], (start, length) of each image's run of `image_pad` tokens.
    dropped_steps: how many trailing steps did not fit.
  """

  tokens: np.ndarray
  markers: np.ndarray
  image_spans: np.ndarray
  dropped_steps: int = 0


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
  """Returns the tokenizer stored in `folder` with the step marker added behind its last token.

  For Qwen2.5-VL the marker gets id 151665, which is a row the released embedding table already has.

  Raises:
    ValueError: a token that this formatter needs is not in the tokenizer; it is named.
  """
  tokenizer = AutoTokenizer.from_pretrained(folder)
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


class QwenPrompt:
  """Encodes samples for Qwen2.5-VL.

  Args:
    tokenizer: from `load_tokenizer`.
    separator: text between a step marker and the next step. The default is the training form; the
      form of the released evaluation is the empty string.
  """

  def __init__(self, tokenizer: PreTrainedTokenizerBase, *, separator: str = "\n\n"):
    self.special = special_tokens(tokenizer)
    self._tokenizer = tokenizer
    self._separator = separator
    self._plain = without_added_tokens(tokenizer)
    self._frames: dict[int, _Frame] = {}

  def encode(
    self,
    question: str,
    steps: Sequence[str],
    image_token_counts: Sequence[int] = (),
    *,
    max_length: int,
  ) -> Sample:
    """Returns the sample of one question, its images and its steps.

    Trailing steps that do not fit into `max_length` tokens are dropped whole, marker and all. If
    not even the first step fits, the sample has no marker and may be longer than `max_length`.
    """
    texts, counts = [(question, steps)], [image_token_counts]
    [(compact, dropped)] = self.encode_batch(texts, counts, max_length=max_length)
    return expand(compact, image_token_counts, self.special, dropped)

  def encode_batch(
    self,
    texts: Sequence[tuple[str, Sequence[str]]],
    image_token_counts: Sequence[Sequence[int]],
    *,
    max_length: int,
  ) -> list[tuple[np.ndarray, int]]:
    """Returns (compact tokens, dropped steps) of each (question, steps).

    Compact tokens, int32, hold a single `image_pad` an image; `expand` makes the sample of them.
    Lengths are counted with the images spread out.
    """
    frames = [self._frame(len(counts)) for counts in image_token_counts]
    pieces = []
    for frame, (question, steps) in zip(frames, texts, strict=True):
      pieces.append(f"{frame.before_question}Question: {question}{frame.after_question}")
      pieces += [self._separator + step for step in steps]
      if steps:
        pieces[-len(steps)] = f"{frame.before_process}Process: {steps[0]}"
    encoded = iter(self._plain.encode_batch_fast(pieces, add_special_tokens=False))
    samples = []
    for frame, (_, steps), counts in zip(frames, texts, image_token_counts, strict=True):
      ids = [*frame.head, *next(encoded).ids, *frame.middle]
      images_extra = sum(counts) - len(counts)
      kept, fits = 0, True
      for _ in steps:
        step = next(encoded).ids
        fits = fits and len(ids) + images_extra + len(step) + 1 <= max_length
        if fits:
          ids += step
          ids.append(self.special.prm)
          kept += 1
      samples.append((np.asarray(ids, np.int32), len(steps) - kept))
    return samples

  def _frame(self, images: int) -> "_Frame":
    if images not in self._frames:
      self._frames[images] = _render_frame(self._tokenizer, images)
    return self._frames[images]


def expand(
  compact: np.ndarray,
  image_token_counts: Sequence[int],
  special: SpecialTokens,
  dropped_steps: int = 0,
) -> Sample:
  """Returns the sample of compact tokens, each image spread over its number of tokens.

      compact  [start, pad, end, 7, prm]  with counts [3]
      tokens   [start, pad, pad, pad, end, 7, prm], markers [6], image_spans [[1, 3]]

  Raises:
    ValueError: the tokens hold another number of images than there are counts.
  """
  is_image = compact == special.image_pad
  if is_image.sum() != len(image_token_counts):
    raise ValueError(
      f"its text has places for {is_image.sum()} images, but it has {len(image_token_counts)}"
    )
  counts = np.asarray(image_token_counts, np.int64)
  repeats = np.ones(len(compact), np.int64)
  repeats[is_image] = counts
  starts = np.cumsum(repeats) - repeats
  return Sample(
    tokens=np.repeat(compact, repeats),
    markers=starts[compact == special.prm].astype(np.int32),
    image_spans=np.stack([starts[is_image], counts], axis=1).astype(np.int32),
    dropped_steps=dropped_steps,
  )


@dataclass(frozen=True)
class _Frame:
  """What the chat template puts around the user's text, for some number of images.

  `head` and `middle` are token ids; the four texts touch the user's text without a special token
  between, so they are encoded together with it.
  """

  head: tuple[int, ...]
  before_question: str
  after_question: str
  middle: tuple[int, ...]
  before_process: str


def _render_frame(tokenizer: PreTrainedTokenizerBase, images: int) -> _Frame:
  content = [{"type": "image"}] * images + [{"type": "text", "text": _QUESTION_SLOT}]
  messages = [
    {"role": "user", "content": content},
    {"role": "assistant", "content": [{"type": "text", "text": _PROCESS_SLOT}]},
  ]
  text = tokenizer.apply_chat_template(messages, tokenize=False)
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
  return _Frame(
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


def without_added_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
  """Returns the same byte-pair encoding with no added tokens, for text from outside.

  (`split_special_tokens=True` would still turn `<tool_call>` and other added tokens into one id.)
  """
  state = json.loads(tokenizer.backend_tokenizer.to_str())
  state["added_tokens"] = []
  state["post_processor"] = None
  return Tokenizer.from_str(json.dumps(state))
