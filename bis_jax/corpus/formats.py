"""The record formats that corpora come in, each as a function to the layout of VisualPRM400K-Raw.

    TRL             {"prompt": "q", "completions": ["a", "b"], "labels": [true, false]}
    in that layout  {"question_orig": "q", "steps_with_score": [{"step": "a", "score": 1.0}, ...]}

Labels without counts are hard labels: scores of 1 and 0. A step without a label (-100, null) is one
without continuations, 0 of 0, and PRM800K's neutral rating is a score of 0.5. Values that are wrong
within a record are left for `records` to reject; `Malformed` is a record whose parts do not fit.

Sources: the datasets' own descriptions: TRL's "stepwise supervision", PRM800K (arXiv:2305.20050),
Math-Shepherd (arXiv:2312.08935), OpenRLHF's process reward datasets, MM-PRM (arXiv:2505.13427).
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bis_jax.corpus.rejections import BadRecord

Record = dict[str, Any]
RAW, AUTO = "raw", "auto"
STEP_MARKER = "<prm>"
PLACEHOLDER = "ки"  # of Math-Shepherd and OpenRLHF, after every step
UNLABELLED = -100  # PyTorch's convention
NEUTRAL = 0.5
_PLACEHOLDER = re.compile(rf"(?:^|\s){PLACEHOLDER}(?=\s|$)")
_SIGNS = {"+": 1.0, "-": 0.0}
_RATINGS = {1: 1.0, 0: NEUTRAL, -1: 0.0, None: UNLABELLED}
_FIRST_STEP = re.compile(r"(?=\bStep 1\b)")
_PROCESS = re.compile(r"\n+(?:Process:|### Solution Process:)\s*")
_QUESTION = re.compile(r"^\s*(?:<image>\s*)*(?:Question:|### Question:)\s*")


def scored(texts: Any, labels: Any) -> list[Record]:
  """Returns steps with their labels as scores; raises BadRecord if their numbers differ."""
  for name, values in (("steps", texts), ("labels", labels)):
    if not isinstance(values, list):
      raise BadRecord("wrong_label_count", f"the {name} are {type(values).__name__}, not a list")
  if len(texts) != len(labels):
    raise BadRecord("wrong_label_count", f"{len(texts)} steps, but {len(labels)} labels")
  return [_step(text, label) for text, label in zip(texts, labels, strict=True)]


def _step(text: Any, label: Any) -> Record:
  if label is None or (isinstance(label, int | float) and label == UNLABELLED):
    return {"step": text, "score": 0.0, "num_mc_correct": 0, "num_mc_total": 0}
  if isinstance(label, str):
    label = _SIGNS.get(label.strip(), label)
  return {"step": text, "score": float(label) if isinstance(label, bool) else label}


def marked(text: Any, marker: re.Pattern[str] | str) -> list[str]:
  """Returns the texts before each marker; raises BadRecord if other text follows the last one."""
  if not isinstance(text, str):
    raise BadRecord("no_steps", f"the text is {type(text).__name__}, not a string")
  *steps, rest = re.split(marker, text)
  if rest.strip() or not steps:
    raise BadRecord("no_steps", f"no step marker after {rest.strip()[:40]!r}")
  return steps


def _raw(record: Record) -> Record:
  return record


def _conversations(record: Record) -> Record:
  turns = record["conversations"]
  if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
    raise BadRecord("no_steps", "conversations is not a list of turns")
  said = {
    name: [turn.get("value") for turn in turns if turn.get("from") == name]
    for name in ("human", "gpt")
  }
  if not said["human"] or not isinstance(said["human"][0], str):
    raise BadRecord("no_steps", "no text of a human in conversations")
  question, *process = _PROCESS.split(said["human"][0], maxsplit=1)
  if not process:
    raise BadRecord("no_steps", "no Process: in the first text of conversations")
  one_list = len(said["gpt"]) == 1 and isinstance(said["gpt"][0], list)
  steps = marked(process[0], STEP_MARKER) if one_list else [*process, *said["human"][1:]]
  labels = said["gpt"][0] if one_list else said["gpt"]
  return _of(record, _QUESTION.sub("", question), scored(steps, labels))


def _trl(record: Record) -> Record:
  return _of(record, record["prompt"], scored(record["completions"], record["labels"]))


def _prm800k(record: Record) -> Record:
  question, label = record["question"], record["label"]
  steps = label.get("steps")
  if not isinstance(steps, list):
    raise BadRecord("no_steps", f"label.steps is {type(steps).__name__}, not a list")
  chosen = list(itertools.starmap(_chosen, enumerate(steps)))
  texts = [step.get("text") for step in chosen]
  labels = [_RATINGS.get(step.get("rating"), step.get("rating")) for step in chosen]
  answer = question.get("ground_truth_answer")
  return _of({"answer": answer} | record, question.get("problem"), scored(texts, labels))


def _chosen(at: int, step: Any) -> Record:
  """Returns the completion that the next step continues; the human's own is right."""
  try:
    completions, chosen = step.get("completions") or [], step.get("chosen_completion")
    if chosen is not None:
      return completions[chosen]
    if human := step.get("human_completion"):
      return {"rating": 1} | {k: v for k, v in human.items() if v is not None}
    return completions[0]
  except (AttributeError, IndexError, TypeError) as error:
    raise BadRecord("no_steps", f"label.steps[{at}] has no chosen completion: {error}") from None


