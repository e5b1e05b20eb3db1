"""A run's newest checkpoint with all that is needed to use it."""

import dataclasses
import functools
import json
from collections.abc import Mapping

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bis_jax import files
from bis_jax.models import backbones
from bis_jax.models.backbones import ModelConfig
from bis_jax.models.param_tree import Params
from bis_jax.models.processor import Processor, make_processor
from bis_jax.parallel.sharding import make_mesh
from bis_jax.scoring import kept_tokenizer
from bis_jax.settings import locations
from bis_jax.settings.workdir import WorkdirError
from bis_jax.training import checkpoint, optim
from bis_jax.training.train_state import split_trainable


@dataclasses.dataclass(frozen=True)
class Restored:
  """A trained model.

  Attributes:
    config: the run's config.
    processor: of text and images.
    model: the backbone's config.
    mesh: where the parameters live.
    graph: the model's structure.
    params: every parameter by path.
    step: training steps of the checkpoint.
  """

  config: ConfigDict
  processor: Processor
  model: ModelConfig
  mesh: Mesh
  graph: nnx.GraphDef
  params: Params
  step: int


def restore(workdir: str, mesh: Mapping[str, int] | None = None) -> Restored:
  """Returns the newest checkpoint of a run's workdir.

  Args:
    workdir: of a run of `bis_jax.main`, local or gs://. Where it holds no tokenizer, the one that
      the run's config names must still be there.
    mesh: sizes of the mesh axes, for another machine than the run's; None: those of its config.

  Raises:
    WorkdirError: the folder is no run's workdir, or holds no checkpoint.
    FileNotFoundError: the tokenizer is gone.
  """
  place = files.absolute(workdir)
  if not (place / "config.json").exists():
    raise WorkdirError(f"{workdir} holds no config.json: name the workdir of a run")
  config = ConfigDict(json.loads((place / "config.json").read_text()))
  config.model.attention = "auto"  # the run's was for the machine that it ran on
  load = functools.partial(make_processor, config)
  processor = kept_tokenizer.kept(place, load) or _processor(config)
  mesh = make_mesh(**(mesh or config.mesh))
  model = backbones.model_config(config.model, len(processor.tokenizer))
  graph, like = backbones.structure(model, mesh)
  factors = optim.factors(config.model.learning_rates, list(like))
  restored = checkpoint.restore_params(place, *split_trainable(like, factors))
  if restored is None:
    raise WorkdirError(f"{workdir} holds no checkpoint yet: let its run go on")
  step, params = restored
  return Restored(config, processor, model, mesh, graph, params, step)


def _processor(config: ConfigDict) -> Processor:
  name = locations.locate(config).tokenizer
  try:
    return make_processor(config, name)
  except (OSError, ValueError) as error:
    raise FileNotFoundError(
      f"the run's tokenizer {name!r} can't be loaded: put it back, or set inputs.tokenizer in the "
      f"workdir's config.json to where it is now ({error})"
    ) from error
