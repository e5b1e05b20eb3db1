"""Statistics of a corpus of three rollouts, counted by hand."""

import json

import pytest

from benchmarks.study.corpus_statistics import statistics

# Of every rollout: continuations that were right, of 16 (None: not measured), and the truth.
ROLLOUTS = [
  ([16, 8, 16], [1, 1, 1]),
  ([12, 2, 0, None], [1, 0, 0, 1]),
  ([0, 4], [1, 0]),
]


@pytest.fixture
def drawn(tmp_path):
  (tmp_path / "annotations").mkdir()
  records, truths = [], []
  for line, (counts, truth) in enumerate(ROLLOUTS):
    steps = [
      {"step": "two words", "score": (n or 0) / 16, "num_mc_total": 0 if n is None else 16}
      for n in counts
    ]
    asked = {"image": "a.png", "question_orig": "first" if line < 2 else "second"}
    records.append(asked | {"num_mc_sequences": 16, "steps_with_score": steps})
    truths.append({"file": "a.jsonl", "line": line, "truth": truth})
  for path, lines in (("annotations/a.jsonl", records), ("truth.jsonl", truths)):
    (tmp_path / path).write_text("".join(json.dumps(line) + "\n" for line in lines))
  return tmp_path


def test_statistics_are_those_counted_by_hand(drawn):
  assert statistics(drawn) == {
    "rollouts": "3",
    "steps per rollout, mean": "3.00",
    "steps per rollout, most": "4",
    "words per step but the last, median": "2",
    "words per step but the last, mean": "2.0",
    "rollouts whose last step scores > 0.5": "33.3 %",
    "rollouts per question and picture": "1.50",
    "continuations per step": "16",
    "steps without continuations": "11.1 %",
    "positive steps": "66.7 %",
    "rollouts with steps of both kinds (mixed)": "66.7 %",
    "rollouts with positive steps only": "33.3 %",
    "rollouts without a positive step": "0.0 %",
    "MC score of positive steps, mean": f"{58 / 16 / 6:.3f}",
    "reliability R where there is one, mean": f"{(40 / 3 + 14 / 2 + 4) / 16 / 3:.3f}",
    "wrong steps, by truth": "33.3 %",
    "rollouts with a wrong step, by truth": "66.7 %",
    "wrong steps with a positive score": "66.7 %",
    "right steps with score 0": "33.3 %",
    "labels that are flipped (hard, tau 0)": "44.4 %",
    "right among steps of score 0": "66.7 %",
    "wrong among steps in (0, 0.125]": "100.0 %",
    "wrong among steps in (0.125, 0.25]": "100.0 %",
    "wrong among steps in (0.25, 0.5]": "0.0 %",
    "wrong among steps in (0.5, 0.75]": "0.0 %",
    "wrong among steps in (0.75, 1)": "none",
    "wrong among steps of score 1": "0.0 %",
  }
