"""Where a run's inputs are, and what to do when one of them is missing."""

import dataclasses
import hashlib
import pathlib

from ml_collections import ConfigDict

from bis_jax.errors import UserError
from bis_jax.hub import weights
from bis_jax.models import backbones
from bis_jax.toy import drawing


class MissingInputError(UserError):
  """Data or weights that a recipe needs are missing."""


@dataclasses.dataclass(frozen=True)
class Locations:
  """Folders and files that a run reads, and the folder of its prepared corpus."""

  annotations: pathlib.Path  # folder of *.jsonl, or a zip of it
  images: pathlib.Path  # folder, or a zip of it
  prepared: pathlib.Path  # the prepared corpus, written by the run
  programs: pathlib.Path | None  # compiled programs, shared by runs; None: not kept
  tokenizer: str  # folder or hub id
  checkpoint: str  # safetensors folder or hub id; "": random weights, or pre-trained ones
  benchmark: pathlib.Path | None  # None: do not evaluate
  toy: pathlib.Path | None  # folder to draw the toy corpus in; None: files on disk


def _key(*parts: object) -> str:
  return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def locate(config: ConfigDict) -> Locations:
  """Returns the run's locations without touching them, but for `~`."""
  c = config.corpus
  cache = pathlib.Path(c.cache).expanduser().absolute()
  drawn = cache / f"toy-{_key(sorted(c.toy.items()), drawing.VERSION)}" if c.name == "toy" else None
  annotations = drawn / "annotations" if drawn else pathlib.Path(c.annotations).expanduser()
  images = drawn / "images" if drawn else pathlib.Path(c.images).expanduser()
  benchmark = (
    drawn / "benchmark" if drawn else pathlib.Path(config.evaluation.benchmark).expanduser()
  )
  return Locations(
    annotations=annotations,
    images=images,
    prepared=cache
    / f"corpus-{_key(str(annotations.absolute()), str(images.absolute()), c.tau, c.unmeasured)}",
    programs=cache / config.train.compile_cache if config.train.compile_cache else None,
    tokenizer=config.inputs.tokenizer
    or (str(drawn / "tokenizer") if drawn else config.model.checkpoint),
    checkpoint=config.model.checkpoint,
    benchmark=benchmark if config.evaluation.benchmark else None,
    toy=drawn,
  )


# Keys that may be hub ids, and the field of `Locations` that each becomes.
_HUB_FIELDS = {"model.checkpoint": "checkpoint", "inputs.tokenizer": "tokenizer"}
_DOWNLOADS = {
  "corpus.annotations": "hf download OpenGVLab/VisualPRM400K-v1.1-Raw annotations.zip "
  "--repo-type dataset --local-dir {folder}",
  "corpus.images": "hf download OpenGVLab/VisualPRM400K-v1.1-Raw images.zip "
  "--repo-type dataset --local-dir {folder}",
  "evaluation.benchmark": "hf download OpenGVLab/VisualProcessBench --repo-type dataset "
  "--local-dir {path}",
  "model.checkpoint": "hf download {checkpoint} --local-dir {path}",
  "inputs.tokenizer": "hf download {checkpoint} --include 'tokenizer*' --local-dir {path}",
}


def require(config: ConfigDict, where: Locations) -> Locations:
  """Checks that all inputs exist; returns the locations with hub ids as local folders.

  Raises MissingInputError with each missing input's key, place and the command that gets it.
  """
  needed: dict[str, str | pathlib.Path | None] = {}
  if not where.toy:
    needed |= {"corpus.annotations": where.annotations, "corpus.images": where.images}
    needed |= {"evaluation.benchmark": where.benchmark}
  if not where.toy or config.inputs.tokenizer:  # else it is drawn with the corpus
    needed |= {"inputs.tokenizer": where.tokenizer}
  needed |= {"model.checkpoint": where.checkpoint}
  lines, found = [], {}
  for key, path in needed.items():
    if not path or pathlib.Path(path).expanduser().exists():
      continue
    if key in _HUB_FIELDS and weights.is_hub_id(str(path)):
      try:
        alone = key == "inputs.tokenizer"
        found[_HUB_FIELDS[key]] = str(weights.find_checkpoint(str(path), tokenizer_alone=alone))
      except FileNotFoundError as error:
        lines.append(f"config.{key}: {error}")
      continue
    absolute = pathlib.Path(path).absolute()
    command = _DOWNLOADS[key].format(
      path=path,
      folder=pathlib.Path(path).parent,
      checkpoint=backbones.get(config.model.backbone).checkpoint,
    )
    lines.append(f"config.{key}: nothing at {absolute}\n    get it with: {command}")
  if lines:
    raise MissingInputError(
      "inputs of this recipe are missing; nothing was started.\n  "
      + "\n  ".join(dict.fromkeys(lines))
      + "\n  or name another place, e.g. --config.corpus.images=FOLDER_OR_ZIP"
    )
  return dataclasses.replace(where, **found)
