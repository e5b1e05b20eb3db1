"""Loads a reward model with its tokenizer: from a workdir, an exported folder, adapters or a hub id.

WORKDIR/tokenizer/    as `save_pretrained` writes it, with the step marker
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bis_jax import files
from bis_jax.errors import UserError
from bis_jax.hub import peft_folder, weights
from bis_jax.inputs.prompt import SpecialTokens, Tokenizer
from bis_jax.models import backbones, learning_rates
from bis_jax.models.adaptation import is_adapter
from bis_jax.models.backbone import Processor
from bis_jax.models.chip_settings import run_mesh
from bis_jax.models.model_config import ModelConfig
from bis_jax.models.param_tree import Params
from bis_jax.models.processor import make_processor
from bis_jax.parallel.sharding import make_mesh
from bis_jax.settings import exported, locations
from bis_jax.settings.workdir import WorkdirError, read_config
from bis_jax.training import checkpoint as checkpoints
from bis_jax.training import pretrain
from bis_jax.training.train_state import first_params, split_trainable

_T = TypeVar("_T")
_LAST = "tokenizer_config.json"  # written last: the folder is complete if it exists


@dataclasses.dataclass(frozen=True)
class LoadedRun:
  """Config, processor, mesh and parameters of a run after `step` steps.

  `thresholds` are those of its evaluation, by origin, if it is known.
  """

  config: ConfigDict
  processor: Processor
  model: ModelConfig
  mesh: Mesh
  graph: nnx.GraphDef
  params: Params
  step: int
  thresholds: Mapping[str, float]


def load_run(
  checkpoint: str, mesh: Mapping[str, int] | None = None, base: str | None = None
) -> LoadedRun:
  """Loads a reward model: the latest checkpoint of a workdir, or an exported folder or hub id.

  `mesh` gives the sizes of the mesh axes for other devices than the run's. `base` is the base checkpoint
  of exported adapters, if not the one that their config names. Raises WorkdirError, or
  FileNotFoundError if nothing is there, or if neither it nor the run's config leads to a tokenizer.
  """
  path = _find(checkpoint)
  adapted = (path / weights.ADAPTER_CONFIG).exists()
  if base and not adapted:
    raise UserError(f"--base is {base}, but {checkpoint} holds no adapters: leave it out")
  found = exported.read(path)
  if not found and any(path.glob("*.safetensors")):
    raise WorkdirError(
      f"{checkpoint} holds weights but no {exported.FILE}, so it is not an exported reward model: "
      "export its run again with python -m bis_jax.export"
    )
  config, held = found or (read_config(path), None)
  # The run's were for the machine that it ran on.
  config.model.attention, config.train.compiler_options = "auto", ""
  processor = make_processor(config, str(path)) if held else _processor(config, path)
  devices = make_mesh(mesh["data"], mesh["fsdp"], mesh["tensor"]) if mesh else run_mesh(config)
  marker = processor.prompt.special.prm
  model = backbones.model_config(config, len(processor.tokenizer), marker)
  if held and not adapted:
    model = dataclasses.replace(model, adaptation=None)  # exports are merged
  graph, shapes = backbones.structure(model, devices)
  if held and adapted:
    special, step, thresholds = processor.prompt.special, held.step, held.thresholds
    config.model.checkpoint, folder = peft_folder.find_base(path, base)
    trained, frozen = split_trainable(shapes, learning_rates.factors(config, shapes))
    make = functools.partial(_frozen, config, model, shapes, frozen, folder, special)
    wanted = f"what the adapters in {path} were trained beside: name their base with --base"
    params = checkpoints.made_frozen(make, held.base_sums, wanted)
    params |= peft_folder.read(path, shapes, trained, model, folder)
  elif held:
    config.model.checkpoint = str(path)  # with the other rows of its LM head
    params = first_params(model, shapes, path, processor.prompt.special, seed=0)
    step, thresholds = held.step, held.thresholds
  else:
    step, params = _latest(checkpoint, path, config, model, shapes, processor.prompt.special)
    thresholds = exported.thresholds(_evaluation(path))
  return LoadedRun(config, processor, model, devices, graph, params, step, thresholds)


def _latest(
  name: str,
  path: epath.Path,
  config: ConfigDict,
  model: ModelConfig,
  shapes: dict[str, jax.ShapeDtypeStruct],
  special: SpecialTokens,
) -> tuple[int, Params]:
  trained, frozen = split_trainable(shapes, learning_rates.factors(config, shapes))

  def read_base() -> Params:
    folder = pretrain.base_folder(config, locations.locate(config))
    if folder and not folder.exists():
      raise WorkdirError(
        f"{folder}, from which the run in {name} started, is missing: resume the run, which makes it "
        "again"
      )
    return _frozen(config, model, shapes, frozen, folder, special)

  make = read_base if model.adaptation else None
  restored = checkpoints.restore_params(path, trained, frozen, make)
  if restored is None:
    raise WorkdirError(f"{name} holds no checkpoint yet: resume its run")
  return restored


def _frozen(
  config: ConfigDict,
  model: ModelConfig,
  shapes: dict[str, jax.ShapeDtypeStruct],
  frozen: Mapping[str, Any],
  base: epath.Path | None,
  special: SpecialTokens,
) -> Params:
  noise = config.model.marker_noise
  if base:  # adapters need not be drawn
    shapes = {path: shape for path, shape in shapes.items() if not is_adapter(path)}
  params = first_params(model, shapes, base, special, config.seed, noise)
  return {path: params[path] for path in frozen}


def _evaluation(path: epath.Path) -> dict[str, Any] | None:
  # What it adds to the scores may be lacking.
  try:
    return files.read_json(path / "evaluation.json", "")
  except (OSError, UserError):
    return None


def _find(checkpoint: str) -> epath.Path:
  """Returns the folder of a workdir or export; a hub id is downloaded unless it is in the cache."""
  path = files.absolute(checkpoint)
  if not path.exists() and weights.is_hub_id(checkpoint):
    return weights.find_checkpoint(checkpoint)
  return path


def save_tokenizer(tokenizer: Tokenizer, workdir: epath.Path) -> None:
  folder = workdir / "tokenizer"
  if (folder / _LAST).exists() and not files.changed_files(folder):
    return
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as local:
    tokenizer.save_pretrained(local)
    saved = sorted(pathlib.Path(local).iterdir(), key=lambda file: file.name == _LAST)
    for file in saved:
      with files.replacing(folder / file.name) as copy:
        copy.write(file.read_bytes())
  files.note_digests(*(folder / file.name for file in saved))


def load_tokenizer(workdir: epath.Path, load: Callable[[str], _T]) -> _T | None:
  """Returns `load(folder)` of the tokenizer saved in the workdir; None: it is missing or damaged."""
  folder = workdir / "tokenizer"
  if not (folder / _LAST).exists() or files.changed_files(folder):
    return None
  with files.read_locally(folder, "*") as local:
    return load(str(local))


def _processor(config: ConfigDict, workdir: epath.Path) -> Processor:
  name = str(workdir / "tokenizer")
  try:
    if saved := load_tokenizer(workdir, lambda folder: make_processor(config, folder)):
      return saved
    name = locations.locate(config).tokenizer
    return make_processor(config, name)
  except Exception as error:  # libraries raise even plain ones for damaged files
    raise FileNotFoundError(
      f"the run's tokenizer '{name}' can't be loaded: put it back, or set inputs.tokenizer in the "
      f"workdir's config.json to where it is now ({error})"
    ) from error
