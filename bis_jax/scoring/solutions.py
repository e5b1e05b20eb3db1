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
from bis_jax.evaluation.visual_process_bench import without_numbered_placeholders
from bis_jax.images import ImageError, decode
from bis_jax.inputs.pipeline import unlabelled
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
    return cls(without_numbered_placeholders(question), tuple(steps), tuple(images), tuple(sizes))

  def read_images(self) -> tuple[bytes, ...]:
    """Returns the encoded images."""
    return self.images


def score(scorer: Scorer, solutions: Sequence[Solution]) -> list[np.ndarray | SolutionError]:
  """Returns for each solution its step scores float32[n], P(correct), or why it is too long."""
  examples = [
    unlabelled(f"solution {i}", s.question, s.steps, s.image_sizes, s.read_images)
    for i, s in enumerate(solutions)
  ]
  scores, refused = scorer.score_each(examples)
  return [SolutionError(refused[i]) if i in refused else s for i, s in enumerate(scores)]
