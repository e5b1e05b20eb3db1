"""The forms of requests, and of their answers: ours, vLLM's `/pooling`, OpenRLHF's `/get_reward`.

A form is a function (JSON value, aggregation or "", name of the model) -> `Asked`.
"""

import dataclasses
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np

from bis_jax import files
from bis_jax.errors import UserError
from bis_jax.evaluation.best_of_n import AGGREGATIONS
from bis_jax.evaluation.json_records import EvaluationError, convert
from bis_jax.inputs.prompt import STEP_MARKER
from bis_jax.inputs.texts import split_steps
from bis_jax.scoring.solutions import Record, SolutionError

AGGREGATES = ("min", "product", "last", "mean")
_T = TypeVar("_T")
Result = np.ndarray | SolutionError  # the step scores of a solution, or why it has none


class FormError(UserError):
  """A request that does not have its documented form."""


class UnknownModelError(FormError):
  """A request for another model than the one that is served."""


@dataclasses.dataclass(frozen=True)
class Asked:
  """The solutions of a request, and the function that answers it with their results."""

  records: list[Record]
  answer: Callable[[Sequence[Result]], dict]


Form = Callable[[Any, str, str], Asked]


def _converted(value: object, form: type[_T]) -> _T:
  try:
    return convert(value, form)
  except EvaluationError as error:
    raise FormError(str(error)) from error


def _record(value: object) -> Record:
  try:
    return Record.of(value)
  except SolutionError as error:
    raise FormError(str(error)) from error


# Ours.


class _Group(msgspec.Struct, forbid_unknown_fields=True):
  solutions: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)]
  question: Any = None  # of all solutions that have none, and so the images
  image: Any = None
  images: Any = None


def score_form(value: Any, aggregate: str, _: str) -> Asked:
  """One solution, or `solutions` with their own `id`s, which may share question and images."""
  if not (isinstance(value, dict) and "solutions" in value):
    record = _record(value)
    return Asked([record], lambda results: _entry(record, _score(results[0]), aggregate))
  group = _converted(value, _Group)
  records = []
  for i, own in enumerate(group.solutions):
    shared = {"question": group.question}
    if not own.keys() & {"image", "images"}:
      shared |= {"image": group.image, "images": group.images}
    try:
      records.append(_record(shared | own))
    except FormError as error:
      raise FormError(f"`solutions[{i}]`: {error}") from error

  def answer(results: Sequence[Result]) -> dict:
    if all(isinstance(result, SolutionError) for result in results):
      _score(results[0])
    pairs = zip(records, results, strict=True)
    return {"solutions": [_entry(record, result, aggregate) for record, result in pairs]}

  return Asked(records, answer)


def _score(result: Result) -> np.ndarray:
  if isinstance(result, SolutionError):
    raise result
  return result


def _entry(record: Record, result: Result, aggregate: str) -> dict:
  entry = {} if record.id is None else {"id": record.id}
  if isinstance(result, SolutionError):
    return entry | {"error": str(result)}
  if record.response is not None:
    entry["steps"] = record.steps
  if aggregate:
    entry["score"] = _aggregated(result, aggregate)
  return entry | {"scores": _floats(result)}


def _floats(scores: np.ndarray) -> list[float]:
  return [float(score) for score in scores]


def _aggregated(scores: np.ndarray, aggregate: str) -> float:
  return float(AGGREGATIONS[aggregate](scores))


# vLLM's (vllm/entrypoints/pooling/pooling/protocol.py).


class _ImageUrl(msgspec.Struct, forbid_unknown_fields=True):
  url: str
  detail: str | None = None  # of no consequence in vLLM either


class _Text(msgspec.Struct, tag="text", forbid_unknown_fields=True):
  text: str


class _Image(msgspec.Struct, tag="image_url", forbid_unknown_fields=True):
  image_url: _ImageUrl


class _Message(msgspec.Struct, forbid_unknown_fields=True):
  role: Literal["system", "user", "assistant"]
  content: str | list[_Text | _Image]

  @property
  def text(self) -> str:
    if isinstance(self.content, str):
      return self.content
    return "\n".join(part.text for part in self.content if isinstance(part, _Text))


class _Pooling(msgspec.Struct, forbid_unknown_fields=True):
  messages: list[_Message]
  model: str | None = None
  task: Literal["token_classify"] | None = None
  encoding_format: Literal["float"] = "float"
  # These change no score: nothing after the last step marker does.
  user: str | None = None
  request_id: str | None = None
  priority: int = 0
  add_generation_prompt: bool = False
  continue_final_message: bool = False
  add_special_tokens: bool = False


