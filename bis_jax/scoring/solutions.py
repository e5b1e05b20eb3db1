"""Solutions to score, as people bring them: text, steps and images that may all be broken.

    from bis_jax import scoring, solutions
    scorer = scoring.load("runs/toy_bis10")
    picture = open("cards.png", "rb").read()
    solution = solutions.Solution.of("Add the cards.", ["The red card shows 3."], [picture])
    print(solutions.score(scorer, [solution])[0])

prints an array with the probability that each step is correct.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from bis_jax.errors import UserError
from bis_jax.evaluation.visual_process_bench import without_placeholders
from bis_jax.inputs.images import ImageError, decode
from bis_jax.inputs.pipeline import Example
from bis_jax.scoring.step_scorer import Scorer


class SolutionError(UserError):
  """A solution that can't be scored; the message says why, and nothing else is affected."""


@dataclasses.dataclass(frozen=True)
class Solution:
  """A question, the n >= 1 steps of one answer, and its whole images; made and checked by `of`.

  `images` are encoded, `image_sizes` their (height, width) upright.
  """

  question: str
  steps: tuple[str, ...]
  images: tuple[bytes, ...]
  image_sizes: tuple[tuple[int, int], ...]

  @classmethod
  def of(cls, question: object, steps: object, images: Sequence[bytes] = ()) -> "Solution":
    """Returns the solution; every image is decoded once to see that it is whole.

    Image placeholders (`<image>`, `<image1>`, ...) leave the question, as in the benchmark. Raises
    SolutionError where `question` is no string, `steps` no list of at least one string, a text
    holds half of a surrogate pair, or an image is broken or too large.
    """
    if not isinstance(question, str):
      raise SolutionError("`question` must be a string")
    if not isinstance(steps, (list, tuple)) or not all(isinstance(step, str) for step in steps):
      raise SolutionError("`steps` must be a list of strings")
    if not steps:
      raise SolutionError("`steps` must have at least one step")
    try:
      "".join([question, *steps]).encode()
    except UnicodeEncodeError as error:
      raise SolutionError(f"text that is not Unicode: {error.reason}") from error
    sizes = []
    for position, data in enumerate(images):
      try:
        image = decode(data)
      except ImageError as error:
        raise SolutionError(f"image {position}: {error}") from error
      sizes.append((image.height, image.width))
    return cls(without_placeholders(question), tuple(steps), tuple(images), tuple(sizes))


def score(scorer: Scorer, solutions: Sequence[Solution]) -> list[np.ndarray | SolutionError]:
  """Returns for each solution its step scores float32[n], P(correct), or why it is too long."""
  scores, refused = scorer.score_each(_Source(solutions))
  return [SolutionError(refused[i]) if i in refused else s for i, s in enumerate(scores)]


class _Source:
  """Solutions as a source of examples; targets and weights are 0."""

  def __init__(self, solutions: Sequence[Solution]):
    self._solutions = solutions

  def __len__(self) -> int:
    return len(self._solutions)

  def __getitem__(self, i: int) -> Example:
    solution = self._solutions[i]
    zeros = np.zeros(len(solution.steps), np.float32)
    return Example(
      id=f"solution {i}",
      question=solution.question,
      steps=solution.steps,
      images=solution.images,
      targets=zeros,
      weights=zeros,
    )

  def text(self, i: int) -> tuple[str, Sequence[str]]:
    return self._solutions[i].question, self._solutions[i].steps

  def image_sizes(self, i: int) -> Sequence[tuple[int, int]]:
    return self._solutions[i].image_sizes
