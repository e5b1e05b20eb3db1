"""Solutions to score, from users: text, steps and images may all be invalid.

    import bis_jax
    model = bis_jax.load("runs/toy_bis10")
    print(model("Add the cards.", "cards.png", ["The red card shows 3."]))

prints an array with the probability that each step is correct.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import PIL.Image
from etils import epath

from bis_jax import files
from bis_jax.errors import UserError
from bis_jax.evaluation.json_records import EvaluationError, convert
from bis_jax.images import ImageError, decode, stored_pixels, upright_rgb, upright_size
from bis_jax.inputs.images import ImagePatches
from bis_jax.inputs.pipeline import Example, unlabelled
from bis_jax.inputs.texts import has_placeholder, question_text, split_steps
from bis_jax.scoring.step_scorer import Scorer, load

_T = TypeVar("_T")
Image = bytes | str | epath.PathLike | PIL.Image.Image
_ID_LENGTH = 1000  # of its JSON; it is written with the scores


class SolutionError(UserError):
  """A solution that can't be scored, and why; others are not affected."""


class Record(msgspec.Struct, forbid_unknown_fields=True):
  """A solution as files and requests state it; made and checked by `of`."""

  id: Any = None
  question: Any = None
  steps: Any = None
  response: str | None = None  # text instead of `steps`, which `of` then finds in it
  image: str | list[str] | None = None  # or `images`: paths in files, base64 in requests
  images: str | list[str] | None = None

  @classmethod
  def of(cls, value: object) -> "Record":
    """Returns a JSON value as a record; raises SolutionError for other keys or two of one thing."""
    try:
      record = convert(value, cls)
    except EvaluationError as error:
      raise SolutionError(str(error)) from error
    if record.id is not None and identity(value) is None:
      raise SolutionError(
        f"`id` must be JSON, which has no NaN or infinity, of at most {_ID_LENGTH} characters"
      )
    if record.response is not None:
      if record.steps is not None:
        raise SolutionError("`response` is the text of `steps`: give one of them")
      record.steps = split_steps(record.response)
    record.images = _one_of(record.image, record.images)
    return record

  @property
  def named_images(self) -> list[str]:
    return [self.images] if isinstance(self.images, str) else self.images or []

  def solution(
    self, read_image: Callable[[str], bytes], max_pixels: int | None = None
  ) -> "Solution":
    """Returns `Solution.measured` of this record; raises SolutionError."""
    images = [*map(read_image, self.named_images)]
    return Solution.measured(self.question, self.steps, images, max_pixels)


@dataclasses.dataclass(frozen=True)
class Solution:
  """A question, the n >= 1 steps of one answer, and its images; made and checked by `of`.

  The images are encoded, or patches after `prepare_images`.
  `image_sizes` are (height, width) after EXIF rotation.
  """

  question: str
  steps: tuple[str, ...]
  images: tuple[bytes | ImagePatches, ...]
  image_sizes: tuple[tuple[int, int], ...]
  images_id: str = ""  # digest of the encoded images

  @classmethod
  def of(
    cls,
    question: object,
    steps: object,
    images: bytes | Sequence[bytes] | None = None,
    *,
    image: bytes | Sequence[bytes] | None = None,
  ) -> "Solution":
    """Returns the checked solution; `<image>`, `<image1>`, ... are removed from the question.

    `image` is another name of `images`. Raises SolutionError for a text or image that is unusable.
    """
    images = _one_of(image, images) or ()
    images = (images,) if isinstance(images, bytes) else tuple(images)
    return cls.measured(question, steps, images).check_images()

  @classmethod
  def measured(
    cls, question: object, steps: object, images: Sequence[bytes], max_pixels: int | None = None
  ) -> "Solution":
    """Returns a solution whose images are still to be checked; at most `max_pixels` in all of them."""
    question, steps = _checked_texts(question, steps, images)
    pixels = sum(_checked(stored_pixels, images))
    if max_pixels and pixels > max_pixels:
      raise SolutionError(f"{pixels:,} pixels in all images; at most {max_pixels:,} are accepted")
    sizes = tuple(_checked(upright_size, images))
    digests = " ".join(hashlib.sha256(image).hexdigest() for image in images)
    return cls(question, steps, tuple(images), sizes, digests)

  def with_texts(self, question: object, steps: object) -> "Solution":
    """Returns a checked solution of another question or other steps with the same images."""
    question, steps = _checked_texts(question, steps, self.images)
    return dataclasses.replace(self, question=question, steps=steps)

  def check_images(self) -> "Solution":
    """Decodes every image: in a batch, a damaged one would affect other solutions."""
    _checked(decode, self.images)
    return self

  def prepare_images(self, scorer: Scorer) -> "Solution":
    """Returns the solution for this scorer, which then decodes no image; raises SolutionError."""
    patches = _checked(scorer.image_patches, self.images)
    return dataclasses.replace(self, images=tuple(patches))

  def read_images(self) -> tuple[bytes | ImagePatches, ...]:
    return self.images


