"""The prompt of InternVL2.5 and InternVL3, as released:

    <s><|im_start|>system\\n{SYSTEM}<|im_end|>\\n
    <|im_start|>user\\n<|im_end|>\\n
    <|im_start|>assistant\\n<img>{image tokens}</img>\\nQuestion: {question}\\n
    Process: {step 1}<prm>\\n\\n{step 2}<prm>\\n\\n...{step n}<prm>

Line breaks are those written as \\n. The user turn is empty; `<s>` is for InternLM2.5 only; each image
is on a line of its own. (This is the form of the released training. The released evaluation lacks the
`<|im_end|>\\n` of the empty turn; here both have it.)

Sources: `preprocess_internvl2_5` in the InternVL release, with the turns as the published reward
models build them; `conversation.py` there for the system prompt.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AddedToken, AutoTokenizer

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

_PROTO: Any = sentencepiece_model_pb2  # its classes are made when it is imported

SYSTEM = (
  "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
  "联合开发的多模态大语言模型。"
)
IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
# After the text model's own tokens, in this order; the step marker is a new row after them.
ADDED = (
  IMAGE_START,
  IMAGE_END,
  IMAGE_CONTEXT,
  "<quad>",
  "</quad>",
  "<ref>",
  "</ref>",
  "<box>",
  "</box>",
  STEP_MARKER,
)
_TURN_START, _TURN_END = "<|im_start|>", "<|im_end|>"
_RESERVED = "[UNUSED_TOKEN_"
_INTERNLM_TURNS = {_TURN_END: "[UNUSED_TOKEN_145]", _TURN_START: "[UNUSED_TOKEN_146]"}


@dataclass(frozen=True)
class TextTokenizer:
  encode: Callable[[list[str]], list[list[int]]]  # no text becomes a special token
  ids: Mapping[str, int]  # of `ADDED`, of the turn tokens, and of the words Yes and No
  beginning: tuple[int, ...]  # ids that every sample starts with
  size: int  # number of token ids, the step marker's included
  save_pretrained: Callable[[str | pathlib.Path], Any]  # writes what `load_tokenizer` reads

  def __len__(self) -> int:
    return self.size


def load_tokenizer(folder: str) -> TextTokenizer:
  """Returns a checkpoint's tokenizer: InternLM2.5's if it has a `tokenizer.model`."""
  # Nothing in the folder is run as code.
  model = pathlib.Path(folder).expanduser() / "tokenizer.model"
  return _internlm(model) if model.exists() else _qwen(folder)


def _internlm(file: pathlib.Path) -> TextTokenizer:
  # <prm> becomes 92553.
  data = file.read_bytes()
  proto = _PROTO.ModelProto.FromString(data)
  for piece in proto.pieces:
    # Reserved ids, six of which are in use, as <|im_start|> and the like: a user who wrote the
    # placeholder would get the token. Control pieces are never found in text.
    if piece.piece.startswith(_RESERVED):
      piece.type = _PROTO.ModelProto.SentencePiece.CONTROL
    if piece.piece == "\0":  # SentencePiece does the same, with a warning
      piece.type = _PROTO.ModelProto.SentencePiece.UNUSED
  processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
  size = processor.vocab_size()
  pieces = {**_INTERNLM_TURNS, POSITIVE: POSITIVE, NEGATIVE: NEGATIVE}
  ids = {name: processor.piece_to_id(piece) for name, piece in pieces.items()}
  if processor.unk_id() in ids.values():
    raise TokenizerError(
      f"{file} is not the tokenizer of InternLM2.5: it lacks {[*pieces.values()]}"
    )
  added = {token: size + i for i, token in enumerate(ADDED)}
  return TextTokenizer(
    encode=processor.encode,
    ids=ids | added,
    beginning=(processor.bos_id(),),
    size=size + len(ADDED),
    save_pretrained=functools.partial(
      _save_internlm, data, added, _internlm_config(file, {**ids, **added})
    ),
  )


def _internlm_config(file: pathlib.Path, ids: Mapping[str, int]) -> dict[str, Any]:
  """Returns the tokenizer_config.json beside the model, if any, with the tokens that it lacks."""
  path = file.with_name("tokenizer_config.json")
  config = json.loads(path.read_text()) if path.exists() else {}
  flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
  tokens = {
    str(i): {"content": token, **flags, "special": True}
    for token, i in ids.items()
    if token not in (POSITIVE, NEGATIVE)
  }
  special = config.get("additional_special_tokens", [])
  return {
    "tokenizer_class": "InternLM2Tokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
    **config,
    "added_tokens_decoder": tokens | config.get("added_tokens_decoder", {}),
    "additional_special_tokens": [*special, *({STEP_MARKER} - {*special})],
  }


def _save_internlm(
  data: bytes, added: Mapping[str, int], config: Mapping[str, Any], folder: str | pathlib.Path
) -> None:
  # `load_tokenizer` needs only the first; the release's code reads the ids of added tokens.
  folder = pathlib.Path(folder)
  (folder / "tokenizer.model").write_bytes(data)
  (folder / "added_tokens.json").write_text(json.dumps(added, indent=2) + "\n")
  (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _qwen(folder: str) -> TextTokenizer:
  """Returns Qwen2.5's tokenizer with InternVL's tokens after its own; <prm> becomes 151674."""
  tokenizer: Any = AutoTokenizer.from_pretrained(folder)
  tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in ADDED])
  vocabulary = tokenizer.get_vocab()
  names = (*ADDED, _TURN_START, _TURN_END, POSITIVE, NEGATIVE)
  check_vocabulary(vocabulary, names, folder, "InternVL")
  return TextTokenizer(
    encode=PlainEncoder(tokenizer),
    ids={name: vocabulary[name] for name in names},
    beginning=(),
    size=len(tokenizer),
    save_pretrained=tokenizer.save_pretrained,
  )


class InternVLPrompt(Prompt):
  def __init__(self, tokenizer: TextTokenizer, *, separator: str = "\n\n", system: str = SYSTEM):
    ids = tokenizer.ids
    special = SpecialTokens.of(ids, IMAGE_CONTEXT, IMAGE_START, IMAGE_END)
    super().__init__(special, tokenizer.encode, separator)
    self.system = system  # read by the model card
    start, end = ids[_TURN_START], ids[_TURN_END]
    system_ids, user, assistant, line = tokenizer.encode(
      [f"system\n{system}", "user\n", "assistant\n", "\n"]
    )
    # All but the assistant's name, which is encoded with the text if no image is between.
    turns = [start, *system_ids, end, *line, start, *user, end, *line, start]
    self._head = [*tokenizer.beginning, *turns]
    image = [special.vision_start, special.image_pad, special.vision_end]
    self._first_image, self._next_image = [*assistant, *image], [*line, *image]

  def frame(self, question: str, images: int) -> Frame:
    opening = [*self._head]
    if images:
      opening += [*self._first_image, *self._next_image * (images - 1)]
    # There is no special token between here and the first marker, so this is one piece with step 1.
    shared = f"{'' if images else 'assistant'}\nQuestion: {question}\n"
    text = f"{shared}Process: "
    return Frame((opening,), text, shared, alone=text)


class VisualPRMPrompt(Prompt):
  """The prompt of VisualPRM-8B, for scoring: a turn per step, answered `+` or `-`.

      <s><|im_start|>system\\n{SYSTEM}<|im_end|>\\n
      <|im_start|>user\\n### Question:\\n<img>{image tokens}</img>\\n{question}\\n\\n
      ### Solution Process:\\n{step 1}<|im_end|>\\n
      <|im_start|>assistant\\n+<|im_end|>\\n
      <|im_start|>user\\n{step 2}<|im_end|>\\n<|im_start|>assistant\\n

  A step's score is the softmax over the logits of `+` and `-` where its answer is predicted, at the
  last token of `assistant\\n`. The answers before are `+`, whatever their scores. Source: the model's
  code on the hub (`InternVLRewardModel.generate_steps_with_soft_score`).
  """

  def __init__(self, tokenizer: TextTokenizer, *, system: str = SYSTEM):
    ids = tokenizer.ids
    start, end = ids[_TURN_START], ids[_TURN_END]
    system_ids, line, user, assistant, right, wrong = tokenizer.encode(
      [
        f"system\n{system}",
        "\n",
        "user\n### Question:\n",
        "assistant\n",
        "assistant\n+",
        "assistant\n-",
      ]
    )
    if not assistant == right[:-1] == wrong[:-1]:
      raise TokenizerError("the tokenizer has no tokens + and -: use that of VisualPRM-8B")
    special = SpecialTokens.of(ids, IMAGE_CONTEXT, IMAGE_START, IMAGE_END)
    super().__init__(
      dataclasses.replace(special, yes=right[-1], no=wrong[-1]),
      tokenizer.encode,
      "user\n",
      after=[end, *line, start, *assistant],
      before=[right[-1], end, *line, start],
    )
    self.system = system
    self._head = [*tokenizer.beginning, start, *system_ids, end, *line, start]
    image = [special.vision_start, special.image_pad, special.vision_end]
    self._first_image, self._next_image = [*user, *image], [*line, *image]

  def frame(self, question: str, images: int) -> Frame:
    opening = [*self._head]
    if images:
      opening += [*self._first_image, *self._next_image * (images - 1)]
    text = f"\n{question}" if images else f"user\n### Question:\n{question}"
    return Frame((opening,), f"{text}\n\n### Solution Process:\n", text, alone=text)
