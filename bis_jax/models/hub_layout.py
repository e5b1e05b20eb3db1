"""Which tensors of a Hugging Face checkpoint make up each parameter, by tables of a backbone.

Parameter paths are the checkpoint's names with `kernel`, `scale` and `embedding` for `weight` and
without layer numbers, because layers are stacked:

    visual.blocks.attn.qkv.kernel [32, 1280, 3840]
      <- visual.blocks.{0..31}.attn.qkv.weight [3840, 1280], transposed

The LM head is not a parameter: two of its rows are the columns of the reward head.
"""

import dataclasses
import re
from collections.abc import Mapping

import jax

EMBEDDING_PATH = "language_model.embed_tokens.embedding"
REWARD_HEAD_PATH = "reward_head.kernel"

RowRanges = tuple[tuple[int, int], ...]
Renames = tuple[tuple[str, str], ...]  # regex and replacement; all are applied, in order


@dataclasses.dataclass(frozen=True)
class HubTensor:
  keys: tuple[str, ...]  # one key, or one per layer if `stacked`
  shape: tuple[int, ...]  # of each of them in the file
  stacked: bool  # the parameter has a leading axis over `keys`
  # The file holds [E, C], or [E, ...] with C values after the first axis; the parameter, [C, E].
  transposed: bool
  # (start, stop) ranges of a fused tensor's first axis that are concatenated to form this
  # parameter's last axis; None: all rows.
  row_ranges: RowRanges | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
  lm_head: str  # key
  embedding: str  # key
  stacks: tuple[str, ...]  # prefixes of parameters with an axis over layers
  names: Renames  # from parameter names to keys
  aliases: Renames  # from other spellings of keys to those of `names`
  # Of tensors in the file, by path, if not the parameter's shape or its transpose.
  shapes: Mapping[str, tuple[int, ...]]
  # By path without its last part: the parameter's rows of a fused tensor, and how many that has.
  fused: Mapping[str, tuple[RowRanges, int]] = dataclasses.field(default_factory=dict)
  in_memory: Renames = ()  # from keys to the names of the modules that Transformers makes

  def tensors(self, shapes: Mapping[str, jax.ShapeDtypeStruct | jax.Array]) -> dict[str, HubTensor]:
    """Returns the location of every parameter except the reward head, by path."""
    return {
      path: self._tensor(path, s.shape) for path, s in shapes.items() if path != REWARD_HEAD_PATH
    }

  def canonical(self, key: str) -> str:
    """Returns a file's key as `names` spells it; unknown keys stay as they are."""
    return _renamed(key, self.aliases)

  def in_memory_name(self, key: str) -> str:
    return _renamed(key, self.in_memory)

  def _tensor(self, path: str, shape: tuple[int, ...]) -> HubTensor:
    name = re.sub(r"\.(kernel|scale|embedding)$", ".weight", path)
    names = [name]
    stack = next((stack for stack in self.stacks if name.startswith(stack)), None)
    if stack:
      names = [f"{stack}{layer}.{name.removeprefix(stack)}" for layer in range(shape[0])]
      shape = shape[1:]
    transposed = path.endswith(".kernel")
    shape = self.shapes.get(path, shape[::-1] if transposed else shape)
    row_ranges, rows = self.fused.get(path.rpartition(".")[0], (None, shape[0]))
    keys = tuple(_renamed(name, self.names) for name in names)
    return HubTensor(keys, (rows, *shape[1:]), stack is not None, transposed, row_ranges)


def _renamed(key: str, renames: Renames) -> str:
  for pattern, name in renames:
    key = re.sub(pattern, name, key)
  return key