def _math_shepherd(record: Record) -> Record:
  texts, rest, labels = marked(record["input"], _PLACEHOLDER), record["label"], []
  for at, text in enumerate(texts):
    if not rest.startswith(text):
      raise BadRecord("wrong_label_count", f"label has another step {at} than input")
    sign, rest = rest[len(text) :].lstrip()[:1], rest[len(text) :].lstrip()[1:]
    labels.append(sign)
  return _with_question(record, texts, labels)


def _openrlhf(record: Record) -> Record:
  labels = record[_label_key(record)]
  text = record["input"] if "input" in record else record["inputs"]
  return _with_question(record, marked(text, _PLACEHOLDER), labels)


def _label_key(record: Mapping[str, Any]) -> str:
  keys = ("label", "labels", "value", "values")
  return next((key for key in keys if isinstance(record.get(key), list)), "")


def _with_question(record: Record, texts: list[str], labels: Any) -> Record:
  """Takes the question from before the first step: up to "Step 1", or to the first line's end."""
  known, first = record.get("question"), texts[0]
  if isinstance(known, str) and first.startswith(known):
    question, first = known, first[len(known) :]
  else:
    parts = _FIRST_STEP.split(first, maxsplit=1)
    question, first = parts if len(parts) == 2 else first.rpartition("\n")[::2]
  return _of(record, question, scored([first, *texts[1:]], labels))


def _dataset(record: Record) -> Record:
  steps = scored(record["steps"], record["mc_scores"])
  for name in ("num_mc_correct", "num_mc_total"):
    counts = record.get(name) or [None] * len(steps)
    if not isinstance(counts, list) or len(counts) != len(steps):
      raise BadRecord("wrong_label_count", f"{len(steps)} steps, but other {name}")
    for step, count in zip(steps, counts, strict=True):
      step |= {} if count is None else {name: count}
  return _of(record, record["question"], steps)


def _of(record: Record, question: Any, steps: list[Record]) -> Record:
  if not isinstance(question, str | None):
    raise BadRecord("not_text", f"the question is {type(question).__name__}, not a string")
  images = next((record[key] for key in ("images", "image") if record.get(key)), None)
  return {
    "image": images[0] if isinstance(images, list) and len(images) == 1 else images,
    "question": question,
    "answer": record.get("answer"),
    "steps_with_score": steps,
  }


@dataclass(frozen=True)
class Format:
  keys: str  # that all its records have, for people
  has: Callable[[Record], bool]  # whether a record is of this format
  read: Callable[[Record], Record]  # raises BadRecord, or KeyError naming a key


def _has(*keys: str, **types: type) -> Callable[[Record], bool]:
  return lambda record: (
    all(key in record for key in keys)
    and all(isinstance(record.get(key), kind) for key, kind in types.items())
  )


def _is_openrlhf(record: Record) -> bool:
  return bool(("input" in record or "inputs" in record) and _label_key(record))


# In the order in which they are tried.
FORMATS = {
  RAW: Format("steps_with_score", _has("steps_with_score"), _raw),
  "conversations": Format("conversations", _has("conversations"), _conversations),
  "trl": Format("prompt, completions, labels", _has("prompt", "completions", "labels"), _trl),
  "dataset": Format("question, steps, mc_scores", _has("question", "steps", "mc_scores"), _dataset),
  "prm800k": Format("question.problem, label.steps", _has(question=dict, label=dict), _prm800k),
  "openrlhf": Format("input: a text, label: a list", _is_openrlhf, _openrlhf),
  "math_shepherd": Format("input, label: texts", _has(input=str, label=str), _math_shepherd),
}
NAMES = (AUTO, *FORMATS)


def format_of(record: Record) -> str | None:
  """Returns the name of the format of a record, by its keys; None: unknown."""
  return next((name for name, form in FORMATS.items() if form.has(record)), None)


def converted(record: Record, name: str) -> Record:
  """Returns a record of a format in the raw layout; raises BadRecord."""
  if not FORMATS[name].has(record):
    keys: Sequence[str] = sorted(map(str, record))
    raise BadRecord(
      "other_format", f"not {name} ({FORMATS[name].keys}); its keys: {', '.join(keys)}"
    )
  return FORMATS[name].read(record)


def agreeing(record: Record, key: str) -> Record:
  """Returns a raw record whose steps count as measured only where two completers agree.

  `key`, if any, names the second one's MC score beside `score`; they agree if both are 0 or both
  above. Raises BadRecord for a step without it.
  """
  steps = record.get("steps_with_score")
  for at, step in enumerate(steps if key and isinstance(steps, list) else ()):
    second = step.get(key) if isinstance(step, dict) else None
    if not isinstance(second, int | float):
      raise BadRecord("missing_score", f"step {at}: {key} is {second!r}, not a number")
    if isinstance(step.get("score"), int | float) and (step["score"] > 0) != (second > 0):
      step |= {"score": 0.0, "num_mc_correct": 0, "num_mc_total": 0}
  return record


def known() -> str:
  return "; ".join(f"{name} ({form.keys})" for name, form in FORMATS.items())
