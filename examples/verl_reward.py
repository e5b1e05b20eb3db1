"""A reward of verl from the scoring server: copy this file and `reward_client.py` into one folder.

    python -m verl.trainer.main_ppo ... \\
      custom_reward_function.path=verl_reward.py custom_reward_function.name=compute_score \\
      +custom_reward_function.reward_kwargs.url=http://reward-host:8000

`compute_score` is for the reward loop and the "naive" manager; with `reward_manager=batch` name
`compute_scores`, which sends the responses of a question in one request. The question, and the images
as paths or data: URIs, must be in the data's `extra_info` as `question` and `images`. The signatures are
those of verl/workers/reward_manager and verl/experimental/reward_loop (January 2026).
"""

import asyncio
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))  # verl imports this file alone
from reward_client import Candidate, RewardClient  # noqa: E402  # pyrefly: ignore[missing-import]

URL = "http://localhost:8000"


async def compute_score(
  data_source: str,
  solution_str: str,
  ground_truth: Any,
  extra_info: dict[str, Any] | None = None,
  *,
  url: str = URL,
  aggregate: str = "min",
  **_: Any,
) -> dict[str, Any]:
  """Returns the reward as `score`, and for the logs the number of steps and the first doubtful one."""
  client = RewardClient(url, aggregate)
  (result,) = await client.score([_candidate(solution_str, extra_info)])
  return _reward(result)


def compute_scores(
  data_sources: Sequence[str],
  solution_strs: Sequence[str],
  ground_truths: Sequence[Any],
  extra_infos: Sequence[dict[str, Any] | None],
  *,
  url: str = URL,
  aggregate: str = "min",
  **_: Any,
) -> list[dict[str, Any]]:
  """Returns `compute_score` of a batch."""
  client = RewardClient(url, aggregate)
  candidates = [*map(_candidate, solution_strs, extra_infos)]
  return [*map(_reward, asyncio.run(client.score(candidates)))]


def _candidate(response: str, extra_info: dict[str, Any] | None) -> Candidate:
  if not extra_info or "question" not in extra_info:
    raise ValueError(
      "no `question` in the data's extra_info: add it, and `images` if there are any"
    )
  images = extra_info.get("images")
  return Candidate(extra_info["question"], response, [] if images is None else list(images))


def _reward(result: dict[str, Any]) -> dict[str, Any]:
  scores = result.get("scores", [])
  doubtful = [i for i, score in enumerate(scores) if score < 0.5]
  return {
    "score": result.get("score", 0.0),  # 0 for a response without a step, or too long
    "unscored": float("error" in result),
    "steps": len(scores),
    "first_doubtful_step": doubtful[0] if doubtful else -1,
    "step_scores": " ".join(f"{score:.4f}" for score in scores),
  }
