"""200 solutions in every format of a corpus and every container, for tests.

The records are written here, by hand, from a list of solutions: nothing of the package writes them.
"""

import gzip
import io
import json
import random

import pyarrow
import pyarrow.parquet
import zstandard

COUNT = 200
IGNORED = -100


def solutions(seed: int = 0):
  """(question, steps, labels of 1, 0 or IGNORED) of 200 rollouts, with texts that are awkward."""
  draw = random.Random(seed)
  odd = ["x < y & z", "求 面积", "a\n\nb", "naïve", "{brace}", "50 % of 7"]
  found = []
  for at in range(COUNT):
    steps = [
      f"Step {n + 1}: {draw.choice(odd)} {draw.randrange(1000)}." for n in range(draw.randint(1, 7))
    ]
    labels = [draw.choice([1, 1, 0, IGNORED]) for _ in steps]
    found.append((f"Question {at}? {draw.choice(odd)}", steps, labels))
  return found


def as_raw(question, steps, labels):
  counts = {1: (16, 16), 0: (0, 16), IGNORED: (0, 0)}
  return {
    "question": question,
    "steps_with_score": [
      {
        "step": s,
        "score": float(y == 1),
        "num_mc_correct": counts[y][0],
        "num_mc_total": counts[y][1],
      }
      for s, y in zip(steps, labels, strict=True)
    ],
  }


def as_conversations(question, steps, labels):
  text = f"Question: {question}\nProcess: " + "\n\n".join(step + "<prm>" for step in steps)
  turns = [{"from": "human", "value": text}, {"from": "gpt", "value": [float(y) for y in labels]}]
  return {"conversations": turns}


def as_turns(question, steps, labels):
  turns = []
  for at, (step, label) in enumerate(zip(steps, labels, strict=True)):
    before = "" if at else f"### Question:\n{question}\n\n### Solution Process:\n"
    turns.append({"from": "human", "value": before + step})
    turns.append({"from": "gpt", "value": {1: "+", 0: "-", IGNORED: None}[label]})
  return {"conversations": [{"from": "system", "value": "Judge."}, *turns]}


def as_trl(question, steps, labels):
  values = [y if y == IGNORED else bool(y) for y in labels]
  return {"prompt": question, "completions": steps, "labels": values}


def as_prm800k(question, steps, labels):
  ratings = {1: 1, 0: -1, IGNORED: None}
  chosen = []
  for at, (text, label) in enumerate(zip(steps, labels, strict=True)):
    wrong = {"text": "another", "rating": -1, "flagged": False}
    mine = {"text": text, "rating": ratings[label]}
    if label == 1 and at % 3 == 2:
      chosen.append(
        {
          "completions": [wrong],
          "human_completion": mine | {"rating": None},
          "chosen_completion": None,
        }
      )
    elif at == len(steps) - 1:  # the labeller stopped here
      chosen.append({"completions": [mine], "human_completion": None, "chosen_completion": None})
    else:
      chosen.append({"completions": [wrong, mine], "chosen_completion": 1})
  return {"question": {"problem": question}, "label": {"steps": chosen, "total_time": 5}}


def as_math_shepherd(question, steps, labels):
  text = question + " " + "\n".join(f"{step} ки" for step in steps)
  signs = (
    question
    + " "
    + "\n".join(f"{s} {'+' if y == 1 else '-'}" for s, y in zip(steps, labels, strict=True))
  )
  return {"input": text, "label": signs, "task": "MATH"}


def as_openrlhf(question, steps, labels):
  text = question + "\n" + "".join(f"{step} ки\n" for step in steps)
  return {"input": text, "value": ["+" if y == 1 else "-" for y in labels], "label": "ignored"}


def as_dataset(question, steps, labels):
  raw = as_raw(question, steps, labels)["steps_with_score"]
  columns = {key: [step[key] for step in raw] for key in ("num_mc_correct", "num_mc_total")}
  scores = [step["score"] for step in raw]
  return {"question": question, "steps": steps, "mc_scores": scores, "images": []} | columns


WRITTEN = {
  "raw": as_raw,
  "conversations": as_conversations,
  "turns": as_turns,
  "trl": as_trl,
  "prm800k": as_prm800k,
  "math_shepherd": as_math_shepherd,
  "openrlhf": as_openrlhf,
  "dataset": as_dataset,
}
SIGNS_ONLY = ("math_shepherd", "openrlhf")  # which have no word for "no label"


def parquet(rows, groups=3):
  file = io.BytesIO()
  table = pyarrow.Table.from_pylist(rows)
  pyarrow.parquet.write_table(table, file, row_group_size=-(-len(rows) // groups))
  return file.getvalue()


def arrow(rows):
  file = io.BytesIO()
  table = pyarrow.Table.from_pylist(rows)
  with pyarrow.ipc.new_stream(file, table.schema) as writer:
    writer.write_table(table, max_chunksize=64)
  return file.getvalue()


def lines(rows):
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


CONTAINERS = {
  "x.jsonl": lines,
  "x.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
  "x.jsonl.zst": lambda rows: zstandard.compress(lines(rows)),
  "x.json": lambda rows: json.dumps(rows, indent=1).encode(),
  "x.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
  "x.parquet": parquet,
  "x.arrow": arrow,
}


def expected(name, seed=0):
  """(question, steps, scores, measured) as every reader has to give them."""
  found = []
  for question, steps, labels in solutions(seed):
    if name in SIGNS_ONLY:
      labels = [int(y == 1) for y in labels]
    scores = tuple(float(y == 1) for y in labels)
    found.append((question, tuple(steps), scores, tuple(y != IGNORED for y in labels)))
  return found
