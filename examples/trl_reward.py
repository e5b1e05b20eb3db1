"""A reward function of TRL's GRPOTrainer from the scoring server.

    from trl_reward import step_reward
    trainer = GRPOTrainer(model, reward_funcs=step_reward("http://localhost:8000"), ...)

Copy this file and `reward_client.py` into one folder. Prompts may be texts or conversations; a column
`question` of the dataset replaces them, and `images` or `image` gives the images. Tried with TRL 1.16.
"""

import pathlib
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from reward_client import Candidate, RewardClient  # noqa: E402  # pyrefly: ignore[missing-import]


def step_reward(
  url: str, aggregate: str = "min", **client: Any
) -> Callable[..., Awaitable[list[float | None]]]:
  """Returns the function; a completion without a step, or too long, has no reward (None)."""
  server = RewardClient(url, aggregate, **client)

  async def prm_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    question: Sequence[str] | None = None,
    images: Sequence[Any] | None = None,
    image: Sequence[Any] | None = None,
    **_: Any,
  ) -> list[float | None]:
    questions = question or [_text(prompt, "user") for prompt in prompts]
    pictures = images or image or [None] * len(completions)
    results = await server.score(
      [
        Candidate(asked, _text(completion, "assistant"), _listed(picture))
        for asked, completion, picture in zip(questions, completions, pictures, strict=True)
      ]
    )
    return [result.get("score") for result in results]

  return prm_reward


def _listed(images: Any) -> list[Any]:
  return [] if images is None else list(images) if isinstance(images, list | tuple) else [images]


def _text(turns: Any, role: str) -> str:
  """Returns a text, or the text of a conversation's last message of a role."""
  if isinstance(turns, str):
    return turns
  content = [turn["content"] for turn in turns if turn["role"] == role][-1]
  if isinstance(content, str):
    return content
  return "\n".join(part["text"] for part in content if part["type"] == "text")
