"""The device mesh and the sharding of every array of a run.

Parameters are a flat dict `{"visual.blocks.attn.qkv.kernel": array}`; a table of (regex,
PartitionSpec) says how each is split. The first match wins; a path without a match raises.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bis_jax.errors import UserError

P = PartitionSpec
BATCH_AXES = ("data", "fsdp")  # the rows of a batch are split over both


class MeshError(UserError):
  """Mesh sizes, devices and rows that do not divide; the message names the numbers."""


def make_mesh(data: int, fsdp: int, tensor: int, devices: list[Any] | None = None) -> Mesh:
  """Returns a mesh with the axes data, fsdp, tensor; one size may be -1, all that are left.

  The data axis goes over the slices of a multislice run. Raises MeshError if the sizes do not
  multiply to the number of devices, or data is no multiple of the slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  if list(sizes.values()).count(-1) > 1:
    raise MeshError(f"config.mesh is {sizes}: set at most one of its sizes to -1")
  fixed = int(np.prod([size for size in sizes.values() if size != -1]))
  if len(devices) % fixed:
    raise MeshError(
      f"config.mesh is {sizes}, for a multiple of {fixed} devices, but there are {len(devices)}: set "
      "its sizes to divisors of that, and one to -1"
    )
  shape = [len(devices) // fixed if size == -1 else size for size in sizes.values()]
  if int(np.prod(shape)) != len(devices):
    raise MeshError(
      f"config.mesh is {sizes}, {int(np.prod(shape))} of {len(devices)} devices: set one size to -1"
    )
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if shape[0] % slices:
    raise MeshError(
      f"config.mesh is {sizes} on {slices} slices: set data to a multiple of {slices}, as the network "
      "between slices is too slow for the other axes"
    )
  # An axis may be a part of a physical one, as tensor 2 on the 4 x 4 devices of a slice.
  split: dict[str, Any] = {"allow_split_physical_axes": True}
  if slices == 1:
    grid = mesh_utils.create_device_mesh(shape, devices, **split)
  else:
    inner, outer = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **split)
  return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def first_match(rules: tuple[tuple[str, Any], ...], path: str) -> Any:
  """Returns the value of the first rule whose regex is found in `path`; raises KeyError."""
  for pattern, value in rules:
    if re.search(pattern, path):
      return value
  raise KeyError(f"no rule matches the parameter {path!r}: add one to the table")


def parameter_shardings(
  mesh: Mesh, rules: tuple[tuple[str, P], ...], shapes: Mapping[str, Any]
) -> dict[str, NamedSharding]:
  """Returns the sharding of every parameter; a dimension that does not divide is replicated."""

  def fit(path: str, shape: tuple[int, ...]) -> P:
    axes = zip(first_match(rules, path), shape, strict=False)  # a short spec leaves the rest whole
    return P(*(axis if axis and n % mesh.shape[axis] == 0 else None for axis, n in axes))

  return {path: NamedSharding(mesh, fit(path, s.shape)) for path, s in shapes.items()}


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of batch arrays [accumulate, rows, ...]: rows over data and fsdp."""
  return NamedSharding(mesh, P(None, BATCH_AXES))


def put_rows(
  arrays: Mapping[str, np.ndarray], mesh: Mesh, micro_batches: int = 1
) -> dict[str, jax.Array]:
  """Returns this process's rows [B, ...] as global arrays [A, B / A, ...] of A micro-batches."""
  # Micro-batch a takes rows a, a + A, a + 2 A, ...: the same rows on any number of processes.
  sharding = batch_sharding(mesh)
  parts = {
    key: array.reshape(len(array) // micro_batches, micro_batches, *array.shape[1:]).swapaxes(0, 1)
    for key, array in arrays.items()
  }
  if jax.process_count() == 1:
    return jax.device_put(parts, sharding)  # together, which takes half the time
  return {
    key: jax.make_array_from_process_local_data(sharding, part) for key, part in parts.items()
  }


@dataclasses.dataclass(frozen=True)
class OnMesh:
  """A jitted function, called with the mesh in context for attention kernels and `split_rows`."""

  jitted: jax.stages.Wrapped
  mesh: Mesh

  def __call__(self, *arguments: Any) -> Any:
    with jax.set_mesh(self.mesh):
      return self.jitted(*arguments)

  def lower(self, *arguments: Any) -> jax.stages.Lowered:
    with jax.set_mesh(self.mesh):
      return self.jitted.lower(*arguments)


def split_rows(x: jax.Array) -> jax.Array:
  """Returns activations [B, ...] with B split over the batch axes of a mesh in context."""
  # Otherwise XLA may propagate the parameters' sharding to the feature axis and all-reduce after
  # every matmul: on 8 TPUs the vision tower then moved 755 MB per projection.
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P(BATCH_AXES))


def whole_rows(x: jax.Array) -> jax.Array:
  """Returns an array [B, ...] with all rows on every device of a mesh in context."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P(None, *[P.UNCONSTRAINED] * (x.ndim - 1)))


def split_attention(
  kernel: Callable[..., jax.Array],
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *segments: jax.Array,
) -> jax.Array:
  """Returns kernel(q, k, v, *segments) [B, T, N, H], every device computing its rows and heads."""
  # The compiler does not partition kernels, so over several devices their mesh must be in context
  # (`jax.set_mesh`). Rows are split over its batch axes, and heads over "tensor" if key heads
  # divide.
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return kernel(q_BTNH, k_BSKH, v_BSKH, *segments)
  rows = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
  heads = "tensor" if k_BSKH.shape[2] % mesh.shape.get("tensor", 1) == 0 else None
  spec = P(rows, None, heads)
  specs = spec, spec, spec, *(P(rows) for _ in segments)
  split = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
  return split(q_BTNH, k_BSKH, v_BSKH, *segments)


def batch_shards(mesh: Mesh) -> int:
  return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
  """Returns (i, n): a process (None: this one) reads part i of the n parts of every batch's rows.

  Processes that hold the same rows, as with a tensor axis that spans hosts, read the same part.
  Raises MeshError if two processes share some rows but not all.
  """
  shards = {}
  for shard, devices in enumerate(mesh.devices.reshape(batch_shards(mesh), -1)):
    for device in devices:
      shards.setdefault(device.process_index, set()).add(shard)
  parts = sorted({tuple(sorted(held)) for held in shards.values()})
  if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != batch_shards(mesh):
    raise MeshError(
      f"the mesh {dict(mesh.shape)} gives some of the {len(shards)} processes a part of each "
      "other's rows: make config.mesh.tensor a divisor or a multiple of the devices per process"
    )
  mine = shards[jax.process_index() if process is None else process]
  return parts.index(tuple(sorted(mine))), len(parts)
