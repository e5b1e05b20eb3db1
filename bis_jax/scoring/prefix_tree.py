"""Which beginnings of solutions a device remembers, and in which slots.

A solution is a chain of pieces: its images and question, then one step after the other. The key of a
piece is a digest of its tokens and of all before it, so what begins alike has the same keys:

    images and question      key a, slots 0 1 2 3
    the same, step 1         key b, slots 4 5       score 0.9
    the same, another one    key c, slots 6 7 8     score 0.2

If no slot is free, the piece that was not used for the longest time is evicted. A piece is used
with all before it, so that it is evicted before them.
"""

import collections
import dataclasses
import hashlib
import itertools

import numpy as np

from bis_jax.inputs.prompt import Sample
from bis_jax.inputs.rows import NO_SLOT


@dataclasses.dataclass(frozen=True)
class Chain:
  """A solution's pieces: their keys, and the tokens up to the end of each."""

  keys: list[bytes]
  ends: list[int]


@dataclasses.dataclass
class Piece:
  """What is remembered of one; `score` is that of its step, NaN for a prefix."""

  slots: np.ndarray  # int32[...]
  turn: int
  score: float = float("nan")


def chain_of(sample: Sample, images: object) -> Chain:
  """Returns the chain of a sample; `images`, of which the `repr` counts, are all that it shows."""
  tokens, ends = sample.tokens.copy(), [sample.prefix, *(sample.markers + 1).tolist()]
  tokens[sample.markers] = ~tokens[sample.markers]  # others of the same id are not scored
  keys, key = [], repr(images).encode()
  for start, end in itertools.pairwise([0, *ends]):
    key = hashlib.blake2b(key + tokens[start:end].tobytes(), digest_size=16).digest()
    keys.append(key)
  return Chain(keys, ends)


class PrefixTree:
  """The pieces that are remembered, the longest unused first."""

  def __init__(self, slots: int):
    self.slots, self.evicted = slots, 0
    self._free = [*range(slots)]
    self._pieces: collections.OrderedDict[bytes, Piece] = collections.OrderedDict()
    self._turn = 0

  @property
  def used(self) -> int:
    return self.slots - len(self._free)

  def next_turn(self) -> None:
    """Lets go of the pieces that were used since the last turn: until now none was evicted."""
    self._turn += 1

  def find(self, chain: Chain) -> list[Piece]:
    """Returns the pieces at the beginning of a chain that are remembered."""
    held = list(itertools.takewhile(self._pieces.__contains__, chain.keys))
    return self._use(held)

  def add(self, chain: Chain, *, with_prefix: bool = True) -> tuple[np.ndarray, dict[int, Piece]]:
    """Returns slots for the tokens of a chain that are not remembered, and {number: new piece}.

    `NO_SLOT` is for the others, and for those without room. `with_prefix` False: the first piece is
    not added.
    """
    slots, held, new = np.full(chain.ends[-1], NO_SLOT, np.int32), [], {}
    for number, key in enumerate(chain.keys):
      if key not in self._pieces:
        start, end = [0, *chain.ends][number : number + 2]
        if not (with_prefix or number) or not self._make_room(end - start):
          break
        first = len(self._free) - (end - start)
        slots[start:end] = self._free[first:]
        del self._free[first:]
        self._pieces[key] = new[number] = Piece(slots[start:end], self._turn)
      held.append(key)
    self._use(held)
    return slots, new

  def _use(self, keys: list[bytes]) -> list[Piece]:
    for key in reversed(keys):
      self._pieces.move_to_end(key)
      self._pieces[key].turn = self._turn
    return [self._pieces[key] for key in keys]

  def _make_room(self, count: int) -> bool:
    while len(self._free) < count:
      key, piece = next(iter(self._pieces.items()), (b"", None))
      if piece is None or piece.turn == self._turn:
        return False
      del self._pieces[key]
      self._free += piece.slots.tolist()
      self.evicted += 1
    return True
