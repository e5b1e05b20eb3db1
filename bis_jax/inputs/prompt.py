"""The prompt formatter: question and steps to token ids, with a step marker after every step.

Training, evaluation and scoring all build their text here. A backbone's formatter adds what is
around the question and the first step. What a chat template writes after the last marker is left
out: attention is causal, so nothing after a marker can change its score.

User text never becomes a special token. Pieces between special tokens are encoded separately by an
encoder that knows no special tokens, and the special ids are put between them.
"""

import abc
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import regex
from tokenizers import Tokenizer as Encoder
from transformers import PreTrainedTokenizerBase

from bis_jax.errors import UserError
from bis_jax.inputs.texts import question_text, step_text

STEP_MARKER = "<prm>"
POSITIVE, NEGATIVE = "Yes", "No"


class TokenizerError(UserError, ValueError):
  """A tokenizer that lacks something that the prompt needs."""


def check_vocabulary(known: Container[str], needed: Iterable[str], name: str, kind: str) -> None:
  """Raises TokenizerError naming the tokens that a tokenizer lacks."""
  if missing := [token for token in needed if token not in known]:
    raise TokenizerError(
      f"the tokenizer in {name!r} lacks {', '.join(missing)}; use the tokenizer of a {kind} checkpoint"
    )


class Tokenizer(Protocol):
  """What every backbone's tokenizer has; `len` gives the number of token ids."""

  def __len__(self) -> int: ...

  def save_pretrained(self, folder: Any, /) -> Any: ...


@dataclass(frozen=True)
class SpecialTokens:
  """Ids of the tokens that the model side needs to know."""

  prm: int  # the step marker
  image_pad: int  # placeholder of one image feature
  vision_start: int  # before every image
  vision_end: int  # and after it
  yes: int  # words whose LM head rows initialize the reward head
  no: int

  @classmethod
  def of(cls, ids: Mapping[str, int], image_pad: str, start: str, end: str) -> "SpecialTokens":
    """Returns the ids of the texts of the image tokens, and of those that all backbones share."""
    return cls(*(ids[t] for t in (STEP_MARKER, image_pad, start, end, POSITIVE, NEGATIVE)))


@dataclass(frozen=True)
class Sample:
  """One tokenized sample, every image expanded to its `image_pad` tokens."""

  tokens: np.ndarray  # int32[t]
  markers: np.ndarray  # int32[m], positions of the step markers in `tokens`, in order of steps
  image_spans: np.ndarray  # int32[images, 2], (start, length) of each image's `image_pad` tokens
  dropped_steps: int = 0  # trailing steps that did not fit
  prefix: int = 0  # its first tokens, with all images, that every solution of the question has


@dataclass(frozen=True)
class Frame:
  """The token ids and texts that a backbone puts around one sample."""

  opening: tuple[Sequence[int] | str, ...]  # token ids, and texts to encode, before the first step
  first: str  # text that is encoded together with the first step's
  shared: str = ""  # the beginning of `first`, whose tokens do not depend on the step
  alone: str = ""  # text that is encoded instead if no step fits


class Prompt(abc.ABC):
  """Encodes samples; `separator` is the text before every step but the first.

  `after` are the ids after a step, where it is scored at the last, and `before` those before the
  next step's text.
  """

  def __init__(
    self,
    special: SpecialTokens,
    encode: Callable[[list[str]], list[list[int]]],
    separator: str,
    *,
    after: Sequence[int] = (),
    before: Sequence[int] = (),
  ):
    self.special = special
    self._encode = encode
    self._separator = separator
    *between, scored = after or [special.prm]
    # Negative: other tokens of the same id are not scored.
    self._after, self._before = [*between, ~scored], [*before]

  @abc.abstractmethod
  def frame(self, question: str, images: int) -> Frame: ...

  def encode_batch(
    self,
    texts: Sequence[tuple[str, Sequence[str]]],
    image_token_counts: Sequence[Sequence[int]],
    *,
    max_length: int,
  ) -> list[tuple[list[int], int, int]]:
    """Returns (compact tokens, dropped steps, prefix) per (question, steps).

    Compact tokens hold one `image_pad` per image and ~id where a step is scored; `expand`
    makes the sample of them. The first `prefix` of them are those that another solution of the
    question with its images has, too.
    Trailing steps that do not fit into `max_length` expanded tokens are dropped, marker included.
    If not even the first step fits, the sample has no marker and may be longer than `max_length`.
    """
    # Only here, so that a text has the same ids through every entry point.
    texts = [(question_text(question), [*map(step_text, steps)]) for question, steps in texts]
    frames, pieces = [], []
    for (question, steps), counts in zip(texts, image_token_counts, strict=True):
      frame = self.frame(question, len(counts))
      frames.append(frame)
      pieces += [part for part in (*frame.opening, frame.shared) if isinstance(part, str)]
      pieces += [
        self._separator + step if i else frame.first + step for i, step in enumerate(steps)
      ]
    distinct = list(dict.fromkeys(pieces))  # the rollouts of a question share it
    ids_of = dict(zip(distinct, self._encode(distinct), strict=True))
    encoded = map(ids_of.__getitem__, pieces)
    samples = []
    for frame, (_, steps), counts in zip(frames, texts, image_token_counts, strict=True):
      ids: list[int] = []
      for part in frame.opening:
        ids += next(encoded) if isinstance(part, str) else part
      images_extra = sum(counts) - len(counts)
      prefix, shared = len(ids), next(encoded)
      kept, fits = 0, True
      for _ in steps:
        piece = next(encoded)
        if not kept and fits:  # a tokenizer may merge the end of `shared` with the step
          prefix += len(os.path.commonprefix([shared, piece]))
        step = [*(self._before if kept else ()), *piece, *self._after]
        fits = fits and len(ids) + images_extra + len(step) <= max_length
        if fits:
          ids += step
          kept += 1
      if not kept and frame.alone:
        ids += self._encode([frame.alone])[0]
      samples.append((ids, len(steps) - kept, min(prefix, len(ids))))
    return samples


