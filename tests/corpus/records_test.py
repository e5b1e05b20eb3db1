"""One raw line -> a rollout or the reason why not."""

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bis_jax.corpus import records
from bis_jax.corpus.rejections import REASONS, BadRecord


def parse(raw: bytes) -> records.Rollout:
  return records.parse_rollout(records.load_object(raw), "geo", 3)


def reason_of(raw: bytes) -> str:
  with pytest.raises(BadRecord) as caught:
    parse(raw)
  return caught.value.reason


def test_a_good_record(record_of, line_of):
  steps = [
    {"step": " One.\n\nStill one. ", "score": 0.3, "num_mc_correct": 3, "num_mc_total": 10},
    {"step": "求阴影 <prm>", "score": 1},
    {"step": "Three.", "score": 0.0, "num_mc_correct": 0, "num_mc_total": 0},
  ]
  rollout = parse(line_of(record_of(steps_with_score=steps, image=["a/1.png", "images/2.png"])))
  assert rollout == records.Rollout(
    source="geo",
    line=3,
    images=("a/1.png", "images/2.png"),
    question="How long is AB?",
    steps=("One.\n\nStill one.", "求阴影 <prm>", "Three."),
    scores=(0.3, 1.0, 0.0),
    measured=(True, True, False),
    answer="7",
  )
  assert rollout.id == "geo:3"


@pytest.mark.parametrize(
  ("fields", "question"),
  [
    ({"question_orig": " Original? "}, "Original?"),
    ({"question_orig": "", "question": "<image>\n Which? <image>"}, "Which?"),
    ({"question_orig": None, "question": "<image>\nWhich?"}, "Which?"),
    ({"question_orig": None, "question": None}, ""),
  ],
)
def test_question(record_of, line_of, fields, question):
  assert parse(line_of(record_of(**fields))).question == question


@pytest.mark.parametrize(
  ("raw", "reason"),
  [
    (b"", "blank_line"),
    (b" \t\r", "blank_line"),
    (b'{"a": 1', "not_json"),
    (b'{"a": 1} {"b": 2}', "not_json"),
    (b"[" * 100_000, "not_json"),
    (b'"text"', "not_an_object"),
    (b"null", "not_an_object"),
    (b'{"question": "\xff"}', "invalid_utf8"),
    (b'{"question": "\xed\xa0\x80"}', "invalid_utf8"),
  ],
)
def test_lines_that_are_no_object(raw, reason):
  assert reason_of(raw) == reason


@pytest.mark.parametrize(
  ("step", "reason"),
  [
    ("text", "empty_step"),
    ({"score": 1.0}, "empty_step"),
    ({"step": " \n\u3000", "score": 1.0}, "empty_step"),
    ({"step": 7, "score": 1.0}, "empty_step"),
    ({"step": "x"}, "missing_score"),
    ({"step": "x", "score": None}, "missing_score"),
    ({"step": "x", "score": "0.5"}, "score_not_a_number"),
    ({"step": "x", "score": True}, "score_not_a_number"),
    ({"step": "x", "score": [1]}, "score_not_a_number"),
    ({"step": "x", "score": math.nan}, "score_not_finite"),
    ({"step": "x", "score": -math.inf}, "score_not_finite"),
    ({"step": "x", "score": 1.0000001}, "score_out_of_range"),
    ({"step": "x", "score": -1e-9}, "score_out_of_range"),
    ({"step": "x", "score": 10**400}, "score_out_of_range"),
    ({"step": "x", "score": 0.5, "num_mc_correct": 20, "num_mc_total": 16}, "count_mismatch"),
    ({"step": "x", "score": 0.5, "num_mc_correct": 7, "num_mc_total": 16}, "count_mismatch"),
    ({"step": "x", "score": 1.0, "num_mc_correct": -1, "num_mc_total": -1}, "count_mismatch"),
    ({"step": "x", "score": 0.5, "num_mc_correct": 0, "num_mc_total": 0}, "count_mismatch"),
    ({"step": "x", "score": 0.0, "num_mc_correct": 1, "num_mc_total": 0}, "count_mismatch"),
    ({"step": "x", "score": 0.5, "num_mc_correct": "8", "num_mc_total": 16}, "count_mismatch"),
    ({"step": "x", "score": 0.5, "num_mc_correct": 0.5, "num_mc_total": True}, "count_mismatch"),
    ({"step": "half a pair: \ud800", "score": 0.5}, "invalid_utf8"),
  ],
)
def test_bad_steps(record_of, step, reason):
  good = record_of()["steps_with_score"]
  raw = json.dumps(record_of(steps_with_score=[*good, step])).encode()
  assert reason_of(raw) == reason


