"""VLMEvalKit's result files, written as it writes them, become Best-of-N candidates."""

import base64
import csv
import json

import numpy as np
import openpyxl
import pytest
from PIL import Image

from bis_jax.evaluation import best_of_n, vlmevalkit
from bis_jax.evaluation.json_records import EvaluationError
from bis_jax.scoring import step_scorer
from tests.commands import run_command

ROWS = [
  {
    "index": 1,
    "question": "How many?",
    "answer": "1/2",
    "prediction": "Step.\n\nThe answer is 0.5.",
  },
  {"index": 2, "question": "Which?", "answer": "B", "A": "one", "B": "two", "prediction": "(B)"},
  {"index": 3, "question": "So?", "answer": "7", "prediction": "x\n\nFinal answer: \\boxed{7}"},
]
OTHER = {1: "It is 3.", 2: "The answer is (A)", 3: "Failed to obtain answer via API."}


def write(path, rows):
  """Writes rows as pandas does for VLMEvalKit: a sheet, quoted text, or a list of records."""
  columns = list(dict.fromkeys(key for row in rows for key in row))
  table = [[row.get(key) for key in columns] for row in rows]
  if path.suffix == ".xlsx":
    book = openpyxl.Workbook()
    for line in (columns, *table):
      book.active.append(line)
    book.save(path)
  elif path.suffix == ".json":
    path.write_text(json.dumps([dict(zip(columns, line, strict=True)) for line in table]))
  else:
    with open(path, "w", newline="") as file:
      writer = csv.writer(file, "excel-tab" if path.suffix == ".tsv" else "excel")
      writer.writerows([columns, *table])
  return str(path)


@pytest.mark.parametrize("suffix", vlmevalkit.SUFFIXES)
def test_every_format_gives_the_same_candidates(tmp_path, suffix):
  second = [row | {"prediction": OTHER[row["index"]]} for row in ROWS]
  paths = [write(tmp_path / f"{k}{suffix}", rows) for k, rows in enumerate((ROWS, second))]
  first, choice, last = vlmevalkit.read(paths)
  assert (first.id, first.question) == ("1", "How many?")
  right, wrong = first.candidates
  assert right.steps == ["Step.", "The answer is 0.5."] and right.answer == "0.5" and right.correct
  assert wrong.answer == "3" and not wrong.correct
  assert [one.correct for one in choice.candidates] == [True, False]
  assert last.candidates[0].correct and last.candidates[1] is None


def test_a_judge_decides_where_there_is_one(tmp_path):
  judged = [ROWS[0] | {"hit": 0}, ROWS[1] | {"verifier_match": 1.0}, ROWS[2] | {"res": "8"}]
  found = vlmevalkit.read([write(tmp_path / "a.xlsx", judged)])
  assert [one.candidates[0].correct for one in found] == [False, True, False]
  assert found[2].candidates[0].answer == "8"


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ([], "has no rows"),
    ([{"index": 1, "question": "q"}], "has no column `prediction`"),
    ([ROWS[0], ROWS[0]], "has an index twice"),
    ([{"index": 1, "question": "q", "prediction": "p"}], "has neither `hit`, `verifier_match`"),
  ],
)
def test_what_is_no_result_file_is_named(tmp_path, rows, message):
  with pytest.raises(EvaluationError, match=message):
    vlmevalkit.read([write(tmp_path / "a.json", rows)])


def test_files_of_other_questions_or_damaged_ones_are_refused(tmp_path):
  good = write(tmp_path / "a.xlsx", ROWS)
  for rows, message in (
    ([row | {"question": "?"} for row in ROWS], "asks another question than in"),
    ([*ROWS, ROWS[0] | {"index": 9}], "has no index 9"),
  ):
    with pytest.raises(EvaluationError, match=message):
      vlmevalkit.read([good, write(tmp_path / "b.xlsx", rows)])
  (tmp_path / "b.xlsx").write_bytes((tmp_path / "a.xlsx").read_bytes()[:500])
  with pytest.raises(EvaluationError, match="b.xlsx is not a table"):
    vlmevalkit.read([str(tmp_path / "b.xlsx")])


def test_images_come_from_the_benchmarks_tsv(tmp_path):
  big = [base64.b64encode(bytes([k]) * 90).decode() for k in range(3)]
  rows = [
    {"index": 1, "image": big[0]},
    {"index": 2, "image": "1"},
    {"index": 3, "image": json.dumps(big[1:])},
    {"index": 4, "image": "@" * 99},
  ]
  path = write(tmp_path / "b.tsv", rows)
  assert vlmevalkit.images(path, ["1", "2", "3"]) == {
    "1": [b"\0" * 90],
    "2": [b"\0" * 90],
    "3": [b"\1" * 90, b"\2" * 90],
  }
  for index, message in (("4", "image of index 4 is not base64"), ("5", "has no index 5")):
    with pytest.raises(EvaluationError, match=message):
      vlmevalkit.images(path, [index])


class Lengths:
  """Scores a step by its length; keeps how many images its examples had."""

  believes = False

  def __init__(self):
    self.images = []

  def score_each(self, examples):
    self.images += [len(one.read_images()) for one in examples]
    return [np.array([len(step) / 100 for step in one.steps]) for one in examples], {}


def test_evaluate_scores_the_responses_with_a_checkpoint(tmp_path, monkeypatch):
  second = [row | {"prediction": OTHER[row["index"]]} for row in ROWS]
  paths = [write(tmp_path / f"{k}.xlsx", rows) for k, rows in enumerate((ROWS, second))]
  Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
  image = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
  tsv = write(tmp_path / "b.tsv", [{"index": k, "image": image} for k in (1, 2, 3)])
  scorer = Lengths()
  monkeypatch.setattr(step_scorer, "load", lambda checkpoint, **_: scorer)
  flags = ["--checkpoint=run", f"--images_tsv={tsv}", "--answers=math", "--missing=worst"]
  saved, out = tmp_path / "scored.jsonl", tmp_path / "out.json"
  flags += [f"--candidates={','.join(paths)}", f"--save_scores={saved}", f"--out={out}"]
  assert run_command("evaluate", *flags) is None
  assert scorer.images == [1] * 5
  result = json.loads(out.read_text())
  assert result["questions"] == 3 and result["pass@N"] == 1
  # Of two, the longer last step is picked: the wrong one of the second question.
  assert result["curve"]["last"]["values"] == [1.0, pytest.approx(2 / 3)]
  unscored = [flag for flag in flags if not flag.startswith(("--checkpoint", "--save"))]
  assert run_command("evaluate", *unscored).startswith("evaluate: --images_tsv is read only")
  again = best_of_n.evaluate(best_of_n.load(str(saved), "worst", "math"))
  assert again["curve"] == result["curve"]
