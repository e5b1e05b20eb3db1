"""Kept records on disk: the unchanged lines, the form trainers read, a loadable dataset."""

import json
import re
import types

import huggingface_hub
import pyarrow.json
import pytest

from bis_jax.corpus.scan import scan
from bis_jax.errors import UserError
from bis_jax.selection import subset
from bis_jax.selection.rule import select

RECORDS = {
  "a.jsonl": [
    {
      "image": "a/1.png",
      "question": "<image>\nInstructions. How many?",
      "question_orig": "How many?",
      "answer": 52,
      "steps_with_score": [
        {"step": "First,\n\ncount. ", "score": 0.5, "num_mc_correct": 8, "num_mc_total": 16},
        {"step": "Final answer: 52", "score": 0.0, "num_mc_correct": 0, "num_mc_total": 0},
      ],
    },
    {"image": "a/2.png", "question": "q", "steps_with_score": [{"step": "s", "score": 0.25}]},
  ],
  "b.jsonl": [
    {
      "image": ["b/l.png", "b/r.png"],
      "question": "<image>\n<image>\nWhich? 哪个?",
      "steps_with_score": [{"step": "Left.", "score": 1.0}],
    }
  ],
}


@pytest.fixture
def selected(tmp_path):
  """(scan, function that selects and returns (manifest, kept lines)); CRLF ends the lines of b."""
  for name, records in RECORDS.items():
    end = "\r\n" if name == "b.jsonl" else "\n"
    text = "".join(json.dumps(r, ensure_ascii=False) + end for r in records)
    (tmp_path / name).write_bytes(text.encode())
  found = scan(tmp_path)

  def run(**settings):
    table = found.table()
    manifest = select(table, strategy="bis", fraction=0.5, **settings)
    return manifest, subset.kept_lines(found.files, table, manifest)

  return run


def read(path):
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_raw_lines_are_those_of_the_files(tmp_path, selected):
  manifest, lines = selected()
  subset.write_raw(tmp_path / "out.jsonl", lines, manifest)
  expected = [RECORDS["a.jsonl"][0], RECORDS["b.jsonl"][0]]
  text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in expected)
  assert (tmp_path / "out.jsonl").read_bytes() == text.encode()


def test_conversations_are_what_trainers_read(tmp_path, selected):
  manifest, lines = selected()
  subset.write_conversations(tmp_path / "out.jsonl", lines, manifest)
  first, second = read(tmp_path / "out.jsonl")
  process = "First,\n\ncount.<prm>\n\nFinal answer: 52<prm>"
  assert first == {
    "image": "a/1.png",
    "conversations": [
      {"from": "human", "value": f"Question: How many?\nProcess: {process}"},
      {"from": "gpt", "value": [1.0, 0.0]},
    ],
  }
  assert second["image"] == ["b/l.png", "b/r.png"]
  # As the released builder: placeholders of a question without question_orig stay.
  text = "Question: <image>\n<image>\nWhich? 哪个?\nProcess: Left.<prm>"
  assert second["conversations"][0]["value"] == text


@pytest.mark.parametrize(
  ("fields", "question"),
  [
    ({"question_orig": " a ", "question": "<image>\nb"}, "a"),
    ({"question_orig": "", "question": " <image>\nb "}, "<image>\nb"),
    ({"question_orig": " ", "question": "<image>\nb"}, ""),
    ({"question_orig": None, "question": 5}, "5"),
    ({}, ""),
  ],
)
def test_questions_are_those_of_the_released_builder(fields, question):
  """`str(question_orig or question or "").strip()`: a blank question_orig hides the question."""
  record = fields | {"image": "a", "steps_with_score": [{"step": "s", "score": 1}]}
  manifest = types.SimpleNamespace(tau=0.0, unmeasured="negative")
  written = subset._conversation("a", 0, record, manifest)
  assert written["conversations"][0]["value"] == f"Question: {question}\nProcess: s<prm>"


@pytest.mark.parametrize("form", ["conversations", "dataset"])
def test_a_half_surrogate_is_replaced_and_its_record_named(tmp_path, form, caplog):
  """Mutation caught: one of them aborts the whole export of `paper` order."""
  steps = '"steps_with_score": [{"step": "s", "score": 1, "num_mc_total": 99999}]'
  lines = [f'{{"image": "a", "question": "q{n}", {steps}}}' for n in range(3)]
  lines[1] = lines[1].replace("q1", "\\ud83d")
  lines[2] = "\x0c\xa0" + lines[2] + "\u2028"  # white space that JSON does not know
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  found = scan(tmp_path)
  table = found.table()
  manifest = select(table, strategy="full", fraction=1.0, order="paper")
  write, _ = subset.WRITERS[form]
  write(tmp_path / "out", subset.kept_lines(found.files, table, manifest), manifest)
  written = read(tmp_path / ("out" if form == "conversations" else "out/data/train.jsonl"))
  assert [next(q for q in ("q0", "\ufffd", "q2") if q in str(row)) for row in written] == [
    *("q0", "\ufffd", "q2")
  ]
  assert caplog.messages == ["a:1 holds half of a surrogate pair: written as U+FFFD"]


def test_labels_follow_tau_and_the_treatment_of_unmeasured_steps(tmp_path, selected):
  manifest, lines = selected(tau=0.5, unmeasured="ignore")
  subset.write_conversations(tmp_path / "out.jsonl", lines, manifest)
  labels = {r["image"]: r["conversations"][1]["value"] for r in read(tmp_path / "out.jsonl")[:1]}
  assert labels == {"a/1.png": [0.0, subset.IGNORED_LABEL]}


def test_dataset_has_one_type_a_column_and_a_card(tmp_path, selected):
  manifest, lines = selected()
  subset.write_dataset(tmp_path / "ds", lines, manifest)
  table = pyarrow.json.read_json(tmp_path / "ds" / "data" / "train.jsonl")
  types = {field.name: str(field.type).replace("item", "element") for field in table.schema}
  text, texts, numbers = "string", "list<element: string>", "list<element: double>"
  counts = "list<element: int64>"
  assert types == {
    "id": text,
    "source": text,
    "images": texts,
    "question": text,
    "answer": text,
    "steps": texts,
    "mc_scores": numbers,
    "num_mc_correct": counts,
    "num_mc_total": counts,
    "labels": numbers,
  }
  rows = table.to_pylist()
  assert [row["id"] for row in rows] == ["a:0", "b:0"]
  assert (rows[0]["answer"], rows[0]["images"], rows[0]["mc_scores"]) == (
    "52",
    ["a/1.png"],
    [0.5, 0],
  )
  card = (tmp_path / "ds" / "README.md").read_text()
  assert re.findall(r"- name: (\w+)", card) == list(types), "the card names the columns in order"
  assert "path: data/train.jsonl" in card and manifest.digest in card
  data = huggingface_hub.DatasetCard(card).data
  assert data.language == ["en"] and data.license == "other" and "prm" in data.tags
  assert data.size_categories == ["n<1K"] and data.annotations_creators == ["machine-generated"]


def test_a_file_cut_short_after_the_scan_is_named(tmp_path, selected):
  manifest, lines = selected()
  (tmp_path / "b.jsonl").write_text("")
  with pytest.raises(UserError, match="b.jsonl.* changed while it was read"):
    subset.write_raw(tmp_path / "out.jsonl", lines, manifest)
  assert not (tmp_path / "out.jsonl").exists()
