"""Sources of examples: what training and evaluation hand to the input pipeline.

A source has a length, gives `Example`s by number, and knows image sizes without decoding. It holds
paths and arrays only, so worker processes get it cheaply.
"""

import numpy as np
from ml_collections import ConfigDict

from bis_jax.corpus.corpus import Corpus
from bis_jax.inputs.pipeline import Example
from bis_jax.settings import locations
from bis_jax.toy import drawing
from bis_jax.training.labels import step_labels


class RolloutExamples:
  """The kept rollouts of a corpus, labelled as `labels.step_labels` says."""

  def __init__(self, corpus: Corpus, indices: np.ndarray, config: ConfigDict):
    """Holds rollouts `indices` int64[k] of `corpus`; `config` is the run's whole config."""
    self._corpus, self._indices = corpus, indices
    self._labels = config.labels.to_dict()
    by_truth = config.labels.kind == "truth"
    self._truth = drawing.read_truth(locations.locate(config).toy) if by_truth else None
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
