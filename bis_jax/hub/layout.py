"""Which tensors of a Hugging Face checkpoint make up each of our parameters.

Our parameter paths are the Hugging Face names with `kernel`, `scale` and `embedding` for `weight`
and without layer numbers, because layers are stacked:

    visual.blocks.attn.qkv.kernel [32, 1280, 3840]
      <- visual.blocks.{0..31}.attn.qkv.weight [3840, 1280], transposed

Two layouts of the same names exist: the hub's (`visual.*`, `model.*`), which `save_pretrained`
writes too, and that of newer Transformers in memory (`model.visual.*`, `model.language_model.*`).
Our spelling of both is `visual.*`, `language_model.*`.

The LM head is not a parameter here: two of its rows are the columns of the reward head.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

import jax

from bis_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig

LM_HEAD = "lm_head.weight"
EMBEDDING = "language_model.embed_tokens.weight"
EMBEDDING_PATH = "language_model.embed_tokens.embedding"
REWARD_HEAD_PATH = "reward_head.kernel"

_STACKS = ("visual.blocks.", "language_model.layers.")
_SPELLINGS = (  # of a file's keys, first match wins, and ours
  ("model.visual.", "visual."),
  ("model.language_model.", "language_model."),
  ("visual.", "visual."),
  ("model.", "language_model."),
)


@dataclasses.dataclass(frozen=True)
class HubTensor:
  """Where a parameter lies in a checkpoint.

  Attributes:
    keys: one key, or one a layer if `stacked`; in our spelling of the prefix.
    shape: of each of them in the file.
    stacked: the parameter has a leading axis over `keys`.
    transposed: the file holds [E, C], or [E, ...] with C values after the first axis, where the
      parameter holds [C, E].
    rows: the parts (start, stop) of the file's first axis that the parameter holds, one behind the
      other on its last axis, where tensors are fused in the file; None for all of it.
  """

  keys: tuple[str, ...]
  shape: tuple[int, ...]
  stacked: bool
  transposed: bool
  rows: tuple[tuple[int, int], ...] | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the files of a kind of checkpoint name their tensors.

  Attributes:
    tensor: from path and shape of a parameter, where it lies; never asked for the reward head.
    our_spelling: of a file's key, which removes what differs between versions of the layout.
    file_spelling: of a key of ours, as it is written.
    lm_head, embedding: keys in our spelling.
  """

  tensor: Callable[[str, tuple[int, ...]], HubTensor]
  our_spelling: Callable[[str], str]
  file_spelling: Callable[[str], str]
  lm_head: str
  embedding: str

  def tensors(self, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, HubTensor]:
    """Returns where every parameter but the reward head lies in a checkpoint, by path."""
    return {
      path: self.tensor(path, s.shape) for path, s in shapes.items() if path != REWARD_HEAD_PATH
    }


def qwen_layout(config: Qwen2_5_VLConfig) -> Layout:
  """Returns the layout of Qwen2.5-VL's checkpoints."""
  tensor = functools.partial(_hub_tensor, config)
  return Layout(tensor, our_spelling, hub_spelling, LM_HEAD, EMBEDDING)


def hub_tensors(
  config: Qwen2_5_VLConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, HubTensor]:
  """Returns where every parameter but the reward head lies in a checkpoint, by path."""
  return qwen_layout(config).tensors(shapes)


def _hub_tensor(config: Qwen2_5_VLConfig, path: str, shape: tuple[int, ...]) -> HubTensor:
  key = re.sub(r"\.(kernel|scale|embedding)$", ".weight", path)
  prefix = next((p for p in _STACKS if path.startswith(p)), None)
  keys = (key,)
  if prefix:
    keys = tuple(f"{prefix}{layer}.{key.removeprefix(prefix)}" for layer in range(shape[0]))
    shape = shape[1:]
  transposed = path.endswith(".kernel")
  if path == "visual.patch_embed.proj.kernel":
    vision = config.vision
    patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    shape = (shape[1], vision.in_channels, *patch)
  elif transposed:
    shape = shape[::-1]
  return HubTensor(keys, shape, stacked=prefix is not None, transposed=transposed)


def our_spelling(key: str) -> str:
  """Returns a file's key in our spelling; keys of neither layout stay as they are."""
  for theirs, ours in _SPELLINGS:
    if key.startswith(theirs):
      return ours + key.removeprefix(theirs)
  return key


def hub_spelling(key: str) -> str:
  """Returns a key of ours as the hub's checkpoints spell it."""
  return re.sub(r"^language_model\.", "model.", key)
