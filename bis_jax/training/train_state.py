"""The state of training: made, read and placed on the devices; batches to arrays."""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from bis_jax.hub import weights
from bis_jax.inputs.prompt import SpecialTokens
from bis_jax.inputs.rows import HOST_KEYS
from bis_jax.models import backbones
from bis_jax.models.param_tree import Params, split
from bis_jax.parallel.sharding import MeshError, batch_sharding, batch_shards


class TrainState(NamedTuple):
  """What training changes: int32[] steps done, trainable parameters, optimiser state."""

  step: jax.Array
  params: Params
  opt_state: Any


def rows_per_step(rollouts_a_row: float, train: ConfigDict, multiple: int) -> int:
  """Returns how many packed rows make a step of about `global_batch` rollouts.

  A number of the config and the data alone, never of the devices, so a run is the same on any.
  """
  return max(1, round(train.global_batch / rollouts_a_row / multiple)) * multiple


def check_rows(rows: int, accumulate: int, mesh: Mesh) -> None:
  """Raises MeshError where the rows of a step do not divide over micro-batches and devices."""
  parts = accumulate * batch_shards(mesh)
  if rows % parts:
    raise MeshError(
      f"{rows} rows a step do not divide over {accumulate} micro-batches x {batch_shards(mesh)} "
      f"batch shards of the mesh: set config.inputs.row_multiple to a multiple of {parts}, or "
      "change config.train.accumulate or config.mesh"
    )


def to_device(batch: dict[str, np.ndarray], mesh: Mesh, micro_batches: int) -> dict[str, jax.Array]:
  """Returns this process's rows [B, ...] of a batch as global arrays [A, B / A, ...].

  Micro-batch a takes rows a, a + A, a + 2 A, ...: the same rows on any number of processes.
  """
  sharding = batch_sharding(mesh)
  return {
    key: jax.make_array_from_process_local_data(
      sharding, array.reshape(-1, micro_batches, *array.shape[1:]).swapaxes(0, 1)
    )
    for key, array in batch.items()
    if key not in HOST_KEYS
  }


def first_params(
  model_config: Any,
  shapes: dict[str, jax.ShapeDtypeStruct],
  checkpoint: pathlib.Path | None,
  special: SpecialTokens,
  seed: int,
  marker_noise: float = 0.0,
) -> Params:
  """Returns the parameters before the first step, made or read where they live.

  Args:
    model_config: the backbone's config.
    shapes: from `backbones.structure`.
    checkpoint: safetensors folder; None: the parameters are random.
    special: ids of the words whose LM head rows start the reward head, and of the step marker.
    seed: of random parameters.
    marker_noise: `config.model.marker_noise`; see `weights.load`.
  """
  if checkpoint is None:
    shardings = {path: shape.sharding for path, shape in shapes.items()}
    make = jax.jit(lambda: split(backbones.build(model_config, seed))[1], out_shardings=shardings)
    return make()
  return weights.load(
    checkpoint,
    model_config,
    shapes,
    yes_token=special.yes,
    no_token=special.no,
    marker_token=special.prm,
    marker_noise=marker_noise,
  )


def abstract_state(
  optimizer: optax.GradientTransformation, shapes: dict[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> TrainState:
  """Returns what a training state is and where it lives; moments live where their parameters do.

  Args:
    optimizer: of the trainable parameters.
    shapes: of the trainable parameters, with shardings.
    mesh: where everything else is, whole on every device.
  """
  everywhere = NamedSharding(mesh, PartitionSpec())

  def place(struct: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)

  opt_state = optax.tree.map_params(
    optimizer,
    lambda struct, shape: place(struct, shape.sharding),
    jax.eval_shape(optimizer.init, shapes),
    shapes,
    transform_non_params=lambda struct: place(struct, everywhere),
  )
  return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere), shapes, opt_state)


def first_state(optimizer: optax.GradientTransformation, params: Params, mesh: Mesh) -> TrainState:
  """Returns the state before the first step."""
  shapes = {
    path: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
    for path, array in params.items()
  }
  places = jax.tree.map(lambda s: s.sharding, abstract_state(optimizer, shapes, mesh))
  opt_state = jax.jit(optimizer.init, out_shardings=places.opt_state)(params)
  return TrainState(jax.device_put(jnp.int32(0), places.step), params, opt_state)


def partition(tree: dict[str, Any], chosen: dict[str, bool]) -> tuple[dict, dict]:
  """Returns the entries that are chosen, and the others."""
  parts: tuple[dict, dict] = ({}, {})
  for path, value in tree.items():
    parts[not chosen[path]][path] = value
  return parts
