"""The tokenizer of a run, kept in its workdir, so that its model needs nothing else.

WORKDIR/tokenizer/    as `save_pretrained` writes it, with the step marker
"""

import pathlib
import tempfile
from collections.abc import Callable
from typing import TypeVar

from etils import epath
from transformers import PreTrainedTokenizerBase

from bis_jax.inputs.internvl_prompt import TextTokenizer

_Loaded = TypeVar("_Loaded")

_LAST = "tokenizer_config.json"  # written last: with it the folder is whole


def keep(tokenizer: PreTrainedTokenizerBase | TextTokenizer, workdir: epath.Path) -> None:
  """Writes the tokenizer into a workdir, local or remote, unless it is there."""
  folder = workdir / "tokenizer"
  if (folder / _LAST).exists():
    return
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as local:
    tokenizer.save_pretrained(local)
    for file in sorted(pathlib.Path(local).iterdir(), key=lambda file: file.name == _LAST):
      (folder / file.name).write_bytes(file.read_bytes())


def kept(workdir: epath.Path, load: Callable[[str], _Loaded]) -> _Loaded | None:
  """Returns what `load` makes of the tokenizer's folder; None where a workdir holds none."""
  folder = workdir / "tokenizer"
  if not (folder / _LAST).exists():
    return None
  with tempfile.TemporaryDirectory() as local:
    for file in folder.iterdir():
      (pathlib.Path(local) / file.name).write_bytes(file.read_bytes())
    return load(local)
