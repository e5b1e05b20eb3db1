"""Scores of solutions that continue what the device remembers of earlier ones.

Rows of a batch leave keys and values of their tokens in the device's memory, see `prefix_tree`. A
later solution with the same images and question, and perhaps the same first steps, is a row of its
new tokens alone: no vision tower, no prefix. Scores of the steps before are remembered, too.
"""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from bis_jax.inputs import pack
from bis_jax.inputs.images import ImageProcessor
from bis_jax.inputs.pipeline import Measured
from bis_jax.inputs.prompt import Sample
from bis_jax.inputs.rows import NO_SLOT, Batch, device_arrays
from bis_jax.models.decoder import Memory
from bis_jax.models.param_tree import Params, merge
from bis_jax.parallel.sharding import OnMesh, P, batch_shards, put_rows
from bis_jax.scoring.prefix_tree import Chain, Piece, PrefixTree, chain_of

_NEW = (32, 128, 512)  # new tokens of a row; one of more is scored without the cache
_TOKENS = 512  # of a batch per device, in rows that are shorter
_SHORT = 1024  # tokens: for longer solutions there are also rows of a quarter of what comes before
_SOLUTIONS = 64  # of the maximum length: no more is remembered


@dataclasses.dataclass(frozen=True)
class _Solution:
  """A solution, of which the pieces `before` are remembered."""

  example: int
  sample: Sample
  chain: Chain
  before: list[Piece]

  @property
  def start(self) -> int:
    """The first token that is not remembered, or would not be if the prefix were."""
    return self.chain.ends[max(0, len(self.before) - 1)]

  def fits(self, shape: tuple[int, int]) -> bool:
    new, past = shape
    return self.start <= past and self.chain.ends[-1] - self.start <= new


