"""The examples for RL and search, called as their callers do, against a running server."""

import asyncio
import base64
import dataclasses
import io
import json
import os
import pathlib
import re
import socket
import subprocess

import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from bis_jax.scoring import server
from examples import guided_search, reward_client, trl_reward, verl_reward
from examples.reward_client import Candidate, RewardClient
from tests.served import LIMITS, Lengths, Served, png

EXAMPLES = pathlib.Path(reward_client.__file__).parent
PICTURE = base64.b64decode(png())


@pytest.fixture(scope="module")
def served():
  one = Served(Lengths(), dataclasses.replace(LIMITS, characters=3000))
  yield one
  one.stop()


def score(client, *candidates):
  return asyncio.run(client.score(candidates))


def answered(served):
  """Returns how many requests for scores have been answered."""
  (line,) = re.findall(
    rb'^bis_jax_requests_total{path="/score",status="200"} (.*)$',
    served.call(None, "GET", "/metrics")[1],
    re.M,
  ) or [b"0"]
  return float(line)


def test_candidates_of_a_question_go_in_one_request(served):
  """Mutation caught: scores of one group are given to another's candidates."""
  image = Image.open(io.BytesIO(PICTURE))
  asked = [
    Candidate("q", "a" * 100 + "\n\n" + "b" * 300, [image]),
    Candidate("other", "c" * 50),
    Candidate("q", "d" * 200, [image]),
    Candidate("q", " ", [image]),
    Candidate("q", steps=["e" * 10, "f" * 20], images=[PICTURE]),
  ]
  before = answered(served)
  first, second, third, fourth, fifth = score(RewardClient(served.url), *asked)
  assert answered(served) == before + 3
  assert first["scores"] == [pytest.approx(0.1), pytest.approx(0.3)]
  assert first["score"] == pytest.approx(0.1) and second["score"] == pytest.approx(0.05)
  assert third["score"] == pytest.approx(0.2) and "at least one step" in fourth["error"]
  assert fifth["score"] == pytest.approx(0.01)


def test_what_is_too_much_together_is_asked_in_parts(served):
  asked = [Candidate("q", "a" * 900) for _ in range(5)]  # 3,000 characters are accepted
  assert [one["score"] for one in score(RewardClient(served.url), *asked)] == pytest.approx(
    [0.9] * 5
  )
  (alone,) = score(RewardClient(served.url), Candidate("q", "\n\n".join(["a" * 900] * 5)))
  assert "at most 3000" in alone["error"]


def test_a_request_that_is_wrong_is_not_tried_again(served):
  with pytest.raises(reward_client.RewardServerError, match="400: .*aggregate"):
    score(RewardClient(served.url, "median"), Candidate("q", "a"))


def test_a_busy_server_is_asked_again():
  busy = Served(Lengths(seconds=0.2), server.Limits(waiting=4))
  asked = [Candidate(f"q{i}", "a" * (i + 1)) for i in range(12)]
  results = score(RewardClient(busy.url, together=12, tries=20), *asked)
  busy.stop()
  assert [one["score"] for one in results] == pytest.approx([(i + 1) / 1000 for i in range(12)])


def test_a_server_that_starts_late_or_hangs_is_waited_for(monkeypatch):
  with socket.socket() as silent:
    silent.bind(("127.0.0.1", 0))
    silent.listen()  # connects, and never answers
    url = f"http://127.0.0.1:{silent.getsockname()[1]}"
    client = RewardClient(url, seconds=0.2, tries=2)
    with pytest.raises(reward_client.RewardServerError, match="failed 2 times; at last Timeout"):
      score(client, Candidate("q", "a"))
  with pytest.raises(reward_client.RewardServerError, match="failed 1 times; at last Client"):
    score(RewardClient(url, tries=1), Candidate("q", "a"))


@pytest.mark.parametrize("form", ["path", "bytes", "dict", "uri", "image"])
def test_images_come_in_every_form_of_the_trainers(form, tmp_path):
  (tmp_path / "a.png").write_bytes(PICTURE)
  given = {
    "path": str(tmp_path / "a.png"),
    "bytes": PICTURE,
    "dict": {"bytes": None, "path": tmp_path / "a.png"},
    "uri": "data:image/png;base64," + png(),
    "image": Image.open(io.BytesIO(PICTURE)),
  }[form]
  encoded = reward_client.encoded_image(given).removeprefix("data:image/png;base64,")
  with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
    assert image.size == (4, 4)


def test_verl_calls_it_as_its_reward_managers_do(served, tmp_path):
  """Keyword arguments as in verl/workers/reward_manager/{naive,batch}.py and the reward loop."""
  (tmp_path / "a.png").write_bytes(PICTURE)
  info = {"index": 3, "question": "q", "images": [str(tmp_path / "a.png")], "num_turns": None}
  one = asyncio.run(
    verl_reward.compute_score(
      data_source="geo3k",
      solution_str="a" * 600 + "\n\n" + "b" * 100,
      ground_truth="3",
      extra_info=info,
      url=served.url,
    )
  )
  assert one["score"] == pytest.approx(0.1) and one["first_doubtful_step"] == 1
  many = verl_reward.compute_scores(
    data_sources=["geo3k"] * 3,
    solution_strs=["a" * 600, "", "c" * 5000],
    ground_truths=["3"] * 3,
    extra_infos=[info, info | {"rollout_reward_scores": {}}, info],
    url=served.url,
    aggregate="mean",
  )
  assert [one["score"] for one in many] == [pytest.approx(0.6), 0, 0]
  assert [one["unscored"] for one in many] == [0, 1, 1]
  assert len({frozenset(one) for one in many}) == 1  # verl makes columns of the keys
  with pytest.raises(ValueError, match="no `question`"):
    verl_reward.compute_scores(["x"], ["a"], ["b"], [{}], url=served.url)