def expand(
  tokens: Sequence[int] | np.ndarray,
  image_token_counts: Sequence[int],
  special: SpecialTokens,
  dropped_steps: int = 0,
  prefix: int = 0,
) -> Sample:
  """Returns the sample of compact tokens, each image expanded to its number of tokens.

      compact  [start, pad, end, 7, ~prm]  with counts [3]
      tokens   [start, pad, pad, pad, end, 7, prm], markers [6], image_spans [[1, 3]]

  Raises ValueError if the tokens hold another number of images.
  """
  compact = np.asarray(tokens, np.int32)
  is_image = compact == special.image_pad
  if is_image.sum() != len(image_token_counts):
    raise ValueError(
      f"its text has {is_image.sum()} image placeholders, but it has {len(image_token_counts)} images"
    )
  counts = np.asarray(image_token_counts, np.int64)
  repeats = np.ones(len(compact), np.int64)
  repeats[is_image] = counts
  starts = np.cumsum(repeats) - repeats
  return Sample(
    tokens=np.repeat(np.where(compact < 0, ~compact, compact), repeats),
    markers=starts[compact < 0].astype(np.int32),
    image_spans=np.stack([starts[is_image], counts], axis=1).astype(np.int32),
    dropped_steps=dropped_steps,
    prefix=int(repeats[:prefix].sum()),
  )


_WORDS = 200_000  # that are remembered
_PLAIN = re.compile(r"[\t\n\r -~]*")
_CLASSES = {r"\p{L}": "A-Za-z", r"\p{N}": "0-9"}  # what plain texts have of classes of Unicode


def _is_plain(text: str) -> bool:
  """Returns whether the split into words is the same with any library."""
  return text.isascii() and (text.isprintable() or bool(_PLAIN.fullmatch(text)))


@functools.cache
def _words_of_plain_texts(pattern: str) -> Callable[[str], list[str]]:
  """Returns the split of texts of `_PLAIN` by a pattern of a tokenizer."""
  # `re` is twice as fast as `regex`, but knows no classes of Unicode.
  plain = re.sub(r"\[[^]]*\]", lambda found: _replaced(found[0], "{}"), pattern)
  try:
    return re.compile(_replaced(plain, "[{}]"), re.ASCII).findall
  except re.error:
    return regex.compile(pattern).findall


def _replaced(pattern: str, form: str) -> str:
  for name, characters in _CLASSES.items():
    pattern = pattern.replace(name, form.format(characters))
  return pattern


class PlainEncoder:
  """A tokenizer's byte-pair encoding with no added tokens, for text of users; picklable.

  If the tokenizer splits texts into words by a pattern, the ids of words are remembered: texts of
  rollouts are encoded 10 times faster.
  """

  def __init__(self, tokenizer: PreTrainedTokenizerBase):
    # `split_special_tokens=True` would still turn `<tool_call>` and other added tokens into one id.
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = []
    state["post_processor"] = None
    self._state, self._pattern = json.dumps(state), None
    match state:
      case {
        "normalizer": None | {"type": "NFC"},
        "pre_tokenizer": {
          "type": "Sequence",
          "pretokenizers": [
            {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": words}},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
          ],
        },
      }:
        self._pattern = words
    self._encoder = Encoder.from_str(self._state)
    self._ids: dict[str, list[int]] = {}

  def __reduce__(self):
    return _encoder_of, (self._state, self._pattern)

  def __call__(self, texts: list[str]) -> list[list[int]]:
    if self._pattern is None:
      return self._plainly(texts)
    find, known = _words_of_plain_texts(self._pattern), self._ids
    split = {text: find(text) for text in texts if _is_plain(text)}
    if len(known) > _WORDS:
      known.clear()
    new = list(set().union(*split.values()) - known.keys())
    known.update(zip(new, self._plainly(new), strict=True))
    others = [text for text in texts if text not in split]
    found = dict(zip(others, self._plainly(others), strict=True))
    for text, words in split.items():
      found[text] = list(itertools.chain.from_iterable(map(known.__getitem__, words)))
    return [found[text] for text in texts]

  def _plainly(self, texts: list[str]) -> list[list[int]]:
    encoded = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
    return [one.ids for one in encoded]


def _encoder_of(state: str, pattern: str | None) -> PlainEncoder:
  encoder = PlainEncoder.__new__(PlainEncoder)
  encoder._state, encoder._pattern = state, pattern
  encoder._encoder, encoder._ids = Encoder.from_str(state), {}
  return encoder
