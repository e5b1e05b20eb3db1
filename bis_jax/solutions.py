"""Solutions to score, as people bring them: text, steps and images that may all be broken.

    from bis_jax import scoring, solutions
    scorer = scoring.load("runs/toy_bis10")
    picture = open("cards.png", "rb").read()
    solution = solutions.Solution("Add the cards.", ("The red card shows 3.",), (picture,))
    print(solutions.score(scorer, [solution])[0])

prints an array with the probability that each step is correct.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from bis_jax.evaluation.visual_process_bench import without_placeholders
from bis_jax.inputs.images import ImageError, decode
from bis_jax.inputs.pipeline import Example, ExampleList
from bis_jax.scoring import Scorer


@dataclasses.dataclass(frozen=True)
class Solution:
  """A question, the steps of one answer to it, and its images as encoded bytes."""

  question: str
  steps: tuple[str, ...]
  images: tuple[bytes, ...] = ()


class SolutionError(ValueError):
  """A solution that can't be scored; the message says why, and nothing else is affected."""


def text_of(record: object) -> tuple[str, tuple[str, ...]]:
  """Returns (question, steps) of a JSON object with the keys `question` and `steps`.

  Raises SolutionError where they are not a string and a list of at least one string, or hold
  characters that are none (half of a surrogate pair).
  """
  if not isinstance(record, dict):
    raise SolutionError(f"a JSON object is wanted, found {type(record).__name__}")
  question, steps = record.get("question"), record.get("steps")
  if not isinstance(question, str):
    raise SolutionError("`question` must be a string")
  if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
    raise SolutionError("`steps` must be a list of at least one string")
  try:
    "".join([question, *steps]).encode()
  except UnicodeEncodeError as error:
    raise SolutionError(f"text that is not Unicode: {error.reason}") from error
  return question, tuple(steps)


def check_images(images: Sequence[bytes]) -> None:
  """Decodes every image once; raises SolutionError naming the first that is broken or too large."""
  for position, data in enumerate(images):
    try:
      decode(data)
    except ImageError as error:
      raise SolutionError(f"image {position}: {error}") from error


def score(scorer: Scorer, solutions: Sequence[Solution]) -> list[np.ndarray | SolutionError]:
  """Returns for each solution its step scores float32[n], P(correct), or why there are none.

  Image placeholders like `<image>` and `<image1>` leave the question, as they do in the benchmark.
  The images must be whole: see `check_images`.
  """
  zeros = [np.zeros(len(solution.steps), np.float32) for solution in solutions]
  examples = [
    Example(
      id=f"solution {i}",
      question=without_placeholders(solution.question),
      steps=solution.steps,
      images=solution.images,
      targets=zeros[i],
      weights=zeros[i],
    )
    for i, solution in enumerate(solutions)
  ]
  scores, refused = scorer.score_each(ExampleList(examples))
  return [SolutionError(refused[i]) if i in refused else s for i, s in enumerate(scores)]
