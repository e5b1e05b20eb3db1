"""What `select` writes can be read again: texts, labels, numbers of continuations and -100 stay."""

import json

import numpy as np
import pytest

from bis_jax.corpus.formats import UNLABELLED
from bis_jax.corpus.scan import scan
from bis_jax.errors import UserError
from bis_jax.selection import subset
from bis_jax.selection.rule import select

FORMS = ("raw", "conversations", "trl", "openrlhf", "dataset", "parquet")
KEEPS_COUNTS = ("raw", "dataset", "parquet")


def corpus(folder):
  """60 rollouts, half of them with an image, with N of 16 and steps that were not measured."""
  draw = np.random.default_rng(0)
  lines = []
  for at in range(60):
    steps = []
    for number in range(draw.integers(1, 6)):
      correct, total = int(draw.integers(0, 17)), 16
      if draw.random() < 0.2:
        correct = total = 0
      score = correct / total if total else 0.0
      counts = {"num_mc_correct": correct, "num_mc_total": total}
      steps.append({"step": f"Step {number}:\n\n求 {at} & <b>", "score": score} | counts)
    record = {"question_orig": f"What of {at}?\nTwo lines", "steps_with_score": steps}
    lines.append(record | ({"image": "a/1.png"} if at % 2 else {}))
  folder.mkdir()
  (folder / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


def contents(found):
  """[(question, images, steps, labels, totals)] of the rollouts that can be ranked."""
  rows = []
  for raw in found.read_lines(np.flatnonzero(found.strict)):
    record = json.loads(raw)
    steps = record["steps_with_score"]
    measured = [step.get("num_mc_total") != 0 for step in steps]
    labels = [
      float(step["score"] > 0) if known else float(UNLABELLED)
      for step, known in zip(steps, measured, strict=True)
    ]
    question = (record.get("question_orig") or record["question"]).strip()
    texts = [step["step"].strip() for step in steps]
    totals = [step.get("num_mc_total") for step in steps]
    images = record.get("image") or []
    rows.append((question, [images] if isinstance(images, str) else images, texts, labels, totals))
  return rows


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read_again(tmp_path, form):
  found = scan(corpus(tmp_path / "in"))
  table = found.table()
  manifest = select(table, strategy="full", fraction=1.0, unmeasured="ignore")
  write, _ = subset.WRITERS[form]
  out = tmp_path / "out" / ("x.parquet" if form == "parquet" else "x.jsonl")
  write(out, subset.kept_lines(found.files, table, manifest), manifest)
  again = scan(out / "data" if form == "dataset" else out)
  assert not again.rejections and again.records == len(manifest) > 50
  expected, read = [row for row in contents(found) if set(row[3]) != {UNLABELLED}], contents(again)
  assert [row[:4] for row in read] == [row[:4] for row in expected]
  assert any(UNLABELLED in row[3] for row in read)
  if form in KEEPS_COUNTS:
    assert [row[4] for row in read] == [row[4] for row in expected]


def test_a_text_with_the_placeholder_is_refused(tmp_path):
  (tmp_path / "in").mkdir()
  line = {"question": "q", "steps_with_score": [{"step": "одни ки здесь", "score": 1.0}]}
  (tmp_path / "in/x.jsonl").write_text(json.dumps(line))
  found = scan(tmp_path / "in")
  manifest = select(found.table(), strategy="full", fraction=1.0)
  with pytest.raises(UserError, match="x:0 holds 'ки'.*another format"):
    subset.write_openrlhf(
      tmp_path / "out.jsonl", subset.kept_lines(found.files, found.table(), manifest), manifest
    )