@pytest.mark.parametrize("conversation", [False, True])
def test_trl_calls_it_as_grpo_does(served, conversation):
  """Keyword arguments as in GRPOTrainer._calculate_rewards; None is no reward."""
  prompts, completions = ["How many?", "How many?"], ["a" * 100 + "\n\n" + "b" * 50, " "]
  if conversation:
    prompts = [
      [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": p}]}]
      for p in prompts
    ]
    completions = [[{"role": "assistant", "content": text}] for text in completions]
  rewards = asyncio.run(
    trl_reward.step_reward(served.url)(
      prompts=prompts,
      completions=completions,
      completion_ids=[[1], [2]],
      image=[Image.open(io.BytesIO(PICTURE))] * 2,
      answer=["1", "2"],
      trainer_state=None,
      log_extra=None,
      log_metric=None,
    )
  )
  assert rewards == [pytest.approx(0.05), None]


@pytest.mark.skipif(
  "TRL_PYTHON" not in os.environ, reason="trains with TRL, in its own environment"
)
def test_grpo_trains_a_tiny_model_with_it(served, tmp_path):
  command = [os.environ["TRL_PYTHON"], "-m", "benchmarks.trl_grpo", served.url, str(tmp_path)]
  environment = os.environ | {"PYTHONPATH": ""}  # see tests/conftest.py: it needs torch
  run = subprocess.run(
    command, cwd=EXAMPLES.parent, env=environment, capture_output=True, text=True, check=True
  )
  steps = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"')]
  assert len(steps) == 2 and all(0 < step["reward"] < 1 for step in steps)


def test_openrlhfs_script_asks_for_the_address_of_our_server(served, tmp_path):
  """The script runs to the end with OpenRLHF's command replaced by one that prints its arguments."""
  fake = tmp_path / "python3"
  fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
  fake.chmod(0o755)
  path = f"{tmp_path}:{os.environ['PATH']}"
  run = subprocess.run(
    [EXAMPLES / "openrlhf.sh", "--train.num_episodes", "1"],
    env={"PATH": path, "REWARD": served.url, "DATA": "d.jsonl", "AGGREGATE": "mean"},
    capture_output=True,
    text=True,
    check=True,
  )
  words = run.stdout.split()
  url = words[words.index("--reward.remote_url") + 1]
  assert words[:2] == ["-m", "openrlhf.cli.train_ppo_ray"] and words[-1] == "1"
  # What OpenRLHF posts to it (openrlhf/utils/agent.py).
  prompt = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
  body = {"query": [prompt + "a" * 9 + "<|im_end|>"], "prompts": [prompt], "labels": ["3"]}
  status, answer = served.call(body, path=url.removeprefix(served.url))
  assert status == 200 and answer["rewards"] == [pytest.approx(0.009)]


class ScriptedPolicy:
  """A policy whose next steps are written down: longer ones score higher under the stub."""

  def __init__(self, stop_reason):
    self.bodies, self._stop_reason = [], stop_reason

  async def complete(self, request):
    body = await request.json()
    self.bodies.append(body)
    last = body["messages"][-1]
    before = last["content"].split("\n\n")[:-1] if last["role"] == "assistant" else []
    choices = []
    for k in range(body["n"]):
      if "stop" not in body:
        text, stopped = "\n\n".join("x" * (10 * k + i + 1) for i in range(2)), None
      elif len(before) == 2:
        text, stopped = "Final answer: " + "z" * (300 + k), None
      else:  # the last of each round is the best; the first round's is a trap that ends badly
        text, stopped = "y" * (100 * (k + 1)), "\n\n"
      choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
      choices.append(choice | ({"stop_reason": stopped} if self._stop_reason else {}))
    return JSONResponse({"choices": choices})


@pytest.fixture(params=[True, False], ids=["stop_reason", "plain"])
def policy(request):
  scripted = ScriptedPolicy(request.param)
  app = Starlette(routes=[Route("/v1/chat/completions", scripted.complete, methods=["POST"])])
  one = Served(None, app=app)
  yield guided_search.Policy(f"{one.url}/v1", "scripted"), scripted
  one.stop()


def test_beam_search_keeps_the_best_steps(served, policy):
  """Mutation caught: the worst are kept, or a beam is continued by another's step."""
  endpoint, scripted = policy
  search = guided_search.beam_search(
    endpoint, RewardClient(served.url, "mean"), "q", [PICTURE], beams=2, expand=2
  )
  best, second = asyncio.run(search)
  assert best.finished and best.steps == ("y" * 400, "y" * 200, "Final answer: " + "z" * 301)
  assert best.score == pytest.approx((400 + 200 + 315) / 3000)
  assert second.steps == ("y" * 400, "y" * 200, "Final answer: " + "z" * 300)
  first, *later = scripted.bodies
  assert first["n"] == 4 and first["stop"] == ["\n\n"] and len(first["messages"]) == 1
  assert first["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
  assert (
    all(body["n"] == 2 and body["continue_final_message"] for body in later) and len(later) == 4
  )


def test_best_of_n_is_sorted_by_its_score(served, policy):
  found = asyncio.run(
    guided_search.best_of_n(policy[0], RewardClient(served.url, "last"), "q", n=4)
  )
  assert [len(one.steps[0]) for one in found] == [31, 21, 11, 1]
  assert found[0].score == pytest.approx(0.032)
