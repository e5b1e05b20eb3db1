"""SemDeDup (arXiv 2303.09540): of rollouts with much the same text, one is kept.

Rollouts are clustered by the embedding of their question and steps. In each cluster those far from the
centre come first, and a rollout's score falls with its similarity to those before it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from bis_jax.corpus.score_table import ScoreTable, Statistics
from bis_jax.errors import UserError, imported

_BATCH = 1024  # texts, and rows of a cluster that are compared at a time
_OF_CLUSTER = 1000  # rollouts, on average
_ROUNDS = 10  # of k-means

Encoder = Callable[[list[str]], np.ndarray]  # texts -> [texts, dimensions]


def encoder(name: str) -> Encoder:
  """Returns MODULE:FUNCTION, or the encoder of a Sentence Transformers model (hub id or folder)."""
  if ":" in name:
    return imported(name)
  try:
    # pyrefly: ignore[missing-import]  # an extra
    from sentence_transformers import SentenceTransformer
  except ImportError as error:
    raise UserError(
      f"the encoder {name} needs Sentence Transformers: pip install 'bis_jax[semdedup]', or name your "
      "own encoder as MODULE:FUNCTION"
    ) from error
  return SentenceTransformer(name).encode


def embed(lines: Iterable[bytes], encode: Encoder) -> np.ndarray:
  """Returns float16[rows, dimensions] of unit length, for the raw lines of rollouts."""
  from bis_jax.corpus import records

  parts, texts = [], []
  for line in lines:
    record = records.load_object(line, order="paper")
    steps = (step.get("step") for step in record["steps_with_score"] if isinstance(step, dict))
    texts.append("\n".join([records.question_of(record), *map(str, steps)]))
    if len(texts) == _BATCH:
      parts.append(_unit(encode(texts)))
      texts = []
  return np.concatenate([*parts, _unit(encode(texts))] if texts or not parts else parts)


def _unit(vectors: np.ndarray) -> np.ndarray:
  vectors = np.asarray(vectors, np.float32)
  lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
  return (vectors / np.maximum(lengths, 1e-9)).astype(np.float16)


def score(s: Statistics, table: ScoreTable, rule: Any) -> np.ndarray:
  """Returns 1 minus the largest cosine similarity to an earlier rollout of the cluster; at most 2."""
  if not table.embedding.shape[1]:
    raise UserError(
      "the score table has no embeddings: delete it, and make it with select --encoder=MODEL"
    )
  scores, rows = np.full(len(table), -np.inf), np.flatnonzero(rule.ranked(table, s))
  vectors = table.embedding[rows].astype(np.float32)
  nearest, similarity = _clusters(vectors, np.random.default_rng(rule.seed))
  order = np.lexsort((similarity, nearest))
  for members in np.split(order, np.flatnonzero(np.diff(nearest[order])) + 1):
    for start in range(0, members.size, _BATCH):
      part = members[start : start + _BATCH]
      with_earlier = vectors[part] @ vectors[members[: start + part.size]].T
      later = np.arange(start + part.size) >= start + np.arange(part.size)[:, None]
      scores[rows[part]] = 1 - np.max(with_earlier, axis=1, where=~later, initial=-1)
  return scores


def _clusters(vectors: np.ndarray, rng: "np.random.Generator") -> tuple[np.ndarray, np.ndarray]:
  """Returns each row's cluster and its similarity to the centre, by spherical k-means."""
  count = max(1, len(vectors) // _OF_CLUSTER)
  centres = vectors[rng.choice(len(vectors), min(count, len(vectors)), replace=False)]
  nearest, similarity = np.zeros(len(vectors), np.int64), np.zeros(len(vectors))
  for _ in range(_ROUNDS):
    for start in range(0, len(vectors), _BATCH):
      rows = slice(start, start + _BATCH)
      to_centres = vectors[rows] @ centres.T
      nearest[rows], similarity[rows] = to_centres.argmax(1), to_centres.max(1)
    sums = np.zeros_like(centres)
    np.add.at(sums, nearest, vectors)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    centres = np.where(lengths > 0, sums / np.maximum(lengths, 1e-9), centres)
  return nearest, similarity
