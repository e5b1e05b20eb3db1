"""Loads text benchmarks in ProcessBench's layout (arXiv:2412.06559).

A folder with a file a subset, `gsm8k.json`, `math.json`, ...: a JSON list of

    {"id": "gsm8k-0", "generator": "Qwen2-7B-Instruct", "problem": "...", "steps": ["...", ...],
     "final_answer_correct": false, "label": 1}

`label` is the first erroneous step counted from 0, or -1 when every step is correct.
"""

import json
import pathlib

from bis_jax.evaluation.visual_process_bench import BenchmarkItem, listed


def load(folder: str) -> list[BenchmarkItem]:
  """Returns the items of every `*.json` of `folder`, files in name order, each of them checked.

  Steps before the first error are labelled 1 and the erroneous one -1; nothing is known of those
  after it, so they are neutral (0). The subset's file name is the item's `data_source`, and the
  generator its `policy_model`; `answer` says whether the final answer was right. Raises
  FileNotFoundError when there is no such file, and ValueError that lists each fault with its item.
  """
  files = sorted(pathlib.Path(folder).glob("*.json"))
  if not files:
    raise FileNotFoundError(f"no *.json in {folder}: give the folder of ProcessBench's subsets")
  items, faults = [], []
  for file in files:
    try:
      records = json.loads(file.read_bytes())
    except ValueError as error:
      raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(records, list):
      raise ValueError(f"{file}: a list of items is wanted, found {type(records).__name__}")
    for position, record in enumerate(records):
      try:
        items.append(_parse(record, len(items) + len(faults), file.stem))
      except ValueError as error:
        faults.append(f"{file.name} item {position}: {error}")
  if faults:
    raise ValueError(listed(folder, faults))
  if not items:
    raise ValueError(f"{folder} holds no item: every file is an empty list")
  return items


def _parse(record: object, index: int, subset: str) -> BenchmarkItem:
  if not isinstance(record, dict):
    raise ValueError(f"a JSON object is wanted, found {type(record).__name__}")
  problem, steps, label = (record.get(key) for key in ("problem", "steps", "label"))
  if not isinstance(problem, str):
    raise ValueError(f"`problem` must be a string, found {problem!r}")
  if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
    raise ValueError("`steps` must be a list of at least one string")
  if type(label) is not int or not -1 <= label < len(steps):
    raise ValueError(f"`label` is {label!r}; it must be -1 or one of the {len(steps)} steps")
  labels = (1,) * len(steps)
  if label >= 0:
    labels = (1,) * label + (-1,) + (0,) * (len(steps) - label - 1)
  return BenchmarkItem(
    index=index,
    question=problem.strip(),
    images=(),
    image_sizes=(),
    steps=tuple(steps),
    labels=labels,
    data_source=subset,
    policy_model=str(record.get("generator", "unknown")),
    answer=str(record.get("final_answer_correct", "")),
  )
