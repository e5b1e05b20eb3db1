"""Held-out rollouts: some that the selection did not keep, so that no training step sees them.

Their MC scores label their steps. A threshold can be tuned on them without a look at the benchmark
(`tuned_on_dev`), and a person can see the model's score of a step beside its MC score. They are no
random sample of the corpus: what the selection prefers is missing, and a question or image may be
that of a kept rollout.
"""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from bis_jax.corpus.corpus import Corpus, StoredRollout
from bis_jax.evaluation import step_metrics
from bis_jax.evaluation.step_metrics import ScoredSteps
from bis_jax.evaluation.visual_process_bench import BenchmarkItem
from bis_jax.files import write_text
from bis_jax.reports import items_page
from bis_jax.training.examples import RolloutExamples
from bis_jax.training.labels import step_labels

_HARD = ConfigDict({"kind": "hard"})  # labels, whatever the training's are: 1 where MC > tau


@dataclasses.dataclass(frozen=True)
class CorpusImage:
  """An image of a prepared corpus, to stand in a `BenchmarkItem`."""

  corpus: Corpus
  image_id: int

  def read(self) -> bytes:
    """Returns the encoded bytes."""
    return self.corpus.image(self.image_id)


class HeldOut:
  """Held-out rollouts of a corpus, as examples to score and as items to look at.

  Attributes:
    examples: what a scorer reads.
    ids: of the rollouts.
    items: the rollouts in the form of benchmark items, labelled from their MC scores.
    mc_scores: of every rollout's steps; None for a step without continuations.
  """

  def __init__(self, corpus: Corpus, indices: np.ndarray, config: ConfigDict):
    """Reads rollouts `indices` int64[k] of `corpus`; `config` is the run's whole config."""
    self.examples = RolloutExamples(corpus, indices, config)
    self.ids, self.items, self.mc_scores = [], [], []
    for position, index in enumerate(indices.tolist()):
      rollout = corpus.rollout(index)
      self.ids.append(rollout.id)
      self.items.append(_item(position, rollout, corpus, config.corpus))
      pairs = zip(rollout.scores, rollout.measured, strict=True)
      self.mc_scores.append([score if measured else None for score, measured in pairs])

  def __len__(self) -> int:
    return len(self.ids)

  def scored_steps(self, scores: Sequence[np.ndarray], kept: Sequence[int]) -> ScoredSteps:
    """Returns the labelled steps of the rollouts `kept`, each under its source."""
    items = [self.items[i] for i in kept]
    return step_metrics.scored_steps(
      [item.labels for item in items],
      [scores[i] for i in kept],
      [item.data_source for item in items],
    )

  def write(self, workdir: epath.Path, scores: Sequence[np.ndarray], kept: Sequence[int]) -> None:
    """Writes the rollouts `kept` with their scores into a workdir.

    held_out.jsonl, as `score_files.read_held_out` reads it, a line a rollout:

        {"rollout": "geo:17", "data_source": "geo", "scores": [0.9], "labels": [1],
         "mc_scores": [0.75]}

    held_out/items.html, the page on which a person sees score, label and MC score of every step.
    """
    lines = [
      {
        "rollout": self.ids[i],
        "data_source": self.items[i].data_source,
        "scores": np.asarray(scores[i], np.float64).tolist(),
        "labels": self.items[i].labels,
        "mc_scores": self.mc_scores[i],
      }
      for i in kept
    ]
    write_text(workdir / "held_out.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    items_page.write_items_page(
      workdir / "held_out",
      title="Held-out rollouts",
      items=[self.items[i] for i in kept],
      runs={workdir.name: [scores[i] for i in kept]},
      mc_scores=[self.mc_scores[i] for i in kept],
    )


def draw(corpus: Corpus, kept: np.ndarray, count: int, seed: int) -> np.ndarray:
  """Returns int64[at most count], rising: rollouts that are not kept, from every source its share.

  Args:
    corpus: the prepared corpus.
    kept: int64[k], the rollouts that training sees.
    count: how many are wanted; fewer where fewer are left.
    seed: of the draw.
  """
  table = corpus.score_table
  left = np.flatnonzero((table.rollout >= 0) & ~np.isin(table.rollout, kept))
  place = np.random.default_rng(seed).permutation(left.size)
  # A rollout's rank within its source, as a share of the source: the lowest shares of all are drawn.
  by_source = np.lexsort((place, table.source[left]))
  _, starts, sizes = np.unique(table.source[left][by_source], return_index=True, return_counts=True)
  share = (np.arange(left.size) - np.repeat(starts, sizes) + 0.5) / np.repeat(sizes, sizes)
  drawn = by_source[np.argsort(share, kind="stable")[:count]]
  return np.sort(table.rollout[left[drawn]])


def _item(
  position: int, rollout: StoredRollout, corpus: Corpus, config: ConfigDict
) -> BenchmarkItem:
  """Returns a rollout as an item; steps without a label count as neutral."""
  targets, weights = step_labels(
    np.asarray(rollout.scores), np.asarray(rollout.measured), _HARD, config.tau, config.unmeasured
  )
  labels = np.where(weights > 0, np.where(targets > 0, 1, -1), 0)
  return BenchmarkItem(
    index=position,
    question=rollout.question,
    images=tuple(CorpusImage(corpus, image) for image in rollout.image_ids),
    image_sizes=tuple(tuple(corpus.image_sizes[image].tolist()) for image in rollout.image_ids),
    steps=rollout.steps,
    labels=tuple(labels.tolist()),
    data_source=rollout.source,
    policy_model="unknown",
    answer=rollout.answer,
  )
