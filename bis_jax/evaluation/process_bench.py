"""Text benchmarks in the layouts of ProcessBench (arXiv:2412.06559) and PRMBench (arXiv:2501.03124).

ProcessBench: {"problem": "...", "steps": ["...", ...], "label": 1, "generator": "Qwen2-7B-Instruct"},
one file per subset, `gsm8k`, `math`, ...; `label` is the first erroneous step counted from 0, or -1.

PRMBench: {"modified_question": "...", "modified_process": ["...", ...], "error_steps": [2, 4],
"classification": "circular"}; steps count from 1, and several may be wrong. Its unmodified
solutions, which only its measure of similarity reads, are left out.
"""

from typing import Any

import msgspec

from bis_jax.evaluation import json_records
from bis_jax.evaluation.json_records import EvaluationError
from bis_jax.evaluation.visual_process_bench import BenchmarkItem, Steps
from bis_jax.inputs.texts import question_text


class _ProcessBench(msgspec.Struct):
  problem: str
  steps: Steps
  label: int
  generator: Any = "unknown"
  final_answer_correct: Any = ""


class _PRMBench(msgspec.Struct):
  modified_question: str
  modified_process: Steps
  error_steps: tuple[int, ...]
  classification: str


def parse(index: int, subset_and_record: tuple[str, object]) -> BenchmarkItem:
  """Returns the item of a record of ProcessBench."""
  subset, value = subset_and_record
  record = json_records.convert(value, _ProcessBench)
  label, steps = record.label, len(record.steps)  # steps after the first error are unlabelled
  if not -1 <= label < steps:
    raise EvaluationError(f"`label` is {label}; it must be -1 or one of the {steps} steps")
  return _item(
    index,
    record.problem,
    record.steps,
    (1,) * steps if label < 0 else (1,) * label + (-1,) + (0,) * (steps - label - 1),
    source=subset,
    policy=str(record.generator),
    answer=str(record.final_answer_correct),
  )


def parse_prm_bench(index: int, subset_and_record: tuple[str, object]) -> BenchmarkItem:
  """Returns the item of a record of PRMBench; its source is its class of error."""
  record = json_records.convert(subset_and_record[1], _PRMBench)
  steps = len(record.modified_process)
  if wrong := [step for step in record.error_steps if not 1 <= step <= steps]:
    raise EvaluationError(
      f"`error_steps` has {wrong[0]}; it must be one of the {steps} steps from 1"
    )
  labels = tuple(-1 if step in record.error_steps else 1 for step in range(1, steps + 1))
  question, source = record.modified_question, record.classification
  return _item(index, question, record.modified_process, labels, source=source)


def _item(
  index: int,
  question: str,
  steps: tuple[str, ...],
  labels: tuple[int, ...],
  *,
  source: str,
  policy: str = "unknown",
  answer: str = "",
) -> BenchmarkItem:
  return BenchmarkItem(
    index=index,
    question=question_text(question),
    images=(),
    image_sizes=(),
    steps=steps,
    labels=labels,
    data_source=source,
    policy_model=policy,
    answer=answer,
  )