def identity(value: object) -> object:
  """Returns the `id` of a record, or None if there is none, or it is too long or no JSON as NaN."""
  found = value.get("id") if isinstance(value, dict) else None
  try:
    return found if len(json.dumps(found, allow_nan=False)) <= _ID_LENGTH else None
  except (ValueError, RecursionError):
    return None


def _checked_texts(
  question: object, steps: object, images: Sequence[object]
) -> tuple[str, tuple[str, ...]]:
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
  if has_placeholder(question) and not images:
    raise SolutionError(
      "`question` has a placeholder such as <image>, but there is no image: give it as `image`, "
      "or remove the placeholder"
    )
  return question_text(question), tuple(steps)


def _checked(read: Callable[[Any], _T], images: Sequence[Any]) -> list[_T]:
  results = []
  for i, data in enumerate(images):
    try:
      results.append(read(data))
    except ImageError as error:
      raise SolutionError(f"image {i}: {error}") from error
  return results


def _one_of(image: Any, images: Any) -> Any:
  if image is not None and images is not None:
    raise SolutionError("`image` and `images` are two names of one key: give one of them")
  return images if image is None else image


def score(scorer: Scorer, solutions: Sequence[Solution]) -> list[np.ndarray | SolutionError]:
  """Returns the step scores float32[n], P(correct), of each solution, or why it is too long."""
  scores, refused = scorer.score_each(_examples(solutions))
  return [SolutionError(refused[i]) if i in refused else s for i, s in enumerate(scores)]


class StepRewards:
  """A reward model to call; `bis_jax.load` makes it.

  Attributes:
    thresholds: from which score a step counts as correct, by the origin of the threshold.
    scorer: for `score`, which takes many solutions.
  """

  def __init__(self, checkpoint: str, **settings: Any):
    """`settings` as in `step_scorer.load`."""
    settings = {"workers": 0, **settings}  # processes would start per call
    self.scorer = load(checkpoint, **settings)
    self.thresholds = self.scorer.thresholds

  def __call__(
    self, question: str, images: Image | Sequence[Image] | None, steps: Sequence[str]
  ) -> np.ndarray:
    """Returns the probability that each step is correct, float32[n]; raises SolutionError.

    An image is a path, encoded bytes or a PIL image.
    """
    several: Any = images if isinstance(images, list | tuple) else [images]
    several = [] if images is None else several
    solution = Solution.of(question, steps, [*map(_encoded, several)])
    (scores,) = score(self.scorer, [solution])
    if isinstance(scores, SolutionError):
      raise scores
    return scores


def _encoded(image: Image) -> bytes:
  if isinstance(image, bytes):
    return image
  if isinstance(image, PIL.Image.Image):
    upright_rgb(image.copy()).save(file := io.BytesIO(), "PNG")
    return file.getvalue()
  return files.absolute(image).read_bytes()


def too_long(scorer: Scorer, solutions: Sequence[Solution]) -> dict[int, str]:
  """Returns {index: reason} of the solutions that are; reads only their texts and image sizes."""
  return scorer.refused(_examples(solutions))


def _examples(solutions: Sequence[Solution]) -> list[Example]:
  return [
    unlabelled(f"solution {i}", s.question, s.steps, s.image_sizes, s.read_images, s.images_id)
    for i, s in enumerate(solutions)
  ]
