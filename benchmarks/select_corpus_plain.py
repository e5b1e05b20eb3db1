"""The paper's selection as a plain Python loop: what `select_corpus.py` is measured against.

python benchmarks/select_corpus_plain.py ANNOTATIONS OUT.jsonl FRACTION ALPHA
"""

import json
import pathlib
import sys


def step_scores(record: dict) -> list[float]:
  """Returns the numeric scores of a record's steps."""
  scores = []
  for step in record.get("steps_with_score") or []:
    try:
      scores.append(float(step["score"]))
    except (KeyError, TypeError, ValueError):
      continue
  return scores


def bis(scores: list[float], alpha: float) -> float:
  """Returns the Balanced-Information Score."""
  positive = [score for score in scores if score > 0]
  p = len(positive) / len(scores)
  reliability = sum(positive) / len(positive) if positive else 1.0
  return (p * (1 - p) + alpha) * reliability


def select(annotations: str, out: str, fraction: float, alpha: float) -> None:
  """Writes the best `fraction` of every file, in file order."""
  with open(out, "w", encoding="utf-8") as kept:
    for path in sorted(pathlib.Path(annotations).glob("*.jsonl")):
      with path.open(encoding="utf-8", newline="\n") as file:
        lines = file.readlines()
      scored = []
      for number, line in enumerate(lines):
        try:
          record = json.loads(line)
        except ValueError:
          continue
        scores = step_scores(record)
        if scores:
          scored.append((number, bis(scores, alpha)))
      scored.sort(key=lambda pair: pair[1], reverse=True)
      top = scored[: max(1, int(len(scored) * fraction))]
      kept.writelines(lines[number] for number, _ in sorted(top))


if __name__ == "__main__":
  select(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
