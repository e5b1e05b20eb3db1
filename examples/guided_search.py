"""Search guided by step scores: any OpenAI-compatible policy, and our scoring server.

    python -m examples.guided_search --policy=http://localhost:8001/v1 --model=Qwen/Qwen2.5-VL-7B-Instruct \\
      --rewards=http://localhost:8000 --image=cards.png "Add the numbers on the cards."

`best_of_n` samples whole responses and keeps the best. `beam_search` samples `expand` next steps for each
of `beams` partial responses and keeps the `beams` best: a step is a paragraph. It continues an
assistant's message, by the options that vLLM and SGLang have for it. Candidates of a round go to the
server in one request, which sends and decodes the images once.
"""

import argparse
import asyncio
import dataclasses
import mimetypes
import pathlib
from collections.abc import Sequence
from typing import Any

import aiohttp

from examples.reward_client import Candidate, RewardClient, encoded_image, post_json

SEPARATOR = "\n\n"
PROMPT = (
  "{question}\n\nSolve it step by step. Separate the steps by an empty line, and begin the last with "
  "'Final answer:'."
)


@dataclasses.dataclass(frozen=True)
class Found:
  """A response, or the beginning of one, with its value."""

  steps: tuple[str, ...] = ()
  score: float = 0.0
  finished: bool = False

  @property
  def text(self) -> str:
    return SEPARATOR.join(self.steps)


@dataclasses.dataclass(frozen=True)
class Policy:
  """An OpenAI-compatible endpoint, such as http://localhost:8001/v1."""

  url: str
  model: str
  temperature: float = 0.8
  max_tokens: int = 1024  # of a response, or of a step
  seconds: float = 300.0
  tries: int = 5

  async def sample(
    self, messages: list[dict[str, Any]], n: int, **options: Any
  ) -> list[dict[str, Any]]:
    """Returns n choices of a chat completion."""
    body = {"model": self.model, "messages": messages, "n": n, "max_tokens": self.max_tokens}
    body |= {"temperature": self.temperature, **options}
    async with aiohttp.ClientSession() as session:
      url = f"{self.url.rstrip('/')}/chat/completions"
      status, answer = await post_json(session, url, body, self.seconds, self.tries)
    if status != 200:
      raise RuntimeError(f"{url}: {status}: {answer}")
    return answer["choices"]

  async def next_steps(self, asked: dict[str, Any], partial: Found, n: int) -> list[Found]:
    """Returns n continuations of a partial response by one step each."""
    messages, options = [asked], {"stop": [SEPARATOR]}
    if partial.steps:
      messages.append({"role": "assistant", "content": partial.text + SEPARATOR})
      options |= {"add_generation_prompt": False, "continue_final_message": True}
    choices = await self.sample(messages, n, **options)
    return [_continued(partial, choice) for choice in choices]


def _continued(partial: Found, choice: dict[str, Any]) -> Found:
  step = choice["message"]["content"].strip()
  # vLLM names the stop string; without it, only a final answer or an empty step ends a response.
  ended = choice.get("stop_reason", SEPARATOR) != SEPARATOR or choice["finish_reason"] == "length"
  steps = (*partial.steps, step) if step else partial.steps
  return Found(steps, finished=ended or not step or "final answer" in step.lower())


def question_message(question: str, images: Sequence[Any]) -> dict[str, Any]:
  """Returns the user's message with its images inline."""
  parts: list[dict[str, Any]] = []
  for image in images:
    kind = mimetypes.guess_type(str(image))[0] if isinstance(image, str | pathlib.Path) else None
    encoded = encoded_image(image)
    url = encoded if encoded.startswith("data:") else f"data:{kind or 'image/png'};base64,{encoded}"
    parts.append({"type": "image_url", "image_url": {"url": url}})
  parts.append({"type": "text", "text": PROMPT.format(question=question)})
  return {"role": "user", "content": parts}


async def scored(
  rewards: RewardClient, question: str, images: Sequence[Any], found: Sequence[Found]
) -> list[Found]:
  """Returns what has a score, the best first; of equals, the first."""
  results = await rewards.score(
    [Candidate(question, images=images, steps=one.steps or ("",)) for one in found]
  )
  whole = [
    dataclasses.replace(one, score=result["score"])
    for one, result in zip(found, results, strict=True)
    if "score" in result and one.steps
  ]
  return sorted(whole, key=lambda one: -one.score)


async def best_of_n(
  policy: Policy, rewards: RewardClient, question: str, images: Sequence[Any] = (), n: int = 8
) -> list[Found]:
  """Returns n responses with their scores, the best first."""
  choices = await policy.sample([question_message(question, images)], n)
  texts = [choice["message"]["content"] for choice in choices]
  found = [
    Found(tuple(step.strip() for step in text.split(SEPARATOR) if step.strip()), finished=True)
    for text in texts
  ]
  return await scored(rewards, question, images, found)


async def beam_search(
  policy: Policy,
  rewards: RewardClient,
  question: str,
  images: Sequence[Any] = (),
  beams: int = 4,
  expand: int = 4,
  most_steps: int = 20,
) -> list[Found]:
  """Returns up to `beams` responses, the best first; finished ones stay while they are among them."""
  asked, kept = question_message(question, images), [Found()]
  for _ in range(most_steps):
    open_ones = [one for one in kept if not one.finished]
    if not open_ones:
      break
    count = beams * expand if open_ones == [Found()] else expand
    longer = await asyncio.gather(*(policy.next_steps(asked, one, count) for one in open_ones))
    new = {one.steps: one for several in longer for one in several}  # equal ones once
    finished = [one for one in kept if one.finished]
    best = await scored(rewards, question, images, [*new.values()])
    kept = sorted([*finished, *best], key=lambda one: -one.score)[:beams] or kept
  return kept


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("question")
  parser.add_argument("--policy", required=True, help="address that ends in /v1")
  parser.add_argument("--model", required=True)
  parser.add_argument("--rewards", default="http://localhost:8000")
  parser.add_argument("--aggregate", default="min")
  parser.add_argument("--image", action="append", default=[])
  parser.add_argument("--n", type=int, default=0, help="Best-of-N instead of beam search")
  args = parser.parse_args()
  policy, rewards = Policy(args.policy, args.model), RewardClient(args.rewards, args.aggregate)
  search = (
    best_of_n(policy, rewards, args.question, args.image, args.n)
    if args.n
    else beam_search(policy, rewards, args.question, args.image)
  )
  for one in asyncio.run(search):
    print(f"{one.score:.3f}  {one.text!r}")


if __name__ == "__main__":
  main()
