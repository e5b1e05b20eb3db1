"""The kept records on disk, for whoever trains on them: three forms of the same subset.

raw            the annotation lines as they stand, in file order
conversations  {"image": ..., "conversations": [{"from": "human", "value": "Question: ...\\nProcess:
               step 1<prm>\\n\\nstep 2<prm>"}, {"from": "gpt", "value": [1.0, 0.0]}]}
dataset        a folder that `datasets.load_dataset` reads, with a card
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from bis_jax.corpus import records
from bis_jax.corpus.reading import AnnotationFile
from bis_jax.corpus.score_table import ScoreTable
from bis_jax.selection.manifest import Manifest

IGNORED_LABEL = (
  -100.0
)  # label of an unmeasured step where such steps are ignored, as PyTorch has it

_MARKER = "<prm>"
_FLUSH = 128 << 10  # bytes gathered before they are written


def kept_lines(
  files: Sequence[AnnotationFile], table: ScoreTable, manifest: Manifest
) -> Iterator[tuple[str, int, bytes]]:
  """Yields (source, line number, raw line) of the kept rollouts: file-name order, file order.

  Raises:
    reading.AnnotationError: a file is damaged, or shorter than the table says.
  """
  by_source = {file.source: file for file in files}
  for index, kept in enumerate(manifest.sources):
    rows = table.rows_of(index)
    rows = rows.start + np.searchsorted(table.line[rows], kept.lines)
    lines = by_source[kept.name].read_lines(
      table.offset[rows].tolist(), table.length[rows].tolist()
    )
    for number, line in zip(kept.lines.tolist(), lines, strict=True):
      yield kept.name, number, line


def write_raw(path: pathlib.Path, lines: Iterator[tuple[str, int, bytes]]) -> None:
  """Writes the kept records as they stand, one a line; whole or not at all."""
  _write_lines(path, (line for _, _, line in lines))


def write_conversations(
  path: pathlib.Path, lines: Iterator[tuple[str, int, bytes]], manifest: Manifest
) -> None:
  """Writes the kept records in the form that PyTorch trainers of MPRMs read."""
  convert = functools.partial(_conversation, manifest=manifest)
  _write_lines(path, (_encode(convert(_record(line))) for _, _, line in lines))


def write_dataset(
  folder: pathlib.Path, lines: Iterator[tuple[str, int, bytes]], manifest: Manifest
) -> None:
  """Writes a folder for Hugging Face `datasets`: data/train.jsonl, manifest.json and a card.

  The card is written last.
  """
  (folder / "data").mkdir(parents=True, exist_ok=True)
  rows = (_row(source, number, _record(line), manifest) for source, number, line in lines)
  _write_lines(folder / "data" / "train.jsonl", map(_encode, rows))
  manifest.save(folder / "manifest.json")
  (folder / "README.md").write_text(_card(manifest), encoding="utf-8")


def _write_lines(path: pathlib.Path, lines: Iterator[bytes]) -> None:
  part = path.with_name(path.name + ".part")
  with part.open("wb", buffering=_FLUSH) as file:
    for line in lines:
      file.write(line)
      file.write(b"\n")
  part.replace(path)


_encode: Callable[[Any], bytes] = msgspec.json.Encoder().encode


def _record(line: bytes) -> dict[str, Any]:
  try:
    return msgspec.json.decode(line)
  except msgspec.DecodeError:  # NaN and the like, which `paper` order takes for numbers
    return records.load_object(line)


def _labels(record: dict[str, Any], manifest: Manifest) -> list[float]:
  """Returns 1.0 where the MC score is above tau, else 0.0; IGNORED_LABEL where it is not counted."""
  scores, measured = records.paper_scores(record)
  ignore = manifest.unmeasured == "ignore"
  return [
    IGNORED_LABEL if ignore and not known else float(score > manifest.tau)
    for score, known in zip(scores, measured, strict=True)
  ]


def _conversation(record: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
  steps = [step["step"].strip() + _MARKER for step in record["steps_with_score"]]
  text = f"Question: {records.question_of(record)}\nProcess: " + "\n\n".join(steps)
  return {
    "image": record["image"],
    "conversations": [
      {"from": "human", "value": text},
      {"from": "gpt", "value": _labels(record, manifest)},
    ],
  }


def _row(source: str, number: int, record: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
  """Returns one row of the dataset; every column has one type throughout."""
  image, answer = record["image"], record.get("answer")
  scores, _ = records.paper_scores(record)
  return {
    "id": f"{source}:{number}",
    "source": source,
    "images": [str(name) for name in image] if isinstance(image, list) else [str(image)],
    "question": records.question_of(record),
    "answer": "" if answer is None else str(answer),
    "steps": [step["step"].strip() for step in record["steps_with_score"]],
    "mc_scores": scores,
    "labels": _labels(record, manifest),
  }


_FEATURES = """\
  - name: id
    dtype: string
  - name: source
    dtype: string
  - name: images
    sequence: string
  - name: question
    dtype: string
  - name: answer
    dtype: string
  - name: steps
    sequence: string
  - name: mc_scores
    sequence: float64
  - name: labels
    sequence: float64
"""


def _card(manifest: Manifest) -> str:
  """Returns the dataset card: what is in it, how it was selected, and how to read it."""
  total = sum(source.scorable for source in manifest.sources)
  amount = (
    f"a fraction of {manifest.fraction:g}" if manifest.count is None else f"{manifest.count:,}"
  )
  where = "of each source" if manifest.scope == "per_source" else "of all rollouts together"
  names = ("strategy", "fraction", "count", "alpha", "none_positive", "order", "scope", "seed")
  names += ("tau", "unmeasured", "table_checksum", "digest")
  parameters = "\n".join(f"| {name} | {getattr(manifest, name)} |" for name in names)
  sources = "\n".join(f"| {s.name} | {s.scorable:,} | {s.lines.size:,} |" for s in manifest.sources)
  return f"""\
---
pretty_name: {json.dumps(f"{manifest.strategy} subset of MC-annotated rollouts")}
task_categories:
- visual-question-answering
tags:
- process-reward-model
- data-selection
size_categories:
- {_size_category(len(manifest))}
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train.jsonl
dataset_info:
  features:
{_FEATURES}---

# {len(manifest):,} rollouts selected by `{manifest.strategy}`

{len(manifest):,} of {total:,} Monte-Carlo-annotated multimodal reasoning rollouts, selected with
strategy `{manifest.strategy}`: {amount} {where}. Images are referred to by name and are those of the
dataset that was selected from; its licence holds here too.

    from datasets import load_dataset
    rollouts = load_dataset("PATH_OF_THIS_FOLDER", split="train")

A row is one rollout: `steps` with the `mc_scores` of each (share of Monte Carlo continuations that
reach the right answer) and `labels` (1 where the score is above {manifest.tau:g}). `id` is the
annotation file and 0-based line that it comes from; `manifest.json` lists all of them.

| parameter | value |
|---|---|
{parameters}

| source | ranked | kept |
|---|---|---|
{sources}

The Balanced-Information Score is from *Training Data Efficiency in Multimodal Process Reward Models*
(arXiv 2602.04145).
"""


def _size_category(rows: int) -> str:
  """Returns the hub's name for a number of rows."""
  bounds = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6))
  return next((name for name, bound in bounds if rows < bound), "1M<n<10M")
