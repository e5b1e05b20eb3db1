"""Writes the kept records in one of several forms.

raw            the annotation lines, unchanged or converted, in file order
conversations  {"image": ..., "conversations": [{"from": "human", "value": "Question: ...\\nProcess:
               step 1<prm>\\n\\nstep 2<prm>"}, {"from": "gpt", "value": [1.0, 0.0]}]}
trl            {"prompt", "completions", "labels", "images"}, TRL's stepwise supervision
openrlhf       {"input": question and steps, "ки" after each, "label": ["+", "-"], "question"}
dataset        a folder that `datasets.load_dataset` reads, with a card
parquet        the same rows in one Parquet file
"""

import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from etils import epath

from bis_jax import files
from bis_jax.console import log
from bis_jax.corpus import records
from bis_jax.corpus.containers import ConvertedFile
from bis_jax.corpus.formats import PLACEHOLDER
from bis_jax.corpus.image_root import EMBEDDED
from bis_jax.corpus.reading import AnnotationFile
from bis_jax.corpus.score_table import ScoreTable, positive_and_counted
from bis_jax.errors import UserError
from bis_jax.selection.manifest import Manifest

IGNORED_LABEL = -100.0  # of unmeasured steps if they are ignored; PyTorch's convention
Line = tuple[str, int, bytes]  # source, line number, raw line

_MARKER = "<prm>"
_ROW_GROUP = 20_000  # rows of a Parquet file that are written and read at a time
# Types of the dataset's columns, in order.
_COLUMNS = {
  "id": "dtype: string",
  "source": "dtype: string",
  "images": "sequence: string",
  "question": "dtype: string",
  "answer": "dtype: string",
  "steps": "sequence: string",
  "mc_scores": "sequence: float64",
  "num_mc_correct": "sequence: int64",
  "num_mc_total": "sequence: int64",
  "labels": "sequence: float64",
}


def kept_lines(
  annotations: Sequence[AnnotationFile], table: ScoreTable, manifest: Manifest
) -> Iterator[Line]:
  """Yields the lines of the kept rollouts in file-name order and file order.

  Raises AnnotationError if a file is damaged or has changed since the table was made.
  """
  by_source = {file.source: file for file in annotations}
  for index, kept in enumerate(manifest.sources):
    rows = table.rows_of(index)
    rows = rows.start + np.searchsorted(table.line[rows], kept.lines)
    lines = by_source[kept.name].read_lines(
      table.offset[rows].tolist(), table.length[rows].tolist()
    )
    for number, line in zip(kept.lines.tolist(), lines, strict=True):
      yield kept.name, number, line


def noting_images(lines: Iterable[Line], found: set[str]) -> Iterator[Line]:
  """Yields lines, and adds the references of images in columns to `found`."""
  for line in lines:
    image = _record(line[2]).get("image") or []
    names = image if isinstance(image, list) else [image]
    found.update(name for name in names if str(name).startswith(EMBEDDED))
    yield line


def write_images(
  folder: epath.Path, annotations: Sequence[AnnotationFile], wanted: set[str]
) -> None:
  """Writes images stored in columns as files of an image root; the records name them so."""
  for file in annotations:
    if isinstance(file, ConvertedFile) and file.embeds_images():
      for group in range(file.groups()):
        for reference, content in file.embedded_images(group):
          if reference in wanted:
            with files.replacing(folder / reference) as image:
              image.write(content)


def write_raw(path: epath.Path, lines: Iterable[Line], manifest: Manifest) -> None:
  _write_lines(path, (line for _, _, line in lines))


def write_conversations(path: epath.Path, lines: Iterable[Line], manifest: Manifest) -> None:
  """Writes the kept records in the form that PyTorch trainers of MPRMs read."""
  _write_lines(path, _encoded(lines, _conversation, manifest))


def write_dataset(folder: epath.Path, lines: Iterable[Line], manifest: Manifest) -> None:
  _write_lines(folder / "data" / "train.jsonl", _encoded(lines, _row, manifest))
  files.write_text(folder / "README.md", _card(manifest))


def write_trl(path: epath.Path, lines: Iterable[Line], manifest: Manifest) -> None:
  _write_lines(path, _encoded(lines, _trl, manifest))


def write_openrlhf(path: epath.Path, lines: Iterable[Line], manifest: Manifest) -> None:
  """Raises UserError naming a record whose text holds the placeholder."""
  _write_lines(path, _encoded(lines, _openrlhf, manifest))


def write_parquet(path: epath.Path, lines: Iterable[Line], manifest: Manifest) -> None:
  import pyarrow.parquet  # here: it takes longer than a selection from a table

  schema = pyarrow.schema([(name, _arrow_type(pyarrow, kind)) for name, kind in _COLUMNS.items()])
  rows = map(msgspec.json.decode, _encoded(lines, _row, manifest))
  with files.replacing(path) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
    while group := list(itertools.islice(rows, _ROW_GROUP)):
      writer.write_table(pyarrow.Table.from_pylist(group, schema))


