"""The selected rollouts of a corpus as training examples."""

import functools
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from bis_jax.corpus.corpus import Corpus, StoredRollout
from bis_jax.inputs.pipeline import Example
from bis_jax.settings import locations
from bis_jax.settings.keys import SETTINGS
from bis_jax.toy import drawing
from bis_jax.training.labels import step_labels, with_policy

_POLICIES = {
  name: SETTINGS[f"labels.{name}"] for name in ("neutral", "min_continuations", "until_first_wrong")
}


class RolloutExamples:
  def __init__(self, corpus: Corpus, indices: np.ndarray, config: ConfigDict):
    """`indices` int64[k] are rollouts of `corpus`; `config` is the run's whole config."""
    self._corpus, self._indices = corpus, indices
    self._labels = ConfigDict(config.labels.to_dict())  # without ties to the whole config
    self._needs_counts = self._labels.kind == "beta" or any(
      self._labels[key] != setting.default for key, setting in _POLICIES.items()
    )
    toy = locations.locate(config).toy
    self._truth = drawing.read_truth(toy) if toy and config.labels.kind == "truth" else None
    self._tau, self._unmeasured = config.corpus.tau, config.corpus.unmeasured

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, i: int) -> Example:
    return self.__getitems__([i])[0]

  def __getitems__(self, indices: Sequence[int]) -> list[Example]:
    return [*map(self._example, self._corpus.rollouts(self._indices[list(indices)].tolist()))]

  def _example(self, rollout: StoredRollout) -> Example:
    truth = self._truth[rollout.source, rollout.line] if self._truth else None
    targets, weights = step_labels(
      np.asarray(rollout.scores),
      np.asarray(rollout.measured),
      self._labels,
      self._tau,
      self._unmeasured,
      truth,
    )
    if self._needs_counts:
      counts = self._corpus.continuations(rollout)
      scores = np.asarray(rollout.scores)
      targets, weights = with_policy(targets, weights, scores, counts, self._labels)
      if self._labels.kind == "beta":  # an unknown number, and none, count as one
        weights = weights * np.maximum(counts, 1).astype(np.float32)
    image_sizes = self._corpus.image_sizes[list(rollout.image_ids)].tolist()
    return Example(
      id=rollout.id,
      question=rollout.question,
      steps=rollout.steps,
      image_sizes=[(height, width) for height, width in image_sizes],
      read_images=functools.partial(self._read_images, rollout.image_ids),
      targets=targets,
      weights=weights,
      images_id=repr(rollout.image_ids),
    )

  def _read_images(self, image_ids: tuple[int, ...]) -> list[bytes]:
    return self._corpus.images(image_ids)
