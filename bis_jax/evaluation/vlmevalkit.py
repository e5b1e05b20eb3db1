"""Result files of VLMEvalKit as Best-of-N candidates: one file a sample, a row a question.

A row has `index`, `question` and `prediction`; most benchmarks add `answer`, choices `A`, `B`, ..., and a
judge `hit`, `verifier_match`, or `res`, the answer that it extracted. The images are in the benchmark's
own TSV file. (vlmeval/inference.py and vlmeval/dataset/image_vqa.py there, August 2026.)
"""

import base64
import csv
import io
import string
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from bis_jax import files
from bis_jax.errors import UserError
from bis_jax.evaluation import answers
from bis_jax.evaluation.best_of_n import Candidate, Question
from bis_jax.evaluation.json_records import EvaluationError
from bis_jax.inputs.texts import split_steps

SUFFIXES = (".xlsx", ".tsv", ".csv", ".json")  # .json is one list; JSON lines are not
_FAILED = "Failed to obtain answer"  # written for a prediction that was not made
_SHORTEST_IMAGE = 64  # a shorter text in the column is the index of the row that has the image


def are_results(paths: Sequence[str]) -> bool:
  """Returns whether the files are of a format that VLMEvalKit writes."""
  return all(
    path.endswith(SUFFIXES)
    and not (path.endswith(".json") and not files.absolute(path).read_bytes()[:1] == b"[")
    for path in paths
  )


def read(paths: Sequence[str]) -> list[Question]:
  """Returns the questions of the files, each with a candidate a file, which has no scores yet."""
  samples = [_rows(path, ("index", "question", "prediction")) for path in paths]
  questions = []
  for index, row in samples[0].items():
    for path, sample in zip(paths[1:], samples[1:], strict=True):
      if index in sample and sample[index]["question"] != row["question"]:
        raise EvaluationError(
          f"{path}: index {index} asks another question than in {paths[0]}: name files of one "
          "benchmark"
        )
    candidates = [_candidate(sample[index]) if index in sample else None for sample in samples]
    questions.append(Question(id=index, question=str(row["question"]), candidates=candidates))
  missing = {index for sample in samples[1:] for index in sample} - samples[0].keys()
  if missing:
    raise EvaluationError(f"{paths[0]} has no index {min(missing)}, which another file has")
  return questions


def _candidate(row: dict[str, Any]) -> Candidate | None:
  response = row["prediction"]
  if response is None or _FAILED in str(response) or not (steps := split_steps(str(response))):
    return None
  options = [letter for letter in string.ascii_uppercase[:8] if row.get(letter) is not None]
  answer = row.get("res") or answers.extracted(str(response), options)
  judged = next((row[key] for key in ("hit", "verifier_match") if row.get(key) is not None), None)
  if judged is None:
    wanted = [row[key] for key in ("answer", "answer_option") if row.get(key) is not None]
    if not wanted:
      raise EvaluationError(
        f"index {row['index']} has neither `hit`, `verifier_match` nor `answer`: name files that "
        "VLMEvalKit has judged"
      )
    judged = answer is not None and any(answers.same(str(one), str(answer)) for one in wanted)
  return Candidate(
    correct=bool(float(judged)), answer=None if answer is None else str(answer), steps=steps
  )


def images(path: str, indices: Sequence[str]) -> dict[str, list[bytes]]:
  """Returns the encoded images of questions from a benchmark's TSV file."""
  rows = _rows(path, ("index", "image"))
  found = {}
  for index in indices:
    if index not in rows:
      raise EvaluationError(f"{path} has no index {index}: name the TSV file of the same benchmark")
    image = str(rows[index]["image"])
    if len(image) <= _SHORTEST_IMAGE and image in rows:
      image = str(rows[image]["image"])
    try:
      several = files.parse_json(image.encode()) if image.startswith("[") else [image]
      found[index] = [base64.b64decode(one, validate=True) for one in several]
    except (ValueError, TypeError) as error:
      raise EvaluationError(f"{path}: the image of index {index} is not base64: {error}") from error
  return found


def _rows(path: str, needed: Iterable[str]) -> dict[str, dict[str, Any]]:
  """Returns {index: row}; what is empty is None."""
  content = files.absolute(path).read_bytes()
  try:
    if path.endswith(".json"):
      rows = files.parse_json(content)
    elif path.endswith(".xlsx"):
      rows = _sheet(content)
    else:
      csv.field_size_limit(sys.maxsize)
      dialect = "excel-tab" if path.endswith(".tsv") else "excel"
      rows = [*csv.DictReader(io.StringIO(content.decode(), newline=""), dialect=dialect)]
    found = {
      str(row["index"]): {
        key: None if value == "" or value != value else value for key, value in row.items()
      }
      for row in rows
    }
  except UserError:
    raise
  except Exception as error:  # a damaged workbook raises many types of errors
    raise EvaluationError(
      f"{path} is not a table with a column `index`: {type(error).__name__}: {error}"
    ) from error
  for key in needed:
    if not all(key in row for row in found.values()):
      raise EvaluationError(f"{path} has no column `{key}`: name a result file of VLMEvalKit")
  if not found:
    raise EvaluationError(f"{path} has no rows")
  if len(found) < len(rows):
    raise EvaluationError(f"{path} has an index twice")
  return found


def _sheet(content: bytes) -> list[dict[str, Any]]:
  try:
    import openpyxl
  except ModuleNotFoundError as error:
    raise UserError("openpyxl is not installed; run: pip install 'bis_jax[best_of_n]'") from error
  sheet = openpyxl.load_workbook(io.BytesIO(content), read_only=True, data_only=True).worksheets[0]
  head, *rows = sheet.iter_rows(values_only=True)
  return [dict(zip(map(str, head), row, strict=True)) for row in rows]
