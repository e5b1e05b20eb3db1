"""The forms that callers speak, over real sockets, and the schema that describes them."""

import base64
import json
import pathlib
import re

import numpy as np
import pytest
import schemathesis
from hypothesis import settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from bis_jax.inputs.texts import split_steps
from bis_jax.scoring import server
from tests.served import Lengths, Served, png, solution

SCHEMA = pathlib.Path(server.__file__).with_name("openapi.json")


@pytest.fixture(scope="module")
def served():
  one = Served(Lengths())
  yield one
  one.stop()


def user(text, *urls):
  images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
  return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def assistant(text):
  return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
  "encoded",
  [
    "data:image/png;base64," + png(),
    base64.encodebytes(base64.b64decode(png())).decode(),
    png()[:20] + "\r\n \t" + png()[20:],
  ],
)
def test_images_may_be_data_uris_and_have_line_breaks(served, encoded):
  assert served.call(solution("abc", images=[encoded]))[0] == 200


@pytest.mark.parametrize("text", ["data:image/png,abcd", "data:text/html;base64,@", "abc=\x0bd"])
def test_what_only_looks_like_base64_is_refused(served, text):
  status, answer = served.call(solution("abc", images=[text]))
  assert status == 400 and "not base64" in answer["error"]


def test_a_list_of_solutions_shares_question_and_image_which_is_decoded_once(served, monkeypatch):
  """Mutation caught: an image is prepared for every solution, so a list costs as much as requests."""
  prepared = []
  monkeypatch.setattr(Lengths, "image_patches", staticmethod(prepared.append))
  listed = [
    {"id": 7, "steps": ["abc", "d"]},
    {"id": "x", "question": "Another?", "steps": ["abcd"]},
    {"steps": []},
    {"id": 9, "steps": ["a" * 1001]},
    {"id": 10, "steps": ["e"], "images": [png(5)]},
    {"id": 11, "response": "one\n\ntwo\ntwo"},
  ]
  status, answer = served.call({"question": "How many?", "image": png(), "solutions": listed})
  assert status == 200 and len(prepared) == 2
  first, second, third, fourth, fifth, sixth = answer["solutions"]
  assert first == {"id": 7, "scores": [pytest.approx(0.003), pytest.approx(0.001)]}
  assert second["id"] == "x" and fifth["scores"] == [pytest.approx(0.001)]
  assert "at least one step" in third["error"] and fourth == {"id": 9, "error": "too long"}
  assert sixth["steps"] == ["one", "two\ntwo"] and len(sixth["scores"]) == 2


@pytest.mark.parametrize(
  ("body", "status", "reason"),
  [
    ({"solutions": []}, 400, "length >= 1"),
    ({"solutions": [3]}, 400, "Expected `object`, got `int`"),
    ({"solutions": [{"step": ["a"]}]}, 400, r"`solutions\[0\]`: unknown key `step`"),
    ({"solution": [solution("a")]}, 400, "unknown key `solution`"),
    ({"solutions": [{"steps": ["a"]}]}, 422, "`question` must be a string"),
    ({"question": "q", "solutions": [{"steps": ["a"]}] * 65}, 413, "65 solutions; at most 64"),
    (solution("a", response="a"), 400, "`response` is the text of `steps`"),
    ({"question": "q", "response": " \n"}, 422, "at least one step"),
    ({"question": "q", "response": 3}, 400, "got `int`"),
    ({"solutions": [solution("a", images=[png(k, 2) for k in (4, 5, 6)])]}, 413, "3 images"),
    (
      {"solutions": [solution("a", images=[png(1024, 600 + i)]) for i in range(2)]},
      422,
      "1,229,824 pixels in all",
    ),
    ({"solutions": [solution("a"), solution("b", images=[png()[:60]])]}, 422, "image 0: broken"),
  ],
)
def test_a_bad_list_gets_a_reason(served, body, status, reason):
  got, answer = served.call(body)
  assert got == status and re.search(reason, answer["error"]), answer


