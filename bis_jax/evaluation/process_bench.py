"""Loads text benchmarks in ProcessBench's layout (arXiv:2412.06559).

A folder with one file per subset, `gsm8k.json`, `math.json`, ...: a JSON list of

    {"id": "gsm8k-0", "generator": "Qwen2-7B-Instruct", "problem": "...", "steps": ["...", ...],
     "final_answer_correct": false, "label": 1}

`label` is the first erroneous step counted from 0, or -1 if every step is correct.
"""

import os
from collections.abc import Iterator
from typing import Any

import msgspec
from etils import epath

from bis_jax import files
from bis_jax.evaluation import json_records
from bis_jax.evaluation.json_records import EvaluationError
from bis_jax.evaluation.visual_process_bench import BenchmarkItem, Steps
from bis_jax.inputs.texts import question_text


class _Record(msgspec.Struct):
  problem: str
  steps: Steps
  label: int
  generator: Any = "unknown"
  final_answer_correct: Any = ""


def load(folder: str | os.PathLike) -> list[BenchmarkItem]:
  """Returns the checked items of every `*.json` of `folder`, sorted by file name.

  Raises an EvaluationError that lists every fault with its item.
  """
  paths = sorted(epath.Path(folder).glob("*.json"))
  if not paths:
    raise FileNotFoundError(f"no *.json in {folder}: give the folder of ProcessBench's subsets")
  return json_records.parse_items(folder, _records(paths), _parse)


def _records(paths: list[epath.Path]) -> Iterator[tuple[str, tuple[str, object]]]:
  for path in paths:
    remedy = "it must be a JSON list of items"
    records = files.read_json(path, remedy, list[Any], EvaluationError)
    for position, record in enumerate(records):
      yield f"{path.name} item {position}", (path.stem, record)


def _parse(index: int, subset_and_record: tuple[str, object]) -> BenchmarkItem:
  subset, value = subset_and_record
  record = json_records.convert(value, _Record)
  label, steps = record.label, len(record.steps)  # steps after the first error are unlabelled
  if not -1 <= label < steps:
    raise EvaluationError(f"`label` is {label}; it must be -1 or one of the {steps} steps")
  return BenchmarkItem(
    index=index,
    question=question_text(record.problem),
    images=(),
    image_sizes=(),
    steps=record.steps,
    labels=(1,) * steps if label < 0 else (1,) * label + (-1,) + (0,) * (steps - label - 1),
    data_source=subset,
    policy_model=str(record.generator),
    answer=str(record.final_answer_correct),
  )