def pooling_form(value: Any, aggregate: str, name: str) -> Asked:
  """Messages; [P(correct), P(not correct)] at every step marker of the assistant's."""
  if aggregate:
    raise FormError("/pooling answers step scores only: leave `aggregate` out, or use /score")
  request = _converted(value, _Pooling)
  if request.model not in (None, name):
    raise UnknownModelError(f"the model {request.model!r} is not served; {name!r} is")
  roles = [message.role for message in request.messages]
  if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
    raise FormError("`messages` must be of a user, then of the assistant; before them a system's")
  user, assistant = (message.text for message in request.messages[-2:])
  if not user.strip():  # InternVL's training form has all in the assistant's turn
    user, _, assistant = assistant.partition("\nProcess: ")
  *steps, _ = assistant.strip().removeprefix("Process: ").split(STEP_MARKER)
  images = [
    part.image_url.url
    for message in request.messages
    if isinstance(message.content, list)
    for part in message.content
    if isinstance(part, _Image)
  ]
  record = Record(question=user.strip().removeprefix("Question: "), steps=steps, images=images)

  ident = f"pool-{request.request_id or uuid.uuid4().hex}"

  def answer(results: Sequence[Result]) -> dict:
    pairs = [[score, 1 - score] for score in _floats(_score(results[0]))]
    return {
      "id": ident,
      "object": "list",
      "created": int(time.time()),
      "model": name,
      "data": [{"index": 0, "object": "pooling", "data": pairs}],
    }

  return Asked([record], answer)


# OpenRLHF's (openrlhf/utils/agent.py and openrlhf/cli/serve_rm.py).


class _RemoteReward(msgspec.Struct, forbid_unknown_fields=True):
  query: list[str]
  prompts: list[str]
  labels: list[Any] | None = None


_IMAGE_TOKENS = re.compile(r"<\|(?:vision_start|vision_end|image_pad)\|>|</?img>|<IMG_CONTEXT>")
_USER_TURN = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)
_END = re.compile(r"<\|im_end\|>|<\|endoftext\|>|<\|eot_id\|>|</s>")


def reward_form(value: Any, aggregate: str, _: str) -> Asked:
  """Texts of prompts and of prompts with responses; a reward for each, 0 for one without scores.

  OpenRLHF sends no images; a label that is a JSON object may hold them as `images`.
  """
  request = _converted(value, _RemoteReward)
  labels = request.labels or [None] * len(request.query)
  if not len(request.query) == len(request.prompts) == len(labels):
    raise FormError("`query`, `prompts` and `labels` must be lists of the same length")
  if not request.query:
    raise FormError("`query` is empty")
  triples = zip(request.query, request.prompts, labels, strict=True)
  records = [_reward_record(i, *triple) for i, triple in enumerate(triples)]

  def answer(results: Sequence[Result]) -> dict:
    found = [
      0.0 if isinstance(result, SolutionError) else _aggregated(result, aggregate or "min")
      for result in results
    ]
    failed = [float(isinstance(result, SolutionError)) for result in results]
    steps = [0.0 if isinstance(result, SolutionError) else float(len(result)) for result in results]
    return {"rewards": found, "scores": found, "extra_logs": {"unscored": failed, "steps": steps}}

  return Asked(records, answer)


def _reward_record(i: int, query: str, prompt: str, label: Any) -> Record:
  query, prompt = _IMAGE_TOKENS.sub("", query), _IMAGE_TOKENS.sub("", prompt)
  start = query.find(prompt)  # after what the tokenizer adds, such as a first <s>
  if start < 0 or _USER_TURN.search(query[:start]):
    raise FormError(f"`query[{i}]` does not begin with `prompts[{i}]`")
  turns = _USER_TURN.findall(prompt)
  images = []
  if isinstance(label, str) and label.lstrip().startswith("{"):
    try:
      label = files.parse_json(label.encode())
    except ValueError as error:
      raise FormError(f"`labels[{i}]` is not valid JSON: {error}") from error
  if isinstance(label, dict):
    images = label.get("images") or []
  response = _END.split(query[start + len(prompt) :])[0]
  return _record(
    {"question": turns[-1] if turns else prompt, "steps": split_steps(response), "images": images}
  )