def _arrow_type(arrow: Any, kind: str) -> Any:
  outer, _, name = kind.partition(": ")
  return arrow.list_(arrow.type_for_alias(name)) if outer == "sequence" else arrow.string()


# {form: function that writes it, and what it does with image placeholders in questions}
WRITERS = {
  "raw": (write_raw, "kept"),
  "conversations": (write_conversations, "kept"),  # as the released builder, see `paper_question`
  "dataset": (write_dataset, "removed"),
  "parquet": (write_parquet, "removed"),
  "trl": (write_trl, "removed"),
  "openrlhf": (write_openrlhf, "removed"),
}


def _write_lines(path: epath.Path, lines: Iterable[bytes]) -> None:
  with files.replacing(path) as file:
    file.writelines(line + b"\n" for line in lines)


def _encoded(
  lines: Iterable[Line], form: Callable[..., dict[str, Any]], manifest: Manifest
) -> Iterator[bytes]:
  """Yields the JSON of `form(source, number, record, manifest)` for each line."""
  for source, number, line in lines:
    row = form(source, number, _record(line), manifest)
    try:
      yield msgspec.json.encode(row)
    except UnicodeEncodeError:  # which `paper` order accepts, and no JSON reader does
      log.warning("%s:%d holds half of a surrogate pair: written as U+FFFD", source, number)
      yield re.sub("[\ud800-\udfff]", "\ufffd", json.dumps(row, ensure_ascii=False)).encode()


def _record(line: bytes) -> dict[str, Any]:
  try:
    return msgspec.json.decode(line)
  except msgspec.DecodeError:  # NaN, long numbers and others, which `paper` order accepts
    return records.load_object(line, order="paper")


def _labels(record: dict[str, Any], manifest: Manifest) -> list[float]:
  """Returns 1.0 for positive steps, else 0.0; IGNORED_LABEL for steps that do not count."""
  scores, totals = map(np.array, records.paper_scores(record))
  positive, counted = positive_and_counted(scores, totals != 0, manifest.tau, manifest.unmeasured)
  return np.where(counted, positive, IGNORED_LABEL).tolist()


def _conversation(
  source: str, number: int, record: dict[str, Any], manifest: Manifest
) -> dict[str, Any]:
  steps = [step["step"].strip() + _MARKER for step in record["steps_with_score"]]
  text = f"Question: {records.paper_question(record)}\nProcess: " + "\n\n".join(steps)
  return {
    "image": record.get("image"),
    "conversations": [
      {"from": "human", "value": text},
      {"from": "gpt", "value": _labels(record, manifest)},
    ],
  }


def _row(source: str, number: int, record: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
  answer, steps = record.get("answer"), record["steps_with_score"]
  scores, _ = records.paper_scores(record)
  return {
    "id": f"{source}:{number}",
    "source": source,
    "images": _images(record),
    "question": records.question_of(record),
    "answer": "" if answer is None else str(answer),
    "steps": _steps(record),
    "mc_scores": scores,
    "num_mc_correct": [step.get("num_mc_correct") for step in steps],
    "num_mc_total": [step.get("num_mc_total") for step in steps],
    "labels": _labels(record, manifest),
  }


def _images(record: dict[str, Any]) -> list[str]:
  image = record.get("image") or []
  return [str(name) for name in image] if isinstance(image, list) else [str(image)]


def _steps(record: dict[str, Any]) -> list[str]:
  return [step["step"].strip() for step in record["steps_with_score"]]


def _trl(source: str, number: int, record: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
  labels: list[Any] = _labels(record, manifest)
  return {
    "id": f"{source}:{number}",
    "prompt": records.question_of(record),
    "completions": _steps(record),
    "labels": labels if manifest.unmeasured == "ignore" else [label > 0 for label in labels],
    "images": _images(record),
  }


def _openrlhf(
  source: str, number: int, record: dict[str, Any], manifest: Manifest
) -> dict[str, Any]:
  question, steps = records.question_of(record), _steps(record)
  if any(PLACEHOLDER in text for text in (question, *steps)):
    raise UserError(
      f"{source}:{number} holds {PLACEHOLDER!r}, which is after every step of --format=openrlhf: write "
      "another format"
    )
  labels: list[Any] = _labels(record, manifest)
  if manifest.unmeasured != "ignore":
    labels = ["+" if label > 0 else "-" for label in labels]
  text = "".join(f"{step} {PLACEHOLDER}\n" for step in steps)
  return {
    "id": f"{source}:{number}",
    "input": f"{question}\n{text}",
    "label": labels,
    "question": question,
    "images": _images(record),
  }


def _card(manifest: Manifest) -> str:
  import jinja2  # here: with its imports, reading a table would take longer than selecting from it

  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
  )
  return environment.get_template("dataset_card.md").render(
    manifest=manifest,
    kept=len(manifest),
    ranked=sum(source.scorable for source in manifest.sources),
    size_category=_size_category(len(manifest)),
    columns=_COLUMNS,
  )


def _size_category(rows: int) -> str:
  bounds = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6))
  return next((name for name, bound in bounds if rows < bound), "1M<n<10M")
