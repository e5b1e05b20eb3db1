"""The state of training: initialized or restored, sharded over the devices."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from bis_jax.errors import UserError
from bis_jax.hub import weights
from bis_jax.inputs.prompt import SpecialTokens
from bis_jax.models import adaptation, backbones
from bis_jax.models.hub_layout import EMBEDDING_PATH
from bis_jax.models.model_config import LORA
from bis_jax.models.param_tree import Params, split
from bis_jax.parallel.sharding import MeshError, batch_shards

HOST = "pinned_host"  # memory kind


class TrainState(NamedTuple):
  """What training changes: int32[] steps done, trainable parameters, optimizer state; or shapes."""

  step: Any
  params: Any
  opt_state: Any


def rows_per_step(rollouts_per_row: float, train: ConfigDict, multiple: int) -> int:
  # It does not depend on the devices, so that a run gives the same result on any number of them.
  return max(1, round(train.global_batch / rollouts_per_row / multiple)) * multiple


def check_rows(rows: int, accumulate: int, mesh: Mesh) -> None:
  """Raises MeshError if the rows of a step do not divide over micro-batches and devices."""
  parts = accumulate * batch_shards(mesh)
  if rows % parts:
    raise MeshError(
      f"{rows} rows per step do not divide over {accumulate} micro-batches x {batch_shards(mesh)} "
      f"batch shards of the mesh: set config.inputs.row_multiple to a multiple of {parts}, or "
      "change config.train.accumulate or config.mesh"
    )


def first_params(
  model_config: Any,
  shapes: dict[str, jax.ShapeDtypeStruct],
  checkpoint: epath.Path | None,
  special: SpecialTokens,
  seed: int,
  marker_noise: float = 0.0,
) -> Params:
  """Returns the parameters before the first step, initialized or read in the shardings of `shapes`.

  `checkpoint` is a safetensors folder, None for random parameters from `seed`. `special` and
  `marker_noise` as in `weights.load`.
  """
  random = {p: s for p, s in shapes.items() if checkpoint is None or adaptation.is_adapter(p)}

  def draw() -> Params:
    drawn = split(backbones.build(model_config, seed))[1]
    return {path: drawn[path] for path in random}

  params = {}
  if random:
    params = jax.jit(draw, out_shardings={path: s.sharding for path, s in random.items()})()
  if checkpoint is None:
    return params
  loaded = weights.load(
    checkpoint,
    model_config,
    adaptation.stored_shapes(shapes),
    yes_token=special.yes,
    no_token=special.no,
    marker_token=special.prm,
    marker_noise=marker_noise,
  )
  table_VD = loaded[EMBEDDING_PATH]
  if row := random.get(adaptation.MARKER_PATH):
    take = jax.jit(lambda table_VD: table_VD[special.prm], out_shardings=row.sharding)
    params[adaptation.MARKER_PATH] = take(table_VD).astype(row.dtype)
  own = model_config.adaptation
  if own and own.factor(EMBEDDING_PATH) == LORA and weights.is_new_marker(checkpoint, special.prm):
    # Unused, and not the same to the last bit on other devices: the base would not be known again.
    clear = functools.partial(_without_row, row=special.prm)
    loaded[EMBEDDING_PATH] = jax.jit(clear, out_shardings=table_VD.sharding)(table_VD)
    table_VD.delete()
  return adaptation.quantized(loaded, shapes) | params


def _without_row(table_VD: jax.Array, row: int) -> jax.Array:
  return table_VD.at[row].set(0)


def abstract_state(
  optimizer: optax.GradientTransformation,
  shapes: dict[str, jax.ShapeDtypeStruct],
  mesh: Mesh,
  on_host: bool = False,
) -> TrainState:
  """Returns shapes and shardings of a training state; moments are sharded as their parameters.

  `shapes` are those of the trainable parameters; everything else is replicated over `mesh`. With
  `on_host` moments are in the host's memory.
  """
  kind = HOST if on_host else None
  replicated = NamedSharding(mesh, PartitionSpec())
  opt_state = optax.tree.map_params(
    optimizer.init,
    lambda struct, shape: struct.update(sharding=shape.sharding.with_memory_kind(kind)),
    jax.eval_shape(optimizer.init, shapes),
    shapes,
    transform_non_params=lambda struct: struct.update(sharding=replicated),
  )
  return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated), shapes, opt_state)


def check_host_memory(mesh: Mesh) -> None:
  """Raises UserError if the devices cannot keep arrays in the host's memory."""
  device = mesh.devices.flat[0]
  if HOST not in {memory.kind for memory in device.addressable_memories()}:
    raise UserError(
      f"config.optim.on_host is True, but {device.device_kind} keeps no arrays in the host's memory: "
      "set it to False"
    )


def first_state(
  optimizer: optax.GradientTransformation, params: Params, shapes: TrainState
) -> TrainState:
  """Returns the state before the first step; `shapes` from `abstract_state`."""
  shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
  opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
  return TrainState(jax.device_put(jnp.int32(0), shardings.step), params, opt_state)


def split_trainable(
  tree: dict[str, Any], factors: dict[str, float]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (trainable, frozen) entries; parameters with learning-rate factor 0 are frozen."""
  trainable = {path: value for path, value in tree.items() if factors[path] > 0}
  return trainable, {path: value for path, value in tree.items() if path not in trainable}
