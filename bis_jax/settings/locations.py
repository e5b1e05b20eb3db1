"""Where the inputs of a run are, and how to get those that are missing."""

import dataclasses

from etils import epath
from ml_collections import ConfigDict

from bis_jax.errors import UserError
from bis_jax.files import absolute, digest, refuse_overwriting
from bis_jax.hub import weights
from bis_jax.models import backbones
from bis_jax.storage import hub_datasets, is_url
from bis_jax.toy import drawing


class MissingInputError(UserError):
  """Data or weights that a recipe needs are missing."""


@dataclasses.dataclass(frozen=True)
class Locations:
  """Files and folders that a run reads, and the folders that it shares with other runs."""

  annotations: epath.PathLike  # folder, zip or file, or a dataset id of the hub
  images: epath.Path | None  # folder, or a zip of it; None: rollouts of text alone
  prepared: epath.Path  # the prepared corpus, written by the run
  programs: epath.Path | None  # persistent compilation cache
  tokenizer: str  # folder or hub id
  checkpoint: str  # safetensors folder or hub id; "": random or pre-trained weights
  benchmark: epath.Path | None  # None: no evaluation
  toy: epath.Path | None  # folder of the toy corpus; None: files on disk


def locate(config: ConfigDict) -> Locations:
  """Returns the locations of a run; reads no file."""
  c, cache = config.corpus, absolute(config.corpus.cache)
  toy = None
  annotations, images, benchmark = (
    absolute(path) for path in (c.annotations, c.images, config.evaluation.benchmark)
  )
  tokenizer = config.inputs.tokenizer or config.model.checkpoint
  if c.name == "toy":
    toy = cache / f"toy-{digest(sorted(drawing.named(c.toy).items()), drawing.VERSION)}"
    annotations, images, benchmark = (toy / name for name in ("annotations", "images", "benchmark"))
    tokenizer = config.inputs.tokenizer or str(toy / "tokenizer")
  programs = config.train.compile_cache
  # The last two were keys of the config: corpora of earlier versions keep their names.
  key = digest(str(annotations), str(images if c.images else ""), 0.0, "negative")
  return Locations(
    annotations=annotations,
    images=images if (toy and not c.toy.described) or (c.images and not toy) else None,
    prepared=cache / f"corpus-{key}",
    programs=(absolute(programs) if is_url(programs) else cache / programs) if programs else None,
    tokenizer=tokenizer,
    checkpoint=config.model.checkpoint,
    benchmark=benchmark if config.evaluation.benchmark else None,
    toy=toy,
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


def require(config: ConfigDict, locations: Locations) -> Locations:
  """Checks that all inputs exist; returns the locations with hub ids as local folders.

  Raises MissingInputError with each missing input's key, place and the command that gets it.
  """
  refuse_overwriting(
    {"config.corpus.cache": locations.prepared},
    {},
    {"config.corpus.annotations": locations.annotations, "config.corpus.images": locations.images},
  )
  needed: dict[str, epath.PathLike | None] = {}
  if not locations.toy:
    needed |= {"corpus.annotations": locations.annotations, "corpus.images": locations.images}
    needed |= {"evaluation.benchmark": locations.benchmark}
    if hub_datasets.is_hub_id(config.corpus.annotations):
      del needed["corpus.annotations"]  # downloaded when it is read
      locations = dataclasses.replace(locations, annotations=config.corpus.annotations)
  if not locations.toy or config.inputs.tokenizer:  # else it is drawn with the corpus
    needed |= {"inputs.tokenizer": locations.tokenizer}
  needed |= {"model.checkpoint": locations.checkpoint}
  missing, fetched = [], {}
  for key, path in needed.items():
    if not path or absolute(path).exists():
      continue
    if key in _HUB_FIELDS and weights.is_hub_id(str(path)):
      try:
        alone = key == "inputs.tokenizer"
        fetched[_HUB_FIELDS[key]] = str(weights.find_checkpoint(str(path), tokenizer_alone=alone))
      except FileNotFoundError as error:
        missing.append(f"config.{key}: {error}")
      continue
    command = _DOWNLOADS[key].format(
      path=path,
      folder=epath.Path(path).parent,
      checkpoint=backbones.get(config.model.backbone).checkpoint,
    )
    missing.append(f"config.{key}: nothing at {absolute(path)}\n    get it with: {command}")
  if missing:
    raise MissingInputError(
      "inputs of this recipe are missing; nothing was started.\n  "
      + "\n  ".join(dict.fromkeys(missing))
      + "\n  or set another location, such as --config.corpus.images=FOLDER_OR_ZIP"
    )
  return dataclasses.replace(locations, **fetched)