@pytest.mark.parametrize(
  ("aggregate", "value"), [("min", 0.2), ("product", 0.1), ("last", 0.5), ("mean", 0.35)]
)
def test_aggregates(served, aggregate, value):
  steps = ["a" * 200, "b" * 500]
  for body in (solution(*steps), {"solutions": [solution(*steps)]}):
    status, answer = served.call(body, path=f"/score?aggregate={aggregate}")
    found = answer["solutions"][0] if "solutions" in answer else answer
    assert status == 200 and found["score"] == pytest.approx(value)


@pytest.mark.parametrize("query", ["aggregate=max", "aggregat=min", "aggregate=min&aggregate=last"])
def test_a_query_that_is_not_understood_is_refused(served, query):
  status, answer = served.call(solution("a"), path=f"/score?{query}")
  assert status == 400 and "aggregate" in answer["error"]


def test_pooling_answers_as_vllm(served):
  """The response form is `PoolingResponse` of vllm/entrypoints/pooling/pooling/protocol.py."""
  name = served.call(None, "GET", "/v1/models")[1]["data"][0]["id"]
  body = {
    "model": name,
    "messages": [
      {"role": "system", "content": "You are a helpful assistant."},
      user("Question: How many?", "data:image/png;base64," + png()),
      assistant("Process: abc<prm>\n\nde<prm> not marked, so not scored"),
    ],
  }
  status, answer = served.call(body, path="/pooling")
  assert status == 200 and answer["object"] == "list" and answer["model"] == name
  [entry] = answer["data"]
  assert entry["index"] == 0 and entry["object"] == "pooling"
  lengths = [3, len("\n\nde")]
  np.testing.assert_allclose(entry["data"], [[n / 1000, 1 - n / 1000] for n in lengths], rtol=1e-5)


def test_pooling_reads_internvls_single_turn(served):
  text = "Question: How many?\nProcess: abc<prm>\n\nde<prm>"
  parts = [*user("", png())["content"][:1], {"type": "text", "text": text}]
  body = {"messages": [assistant(""), {"role": "assistant", "content": parts}]}
  body["messages"][0]["role"] = "user"
  status, answer = served.call(body, path="/pooling")
  assert status == 200 and answer["data"][0]["data"][0][0] == pytest.approx(0.003)


@pytest.mark.parametrize(
  ("body", "status", "reason"),
  [
    ({"input": "text"}, 400, "unknown key `input`"),
    ({"messages": [user("q"), assistant("no marker")]}, 422, "at least one step"),
    ({"messages": [assistant("a<prm>")]}, 400, "must be of a user"),
    ({"messages": [user("q", "http://x/y.png"), assistant("a<prm>")]}, 400, "not base64: 'http"),
    ({"messages": [user("q"), assistant("a<prm>")], "model": "other"}, 404, "'other' is not"),
    ({"messages": [user("q"), assistant("a<prm>")], "encoding_format": "base64"}, 400, "Invalid"),
    (
      {"messages": [user("q"), assistant("a<prm>")], "truncate_prompt_tokens": 5},
      400,
      "unknown key `truncate_prompt_tokens`",
    ),
  ],
)
def test_pooling_refuses_in_vllms_form(served, body, status, reason):
  got, answer = served.call(body, path="/pooling")
  assert got == answer["error"]["code"] == status
  assert re.search(reason, answer["error"]["message"]), answer