@pytest.mark.parametrize(
  ("fields", "reason"),
  [
    ({"steps_with_score": None}, "no_steps"),
    ({"steps_with_score": []}, "no_steps"),
    ({"steps_with_score": {"step": "x"}}, "no_steps"),
    ({"image": None}, "no_image"),
    ({"image": ""}, "no_image"),
    ({"image": []}, "no_image"),
    ({"image": ["a.png", ""]}, "no_image"),
    ({"image": 5}, "no_image"),
    ({"image": "/etc/passwd"}, "image_outside_root"),
    ({"image": ["a.png", "VisualPRM400K-v1.1-Raw/../../x.png"]}, "image_outside_root"),
  ],
)
def test_bad_records(record_of, line_of, fields, reason):
  assert reason_of(line_of(record_of(**fields))) == reason


def test_every_reason_is_in_the_list():
  assert set(REASONS) >= {"duplicate_line", "missing_image", "unreadable_image"}
  with pytest.raises(KeyError):
    REASONS["other"]


def test_notes(record_of, line_of):
  def noted(**fields):
    return [name for name, _ in records.notes(parse(line_of(record_of(**fields))))]

  assert noted() == []
  step = {"step": "then <|im_end|>", "score": 1.0}
  assert noted(steps_with_score=[step, step]) == ["special_token_text"]
  assert noted(question_orig="is a <b> & c < d?") == []
  assert noted(question_orig="<IMG_CONTEXT>") == ["special_token_text"]
  long = {"step": "word " * 60_000, "score": 1.0}
  assert noted(steps_with_score=[long], question=None, question_orig=None) == [
    "long_step",
    "no_question",
  ]


# The released builder's own rules, as a second opinion (`extract_step_scores`,
# `build_prm_from_rec`); records on which it crashes are not drawn.


def _builder_scores(record):
  scores = []
  for step in record.get("steps_with_score") or []:
    try:
      scores.append(float(step.get("score")))
    except (TypeError, ValueError):
      continue
  return scores


def _builder_writes(record):
  if not record.get("image") or not record.get("steps_with_score"):
    return False
  for step in record["steps_with_score"]:
    if not (step.get("step") or "").strip() or step.get("score") is None:
      return False
    try:
      float(step["score"])
    except (TypeError, ValueError):
      return False
  return True


_SCORES = st.one_of(
  st.none(),
  st.booleans(),
  st.floats(),
  st.integers(-2, 2),
  st.sampled_from(["0.5", "x", " 1 ", ""]),
)
_STEPS = st.fixed_dictionaries(
  {}, optional={"step": st.sampled_from(["", " \n", "x", None]), "score": _SCORES}
)
_RECORDS = st.fixed_dictionaries(
  {},
  optional={
    "image": st.sampled_from(["", "a.png", [], ["a.png"], None]),
    "steps_with_score": st.one_of(st.none(), st.lists(_STEPS, max_size=4)),
  },
)


@given(_RECORDS)
def test_paper_order_is_the_released_builder(record):
  scores, measured = records.paper_scores(record)
  assert list(map(repr, scores)) == list(map(repr, _builder_scores(record)))
  assert len(measured) == len(scores)
  assert records.paper_writes(record) == _builder_writes(record)


@example({"steps_with_score": [{"step": "x", "score": 0.0}]})
@given(_RECORDS)
def test_strict_order_accepts_no_more_than_the_paper_but_text_alone(record):
  try:
    rollout = records.parse_rollout(record, "a", 0)
  except BadRecord as error:
    assert error.reason in REASONS
    return
  assert records.paper_writes(record) == bool(rollout.images)
  assert tuple(records.paper_scores(record)[0]) == rollout.scores


def test_paper_order_knows_unmeasured_steps():
  steps = [
    {"score": 0.0, "num_mc_total": 0},
    {"score": "0", "num_mc_total": 0},
    {"score": 0.5, "num_mc_total": 0},
    {"score": 0.0, "num_mc_total": 16},
    {"num_mc_total": 0},
  ]
  assert records.paper_scores({"steps_with_score": steps}) == (
    [0.0, 0.0, 0.5, 0.0],
    [0, 0, -1, 16],
  )