class PrefixCache:
  """What one device, or each of a mesh, remembers; a scorer calls it from one thread."""

  def __init__(
    self,
    graph: nnx.GraphDef,
    params: Params,
    images: ImageProcessor,
    inputs: ConfigDict,
    mesh: Mesh,
    memory_bytes: int,
    options: dict[str, Any],
  ):
    """`memory_bytes` are of each device; `options` of the compiler."""
    self.hits = self.misses = 0  # solutions
    self.reused_tokens = self._evicted = 0
    self._images, self._mesh = images, mesh
    longest = -(-min(inputs.max_length, inputs.row_tokens) // 64) * 64
    pasts = [longest // 4, longest] if longest > _SHORT else [longest]
    news = [new for new in _NEW if new < longest]
    self._shapes = [(new, past) for new in news for past in pasts]
    model: Any = merge(graph, params)
    text = model.config.text
    heads = "tensor" if text.num_key_value_heads % mesh.shape["tensor"] == 0 else None
    self._place = NamedSharding(mesh, P(None, None, heads))
    self._per_slot = (text.num_hidden_layers, text.num_key_value_heads, text.head_dim)
    self._dtype = jnp.dtype(model.config.dtype)
    size = 2 * int(np.prod(self._per_slot)) * self._dtype.itemsize
    size = size // mesh.shape["tensor"] if heads else size
    self._slots = min(memory_bytes // size, _SOLUTIONS * longest)
    self.tree = PrefixTree(self._slots)
    self._step = OnMesh(_make_step(graph, self._place, options), mesh)
    self.clear()

  def clear(self) -> None:
    """Forgets all."""
    self._memory: Memory | None = None  # freed before it is made again
    self._evicted += self.tree.evicted
    self.tree = PrefixTree(self._slots)
    self._chains: dict[int, Chain] = {}  # of the solutions that are being scored in rows
    self._added: dict[int, dict[int, Piece]] = {}
    layers, *heads = self._per_slot
    self._memory = Memory(
      *(jnp.zeros((layers, self._slots, *heads), self._dtype, device=self._place) for _ in range(2))
    )

  def run(self, params: Params, batch: Batch) -> jax.Array:
    """Returns scores float32[B, R] of a batch with `slots`, which are filled."""
    arrays = put_rows(device_arrays(batch), self._mesh)
    score_BR, self._memory = self._step(params, self._memory, arrays)
    return score_BR

  def counts(self) -> dict[str, int]:
    """Returns what is held now, and what happened since the start."""
    return {
      "tokens": self.tree.used,
      "most_tokens": self._slots,
      "hits": self.hits,
      "misses": self.misses,
      "reused_tokens": self.reused_tokens,
      "evicted": self._evicted + self.tree.evicted,
    }

  def warm_up(self, params: Params) -> None:
    for shape in self._shapes:
      jax.block_until_ready(self.run(params, self._empty(*shape)))

  def score(
    self,
    params: Params,
    measured: Measured,
    scores: list[np.ndarray],
    chosen: np.ndarray,
    *,
    may_wait: bool,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Scores those of the examples `chosen` that continue what is remembered.

    Returns the others, and with `may_wait` apart from them those that will continue one of them.
    """
    self.tree.next_turn()
    self._chains, self._added = {}, {}
    others, waiting, leading = [], [], set()
    continued = collections.defaultdict(list)
    for i in chosen.tolist():
      if measured.examples[i].images_id is None:
        others.append(i)
        continue
      one = self._look_up(measured, i)
      prefix, shape = one.chain.keys[0], next((s for s in self._shapes if one.fits(s)), None)
      if may_wait and not one.before and shape and prefix in leading:
        waiting.append(i)
      elif not one.before or shape is None:
        self.misses += 1
        self._chains[i] = one.chain
        leading.add(prefix)
        others.append(i)
      else:
        self.hits += 1
        self.reused_tokens += one.start
        scores[i] = np.zeros(len(one.sample.markers), np.float32)
        scores[i][: len(one.before) - 1] = [piece.score for piece in one.before[1:]]
        if one.start < one.chain.ends[-1]:
          continued[shape].append(one)
    for shape, several in continued.items():
      rows = self._rows(shape[0])
      for first in range(0, len(several), rows):
        self._continue(params, measured, shape, several[first : first + rows], scores)
    self.note(scores)
    return np.array(others, np.int64), np.array(waiting, np.int64)

  def slots(self, plan: pack.Plan) -> dict[int, np.ndarray]:
    """Returns the slots of the tokens of each example of a plan that `score` returned."""
    found = {}
    for r in range(len(plan)):
      last = -1
      for i, (_, _, group) in zip(plan.row(r).tolist(), plan.places_of(r).tolist(), strict=True):
        if i in self._chains:  # a row has a group's prefix with its first example
          found[i], self._added[i] = self.tree.add(self._chains[i], with_prefix=group != last)
        last = group
    return found

  def note(self, scores: list[np.ndarray]) -> None:
    """Remembers the scores of the steps that were added since."""
    for i, pieces in self._added.items():
      for number, piece in pieces.items():
        if number:
          piece.score = float(scores[i][number - 1])
    self._added = {}

  def _look_up(self, measured: Measured, i: int) -> _Solution:
    example = measured.examples[i]
    costs = [measured.images.cost(*size) for size in example.image_sizes]
    sample = measured.sample(example, [tokens for tokens, _ in costs])
    chain = chain_of(sample, (example.images_id, costs))
    return _Solution(i, sample, chain, self.tree.find(chain))

  def _rows(self, new: int) -> int:
    return batch_shards(self._mesh) * max(1, _TOKENS // new)

  def _empty(self, new: int, past: int) -> Batch:
    rows = self._rows(new)
    zeros = np.zeros((rows, new), np.int32)
    return {
      "tokens": zeros,
      "segment_ids": zeros.copy(),
      "positions": self._images.empty(rows, new, 0)["positions"],
      "marker_index": zeros.copy(),
      "slots": np.full((rows, new), NO_SLOT, np.int32),
      "past": np.full((rows, past), NO_SLOT, np.int32),
    }

  def _continue(
    self,
    params: Params,
    measured: Measured,
    shape: tuple[int, int],
    continued: list[_Solution],
    scores: list[np.ndarray],
  ) -> None:
    batch, markers = self._empty(*shape), []
    for row, one in enumerate(continued):
      sample, start = one.sample, one.start
      new = slice(0, len(sample.tokens) - start)
      slots, self._added[one.example] = self.tree.add(one.chain)
      pictures = measured.image_patches(measured.examples[one.example])
      positions = self._images.positions(len(sample.tokens), sample.image_spans, pictures)
      before = np.concatenate([piece.slots for piece in one.before])
      markers.append(sample.markers[len(one.before) - 1 :] - start)
      batch["tokens"][row, new] = sample.tokens[start:]
      batch["segment_ids"][row, new] = 1
      batch["positions"][row][..., new] = positions[..., start:]
      batch["marker_index"][row, : len(markers[row])] = markers[row]
      batch["slots"][row, new] = slots[start:]
      batch["past"][row, : len(before)] = before
    score_BR = np.asarray(self.run(params, batch))
    for row, one in enumerate(continued):
      scores[one.example][len(one.before) - 1 :] = score_BR[row, : len(markers[row])]


def _make_step(
  graph: nnx.GraphDef, place: NamedSharding, options: dict[str, Any]
) -> jax.stages.Wrapped:
  """Returns the jitted (params, memory, batch) -> (P("correct") at markers, memory)."""

  def step(params, memory, batch):
    model: Any = merge(graph, params)
    logits_BR2, memory = model.with_memory({key: x[0] for key, x in batch.items()}, memory)
    return jax.nn.softmax(logits_BR2)[..., 0], memory

  return jax.jit(step, donate_argnums=1, out_shardings=(None, place), compiler_options=options)