PROMPT = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def test_openrlhfs_remote_rewards(served):
  """Mutation caught: the end token or the prompt is scored as a part of a step."""
  seen = PROMPT.format("<|vision_start|><|image_pad|><|vision_end|>How many?")
  expanded = seen.replace("<|image_pad|>", "<|image_pad|>" * 9)
  responses = ["a" * 300 + "\n\n" + "b" * 200 + "<|im_end|>\n", "c" * 50, "", "d" * 1001]
  body = {
    "query": [expanded + response for response in responses],
    "prompts": [seen] * 4,
    "labels": ["5", json.dumps({"answer": 5, "images": [png()]}), None, {"images": [png()]}],
  }
  status, answer = served.call(body, path="/get_reward")
  assert status == 200 and answer["rewards"] == answer["scores"]
  assert answer["rewards"] == [pytest.approx(0.2), pytest.approx(0.05), 0, 0]
  assert answer["extra_logs"] == {"unscored": [0, 0, 1, 1], "steps": [2, 1, 0, 0]}
  status, answer = served.call(body, path="/get_reward?aggregate=mean")
  assert answer["rewards"][0] == pytest.approx(0.25)
  status, answer = served.call({"query": ["ab"], "prompts": [""]}, path="/get_reward")
  assert answer["rewards"] == [pytest.approx(0.002)]


@pytest.mark.parametrize(
  ("body", "reason"),
  [
    ({"query": ["a"], "prompts": []}, "same length"),
    ({"query": [], "prompts": []}, "empty"),
    ({"query": ["ab"], "prompts": ["b" * 3]}, r"`query\[0\]` does not begin with `prompts\[0\]`"),
    ({"query": "ab", "prompts": ["a"]}, "got `str`"),
    ({"query": ["ab"], "prompts": ["a"], "labels": ["{"]}, r"`labels\[0\]` is not valid JSON"),
  ],
)
def test_a_bad_remote_reward_gets_a_reason(served, body, reason):
  status, answer = served.call(body, path="/get_reward")
  assert status == 400 and re.search(reason, answer["error"]), answer


def test_metrics_count_what_was_asked():
  served = Served(Lengths())
  served.call({"question": "q", "solutions": [{"steps": ["a"]}, {"steps": ["b"]}]})
  served.call(b"{")
  served.call(None, "GET", "/nowhere")
  status, text = served.call(None, "GET", "/metrics")
  served.stop()
  values = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if line[0] != "#")
  assert status == 200
  assert values['bis_jax_requests_total{path="/score",status="200"}'] == "1.0"
  assert values['bis_jax_requests_total{path="/score",status="400"}'] == "1.0"
  assert values['bis_jax_requests_total{path="other",status="404"}'] == "1.0"
  assert values["bis_jax_queued_solutions"] == values["bis_jax_held_requests"] == "0.0"
  assert float(values["bis_jax_batch_fill_sum"]) == pytest.approx(2 / 64)
  assert float(values["bis_jax_batch_seconds_sum"]) > 0
  assert float(values["process_resident_memory_bytes"]) > 1e6


@pytest.mark.parametrize(
  ("text", "steps"),
  [
    ("one\n\ntwo\nlines\n \n three ", ["one", "two\nlines", "three"]),
    ("one\r\n\r\ntwo", ["one", "two"]),
    ("one\n two\n", ["one", "two"]),
    ("\n\n one \n\n", ["one"]),
    (" \n", []),
  ],
)
def test_steps_are_paragraphs_or_the_lines_of_one(text, steps):
  assert split_steps(text) == steps


def test_the_schema_names_every_path():
  document = json.loads(SCHEMA.read_text())
  paths = {*server._FORMS, "/", "/healthz", "/metrics", "/v1/models", "/openapi.json"}
  assert document["paths"].keys() == paths


@schemathesis.openapi.from_path(SCHEMA).parametrize()
@settings(max_examples=15)
def test_every_answer_has_the_form_of_the_schema(served, case):
  """Every request: no 5xx, and an answer of the documented form; wrong ones are refused.

  Right ones may be refused too: the schema can't say what an image is, or how long a step may be.
  """
  url = f"http://127.0.0.1:{served.port}"
  case.call_and_validate(url, excluded_checks=[positive_data_acceptance], timeout=20)
