"""Asks the scoring server (`python -m bis_jax.serve`) from RL or search; needs aiohttp only.

    client = RewardClient("http://localhost:8000", aggregate="min")
    results = await client.score([Candidate("2 + 2?", "Add them.\\n\\nFinal answer: 4")])
    -> [{"steps": [...], "scores": [0.98, 0.91], "score": 0.91}], or [{"error": "..."}]

Candidates of one question and the same images go in one request, which sends the images once.
"""

import asyncio
import base64
import dataclasses
import io
import pathlib
import random
from collections.abc import Sequence
from typing import Any

import aiohttp

_TRY_AGAIN = (408, 429, 500, 502, 503, 504)


class RewardServerError(RuntimeError):
  """The server can't be reached, or a request that it does not understand."""


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A response; its steps are its paragraphs, or the lines of a single one, unless they are given."""

  question: str
  response: str = ""
  # Each a path, a data: URI, encoded bytes, a PIL image, or {"bytes", "path"} as in datasets.
  images: Sequence[Any] = ()
  steps: Sequence[str] | None = None


@dataclasses.dataclass(frozen=True)
class RewardClient:
  url: str
  aggregate: str = "min"  # or product, last, mean
  seconds: float = 120.0  # a request may take
  tries: int = 7  # of a request that fails for a reason that may pass
  together: int = 8  # requests at a time
  most: int = 64  # candidates of a request

  async def score(self, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Returns `steps`, `scores` and `score` of each candidate, or why it has none as `error`."""
    groups: dict[tuple, list[int]] = {}
    for i, one in enumerate(candidates):
      groups.setdefault((one.question, *map(image_key, one.images)), []).append(i)
    results: list[dict[str, Any]] = [{}] * len(candidates)
    places = asyncio.Semaphore(self.together)

    async def ask(session: aiohttp.ClientSession, indices: list[int]) -> None:
      async with places:
        answers = await self._ask(session, [candidates[i] for i in indices])
      for i, answer in zip(indices, answers, strict=True):
        results[i] = answer

    async with aiohttp.ClientSession() as session:
      parts = [
        indices[start : start + self.most]
        for indices in groups.values()
        for start in range(0, len(indices), self.most)
      ]
      await asyncio.gather(*(ask(session, part) for part in parts))
    return results

  async def _ask(
    self, session: aiohttp.ClientSession, group: list[Candidate]
  ) -> list[dict[str, Any]]:
    body = {
      "question": group[0].question,
      "images": [encoded_image(image) for image in group[0].images],
      "solutions": [
        {"response": one.response} if one.steps is None else {"steps": list(one.steps)}
        for one in group
      ],
    }
    url = f"{self.url.rstrip('/')}/score?aggregate={self.aggregate}"
    status, answer = await post_json(session, url, body, self.seconds, self.tries)
    if status == 200:
      return answer["solutions"]
    if status == 413 and len(group) > 1:  # too much in all, but perhaps not one by one
      half = len(group) // 2
      return [*await self._ask(session, group[:half]), *await self._ask(session, group[half:])]
    if status in (413, 422):
      return [{"error": answer["error"]}] * len(group)
    raise RewardServerError(f"{url}: {status}: {answer}")


async def post_json(
  session: aiohttp.ClientSession, url: str, body: object, seconds: float, tries: int
) -> tuple[int, Any]:
  """Returns (status, JSON), after up to `tries` tries; raises RewardServerError after the last."""
  reason = ""
  for attempt in range(tries):
    pause = min(10.0, 0.25 * 2**attempt) * random.uniform(0.5, 1.5)
    try:
      timeout = aiohttp.ClientTimeout(total=seconds)
      async with session.post(url, json=body, timeout=timeout) as response:
        if response.status not in _TRY_AGAIN:
          return response.status, await response.json(content_type=None)
        reason = f"{response.status}: {await response.text()}"
        after = response.headers.get("retry-after", "")
        pause = max(pause, float(after)) if after.isdigit() else pause
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
      reason = f"{type(error).__name__}: {error}"
    if attempt + 1 < tries:
      await asyncio.sleep(pause)
  raise RewardServerError(f"{url} failed {tries} times; at last {reason[:500]}")


def image_key(image: Any) -> Any:
  """Returns what tells images apart: themselves if they can be compared quickly, else which object."""
  return image if isinstance(image, str | bytes | pathlib.Path) else id(image)


def encoded_image(image: Any) -> str:
  """Returns an image as base64."""
  if isinstance(image, dict):
    image = image["path"] if image.get("bytes") is None else image["bytes"]
  if isinstance(image, str) and image.startswith("data:"):
    return image
  if isinstance(image, str | pathlib.Path):
    image = pathlib.Path(image).read_bytes()
  if not isinstance(image, bytes):
    image.save(file := io.BytesIO(), "PNG")
    image = file.getvalue()
  return base64.b64encode(image).decode()
