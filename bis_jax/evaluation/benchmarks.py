"""Finds a step benchmark, in a folder or on the Hugging Face hub, and loads it by its layout.

VisualProcessBench, ProcessBench and PRMBench are told apart by the keys of the first record; the
files are JSON lists, JSON lines or Parquet. `measures` are those of their own papers.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from bis_jax import files
from bis_jax.corpus.rejections import BadRecord
from bis_jax.evaluation import json_records, process_bench, visual_process_bench
from bis_jax.evaluation.json_records import EvaluationError
from bis_jax.evaluation.visual_process_bench import BenchmarkItem

# {kind: keys that its records have}
KINDS = {
  "VisualProcessBench": ("response", "data_source"),
  "PRMBench": ("modified_process", "error_steps"),
  "ProcessBench": ("problem", "steps", "label"),
}
# PRMBench's classes of errors (arXiv:2501.03124, table 1), under the names in its files.
_PRM_BENCH = {
  "simplicity": ("redundency", "circular"),
  "soundness": ("counterfactual", "step_contradiction", "domain_inconsistency", "confidence"),
  "sensitivity": ("missing_condition", "deception", "multi_solutions"),
}
_NO_ERRORS = "multi_solutions"  # whose score is the F1 of the correct class alone
# {kind of benchmark: its own name of its main measure}
MAIN = {
  "VisualProcessBench": "overall micro-F1",
  "ProcessBench": "average F1",
  "PRMBench": "PRMScore",
}
_FILES = [visual_process_bench.ANNOTATIONS, "images.zip", "*.json", "*.jsonl", "*.parquet"]
_SHARD = re.compile(r"-\d+-of-\d+$")
_Record = tuple[str, tuple[str, Any]]  # (place, (subset, record))


@dataclasses.dataclass(frozen=True)
class Benchmark:
  kind: str  # of KINDS
  items: list[BenchmarkItem]


def load(name: str) -> list[BenchmarkItem]:
  """Returns the checked items of a benchmark, given as a folder or a dataset id of the hub."""
  return find(name).items


def find(name: str) -> Benchmark:
  """Returns a benchmark, given as a folder or a dataset id of the hub, with its kind.

  Raises an EvaluationError that lists every fault with its item.
  """
  # `OpenGVLab/VisualProcessBench` and `Qwen/ProcessBench` are downloaded if no folder has that
  # name.
  folder = files.absolute(name)
  if not folder.is_dir():
    from bis_jax.storage import hub_datasets  # a local folder needs nothing of the hub

    folder = hub_datasets.download(name, f"no benchmark folder at {folder}", _FILES)
  if (folder / visual_process_bench.ANNOTATIONS).is_file():
    return Benchmark("VisualProcessBench", visual_process_bench.load(folder))
  paths = sorted(
    [
      *folder.glob("*.json"),
      *folder.glob("*.jsonl"),
      *folder.glob("*.parquet"),
      *folder.glob("*/*.parquet"),
    ]
  )
  if not paths:
    raise FileNotFoundError(
      f"no *.json, *.jsonl or *.parquet in {folder}: give the folder of a step benchmark"
    )
  kind = _kind(_records(paths))
  return Benchmark(kind, json_records.parse_items(folder, _records(paths), _parser(kind, folder)))


def _kind(records: Iterator[_Record]) -> str:
  """Returns the kind of the first record; ProcessBench if there is none to tell it by."""
  for place, (_, record) in records:
    if isinstance(record, dict):
      found = (kind for kind, keys in KINDS.items() if all(key in record for key in keys))
      kind = next(found, None)
      if kind is None and not {"problem", "label"} & record.keys():
        known = "; ".join(f"{kind} ({', '.join(keys)})" for kind, keys in KINDS.items())
        raise EvaluationError(
          f"{place} has the keys {', '.join(sorted(record))}, of no known benchmark: give one of {known}"
        )
      return kind or "ProcessBench"
  return "ProcessBench"


def _parser(kind: str, folder: epath.Path) -> Callable[[int, tuple[str, Any]], BenchmarkItem]:
  parsers: dict[str, Callable[[int, tuple[str, Any]], BenchmarkItem]] = {
    "VisualProcessBench": functools.partial(
      visual_process_bench.parse_row, root=visual_process_bench.find_images(folder)
    ),
    "PRMBench": process_bench.parse_prm_bench,
    "ProcessBench": process_bench.parse,
  }
  parse = parsers[kind]

  def checked(index: int, subset_and_record: tuple[str, Any]) -> BenchmarkItem:
    if isinstance(subset_and_record[1], BadRecord):
      raise subset_and_record[1]
    return parse(index, subset_and_record)

  return checked


def _records(paths: list[epath.Path]) -> Iterator[_Record]:
  for path in paths:
    subset = _SHARD.sub("", path.stem)
    for position, record in enumerate(_records_of(path)):
      yield f"{path.name} item {position}", (subset, record)


def _records_of(path: epath.Path) -> Iterator[Any]:
  if path.suffix == ".json":
    remedy = "it must be a JSON list of items"
    yield from files.read_json(path, remedy, list[Any], EvaluationError)
    return
  from bis_jax.corpus.containers import ConvertedFile  # here, as few benchmarks need it

  file = ConvertedFile(path.name, path, None, path.stat().length, "")
  for group in range(file.groups()):
    yield from file.records(group)


def measures(kind: str, evaluation: Mapping[str, Any]) -> dict[str, dict[str, float]]:
  """Returns {threshold: {measure: value}}, the own measures of a `Benchmark`'s evaluation.

  VisualProcessBench: macro-F1 by source, and their mean weighted by steps. ProcessBench: first-error
  F1 by subset, and their mean. PRMBench: PRMScore, half the F1 of the correct and half that of the
  erroneous class, over all steps, by class of error, and the means of its three groups of classes.
  """
  return {name: _at(kind, name, evaluation) for name in evaluation["thresholds"]}


def _at(kind: str, threshold: str, evaluation: Mapping[str, Any]) -> dict[str, float]:
  sources = {
    source: report["thresholds"][threshold] for source, report in evaluation["per_source"].items()
  }
  overall = evaluation["thresholds"][threshold]
  if kind == "ProcessBench":
    found = {f"{source} F1": block["first_error_f1"] for source, block in sources.items()}
    return {MAIN[kind]: float(np.mean([*found.values()]))} | found
  if kind == "PRMBench":
    found = {
      source: block["f1_correct" if source == _NO_ERRORS else "macro_f1"]
      for source, block in sources.items()
    }
    groups = {
      group: [found[name] for name in names if name in found] for group, names in _PRM_BENCH.items()
    }
    means = {group: float(np.mean(values)) for group, values in groups.items() if values}
    return {MAIN[kind]: overall["macro_f1_pooled"]} | means | found
  found = {f"{source} macro-F1": block["macro_f1"] for source, block in sources.items()}
  return {MAIN[kind]: overall["overall_source_weighted"]} | found
