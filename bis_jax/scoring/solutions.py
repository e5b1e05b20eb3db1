"""Solutions to score, from users: text, steps and images may all be invalid.

    from bis_jax.scoring import solutions, step_scorer
    scorer = step_scorer.load("runs/toy_bis10")
    picture = open("cards.png", "rb").read()
    solution = solutions.Solution.of("Add the cards.", ["The red card shows 3."], [picture])
    print(solutions.score(scorer, [solution])[0])

prints an array with the probability that each step is correct.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from bis_jax.errors import UserError
from bis_jax.images import ImageError, decode
from bis_jax.inputs.pipeline import unlabelled
from bis_jax.inputs.texts import question_text
from bis_jax.scoring.step_scorer import Scorer


class SolutionError(UserError):
  """A solution that can't be scored, and why; others are not affected."""


@dataclasses.dataclass(frozen=True)
class Solution:
  """A question, the n >= 1 steps of one answer, and its encoded images; made and checked by `of`.

  `image_sizes` are (height, width) after EXIF rotation.
  """

  question: str
  steps: tuple[str, ...]
  images: tuple[bytes, ...]
  image_sizes: tuple[tuple[int, int], ...]

  @classmethod
  def of(cls, question: object, steps: object, images: Sequence[bytes] = ()) -> "Solution":
    """Returns the checked solution; `<image>`, `<image1>`, ... are removed from the question.

    Raises SolutionError for a text or an image that cannot be used.
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
        image = decode(data)  # now, because in a batch it would affect others
      except ImageError as error:
        raise SolutionError(f"image {position}: {error}") from error
      sizes.append((image.height, image.width))
    return cls(question_text(question), tuple(steps), tuple(images), tuple(sizes))

  def read_images(self) -> tuple[bytes, ...]:
    return self.images


def score(scorer: Scorer, solutions: Sequence[Solution]) -> list[np.ndarray | SolutionError]:
  """Returns the step scores float32[n], P(correct), of each solution, or why it is too long."""
  examples = [
    unlabelled(f"solution {i}", s.question, s.steps, s.image_sizes, s.read_images)
    for i, s in enumerate(solutions)
  ]
  scores, refused = scorer.score_each(examples)
  return [SolutionError(refused[i]) if i in refused else s for i, s in enumerate(scores)]
