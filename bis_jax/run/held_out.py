"""Held-out rollouts: a sample of those that the selection did not keep, so no step trains on them.

Their MC scores label their steps. A threshold can be tuned on them without using the benchmark
(`tuned_on_dev`), and their page shows the model's score of a step beside its MC score. They are not
a random sample of the corpus: what the selection prefers is missing, and a question or image may also
occur in a selected rollout.
"""

import dataclasses
import json
from collections.abc import Mapping

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

_HARD = ConfigDict({"kind": "hard"})  # regardless of the labels of training


@dataclasses.dataclass(frozen=True)
class CorpusImage:
  """An image of a prepared corpus, in the form that `BenchmarkItem` expects."""

  corpus: Corpus
  image_id: int

  @property
  def name(self) -> str:
    return str(self.image_id)

  def read(self) -> bytes:
    return self.corpus.image(self.image_id)


class HeldOut:
  """Held-out rollouts of a corpus, as examples to score and as labelled benchmark items.

  `scores` maps the index of a rollout to its step scores; rollouts that are too long have none.
  """

  def __init__(self, corpus: Corpus, indices: np.ndarray, config: ConfigDict):
    """Reads rollouts `indices` int64[k] of `corpus`; `config` is the run's whole config."""
    self.examples = RolloutExamples(corpus, indices, config)
    self._rollouts = corpus.rollouts(indices.tolist())
    self._items = [
      _item(i, rollout, corpus, config.corpus) for i, rollout in enumerate(self._rollouts)
    ]

  def scored_steps(self, scores: Mapping[int, np.ndarray]) -> ScoredSteps:
    items = [self._items[i] for i in scores]
    return step_metrics.scored_steps(
      [item.labels for item in items],
      list(scores.values()),
      [item.data_source for item in items],
    )

  def write(self, workdir: epath.Path, scores: Mapping[int, np.ndarray]) -> None:
    """Writes held_out/items.html, a page, and held_out.jsonl for `score_files.read_held_out`:

    {"rollout": "geo:17", "data_source": "geo", "scores": [0.9], "labels": [1],
     "mc_scores": [0.75]}
    """
    mc_scores = {i: _mc_scores(self._rollouts[i]) for i in scores}
    lines = [
      {
        "rollout": self._rollouts[i].id,
        "data_source": self._rollouts[i].source,
        "scores": np.asarray(scores[i], np.float64).tolist(),
        "labels": self._items[i].labels,
        "mc_scores": mc_scores[i],
      }
      for i in scores
    ]
    write_text(workdir / "held_out.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    items_page.write_items_page(
      workdir / "held_out",
      title="Held-out rollouts",
      items=[self._items[i] for i in scores],
      runs={workdir.name: list(scores.values())},
      mc_scores=list(mc_scores.values()),
    )


def draw(corpus: Corpus, selected: np.ndarray, count: int, seed: int) -> np.ndarray:
  """Returns up to `count` sorted indices of unselected rollouts, stratified by source, int64.

  `selected` int64[k] are the rollouts that training sees.
  """
  table = corpus.score_table
  left = np.flatnonzero((table.rollout >= 0) & ~np.isin(table.rollout, selected))
  order = np.random.default_rng(seed).permutation(left.size)
  # A rollout's random rank within its source, as a fraction of the source; the lowest are drawn.
  by_source = np.lexsort((order, table.source[left]))
  _, starts, sizes = np.unique(table.source[left][by_source], return_index=True, return_counts=True)
  rank = (np.arange(left.size) - np.repeat(starts, sizes) + 0.5) / np.repeat(sizes, sizes)
  drawn = by_source[np.argsort(rank, kind="stable")[:count]]
  return np.sort(table.rollout[left[drawn]])


def _mc_scores(rollout: StoredRollout) -> list[float | None]:
  pairs = zip(rollout.scores, rollout.measured, strict=True)
  return [score if measured else None for score, measured in pairs]


def _item(index: int, rollout: StoredRollout, corpus: Corpus, config: ConfigDict) -> BenchmarkItem:
  # Steps without a label are neutral.
  targets, weights = step_labels(
    np.asarray(rollout.scores), np.asarray(rollout.measured), _HARD, config.tau, config.unmeasured
  )
  labels = np.where(weights > 0, np.where(targets > 0, 1, -1), 0)
  return BenchmarkItem(
    index=index,
    question=rollout.question,
    images=tuple(CorpusImage(corpus, image) for image in rollout.image_ids),
    image_sizes=tuple((int(h), int(w)) for h, w in corpus.image_sizes[list(rollout.image_ids)]),
    steps=rollout.steps,
    labels=tuple(labels.tolist()),
    data_source=rollout.source,
    policy_model="unknown",
    answer=rollout.answer,
  )
