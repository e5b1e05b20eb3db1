"""Sources of examples: what training and evaluation hand to the input pipeline.

A source has a length, gives `Example`s by number, and knows image sizes without decoding. It holds
paths and arrays only, so worker processes get it cheaply.
"""

import io
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from bis_jax import locations
from bis_jax.corpus import toy
from bis_jax.corpus.corpus import Corpus
from bis_jax.evaluation.visual_process_bench import BenchmarkItem, encoded_images, shown_sizes
from bis_jax.inputs.pipeline import Example
from bis_jax.labels import step_labels


class RolloutExamples:
  """The kept rollouts of a corpus, labelled as `labels.step_labels` says."""

  def __init__(self, corpus: Corpus, indices: np.ndarray, config: ConfigDict):
    """Holds rollouts `indices` int64[k] of `corpus`; `config` is the run's whole config."""
    self._corpus, self._indices = corpus, indices
    self._labels = config.labels.to_dict()
    by_truth = config.labels.kind == "truth"
    self._truth = toy.read_truth(locations.locate(config).toy) if by_truth else None
    self._tau, self._unmeasured = config.corpus.tau, config.corpus.unmeasured

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, i: int) -> Example:
    rollout = self._corpus.rollout(int(self._indices[i]))
    truth = self._truth[rollout.source, rollout.line] if self._truth else None
    targets, weights = step_labels(
      np.asarray(rollout.scores),
      np.asarray(rollout.measured),
      ConfigDict(self._labels),
      self._tau,
      self._unmeasured,
      truth,
    )
    return Example(
      id=rollout.id,
      question=rollout.question,
      steps=rollout.steps,
      images=tuple(self._corpus.image(image) for image in rollout.image_ids),
      targets=targets,
      weights=weights,
    )

  def text(self, i: int) -> tuple[str, tuple[str, ...]]:
    """Returns (question, steps) of example i."""
    rollout = self._corpus.rollout(int(self._indices[i]))
    return rollout.question, rollout.steps

  def image_sizes(self, i: int) -> list[tuple[int, int]]:
    """Returns (height, width) in pixels of every image of example i."""
    image_ids = self._corpus.image_ids(int(self._indices[i]))
    return [tuple(map(int, self._corpus.image_sizes[image])) for image in image_ids]


class CaptionExamples:
  """Captions of images in the form of solutions, a sentence a step, without labels."""

  def __init__(self, captions: pathlib.Path, images: pathlib.Path):
    """Reads JSON lines {"image": [path in `images`, ...], "question": ..., "sentences": [...]}."""
    self._captions = [json.loads(line) for line in captions.read_text().splitlines()]
    self._images = images

  def __len__(self) -> int:
    return len(self._captions)

  def __getitem__(self, i: int) -> Example:
    caption = self._captions[i]
    zeros = np.zeros(len(caption["sentences"]), np.float32)
    return Example(
      id=f"caption {i}",
      question=caption["question"],
      steps=tuple(caption["sentences"]),
      images=tuple((self._images / path).read_bytes() for path in caption["image"]),
      targets=zeros,
      weights=zeros,
    )

  def text(self, i: int) -> tuple[str, tuple[str, ...]]:
    """Returns (question, sentences) of caption i."""
    return self._captions[i]["question"], tuple(self._captions[i]["sentences"])

  def image_sizes(self, i: int) -> list[tuple[int, int]]:
    """Returns (height, width) in pixels of every image of caption i."""
    return [Image.open(self._images / path).size[::-1] for path in self._captions[i]["image"]]


class BenchmarkExamples:
  """Benchmark items, to be scored; targets and weights are 0."""

  def __init__(self, items: Sequence[BenchmarkItem], images: str, *, blank: bool = False):
    """Holds items; `images` is `config.evaluation.images`; `blank` greys every image out."""
    self._items, self._images, self._blank = items, images, blank

  def __len__(self) -> int:
    return len(self._items)

  def __getitem__(self, i: int) -> Example:
    item = self._items[i]
    zeros = np.zeros(len(item.steps), np.float32)
    return Example(
      id=f"item {item.index}",
      question=item.question,
      steps=item.steps,
      images=tuple(map(_grey, self.image_sizes(i)))
      if self._blank
      else encoded_images(item, self._images),
      targets=zeros,
      weights=zeros,
    )

  def text(self, i: int) -> tuple[str, tuple[str, ...]]:
    """Returns (question, steps) of item i."""
    return self._items[i].question, self._items[i].steps

  def image_sizes(self, i: int) -> list[tuple[int, int]]:
    """Returns (height, width) in pixels of every image of item i."""
    return shown_sizes(self._items[i], self._images)


def _grey(size: tuple[int, int]) -> bytes:
  """Returns an encoded grey image of (height, width)."""
  encoded = io.BytesIO()
  Image.new("RGB", size[::-1], (128, 128, 128)).save(encoded, "PNG")
  return encoded.getvalue()
