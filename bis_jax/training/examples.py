"""The selected rollouts of a corpus as training examples."""

import functools
import itertools
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
    rollouts = self._corpus.rollouts(self._indices[list(indices)].tolist())
    image_sizes = self._corpus.image_sizes
    return [
      Example(
        id=rollout.id,
        question=rollout.question,
        steps=rollout.steps,
        image_sizes=[
          (height, width) for height, width in image_sizes[[*rollout.image_ids]].tolist()
        ],
        read_images=functools.partial(self._read_images, rollout.image_ids),
        targets=targets,
        weights=weights,
        images_id=repr(rollout.image_ids),
      )
      for rollout, (targets, weights) in zip(rollouts, self._labels_of(rollouts), strict=True)
    ]

  def _labels_of(self, rollouts: list[StoredRollout]) -> list[tuple[np.ndarray, np.ndarray]]:
    # Of all steps together: numpy takes longer for a call than for the steps of a rollout.
    truth = None
    if self._truth:
      truth = [label for r in rollouts for label in self._truth[r.source, r.line]]
    labels = step_labels(
      np.fromiter(itertools.chain.from_iterable(r.scores for r in rollouts), np.float64),
      np.fromiter(itertools.chain.from_iterable(r.measured for r in rollouts), bool),
      self._labels,
      self._tau,
      self._unmeasured,
      truth,
    )
    ends = list(itertools.accumulate(len(rollout.steps) for rollout in rollouts))
    spans = list(map(slice, [0, *ends], ends))
    of_rollouts = [(labels[0][span], labels[1][span]) for span in spans]
    if not self._needs_counts:
      return of_rollouts
    return [self._by_counts(*rollout) for rollout in zip(rollouts, of_rollouts, strict=True)]

  def _by_counts(
    self, rollout: StoredRollout, labels: tuple[np.ndarray, np.ndarray]
  ) -> tuple[np.ndarray, np.ndarray]:
    counts = self._corpus.continuations(rollout)
    targets, weights = with_policy(*labels, np.asarray(rollout.scores), counts, self._labels)
    if self._labels.kind == "beta":  # an unknown number, and none, count as one
      weights = weights * np.maximum(counts, 1).astype(np.float32)
    return targets, weights

  def _read_images(self, image_ids: tuple[int, ...]) -> list[bytes]:
    return self._corpus.images(image_ids)
