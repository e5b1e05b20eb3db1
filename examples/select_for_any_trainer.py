"""Selects rollouts and writes them for a trainer of your own: one JSON line per rollout.

  python -m examples.select_for_any_trainer ANNOTATIONS OUT.jsonl [FRACTION]

Each line is {"id", "prompt", "completions", "labels", "images"}: a stepwise-supervision row with a
label per step. Change `row` for another trainer.
"""

import json
import pathlib
import sys

from bis_jax.corpus import records
from bis_jax.corpus.containers import sources
from bis_jax.corpus.scan import scan
from bis_jax.selection import subset
from bis_jax.selection.rule import select


def row(rollout: records.Rollout) -> dict:
  """Returns what the trainer reads of a rollout."""
  return {
    "id": rollout.id,
    "prompt": rollout.question,
    "completions": list(rollout.steps),
    "labels": [score > 0 for score in rollout.scores],
    "images": list(rollout.images),
  }


def main(annotations: str, out: str, fraction: float = 0.1) -> None:
  """Writes the rollouts with the highest BIS of every source."""
  table = scan(annotations).table()
  manifest = select(table, strategy="bis", fraction=fraction, alpha=0.2)
  with pathlib.Path(out).open("w", encoding="utf-8") as file:
    lines = subset.kept_lines(sources(annotations), table, manifest)
    for source, number, line in lines:
      rollout = records.parse_rollout(records.load_object(line), source, number)
      file.write(json.dumps(row(rollout)) + "\n")
  print(f"kept {len(manifest)} of {len(table)} rollouts in {out}")


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:]))
