"""Blocks of a score table, and their statistics by an integer program on the devices."""

import dataclasses
import functools
from collections.abc import Iterator

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bis_jax.corpus.score_table import ScoreTable, Statistics

_MOST_STEPS = 64  # of a rollout in a block; others are counted on the host


@functools.partial(jax.jit, static_argnames="ignore")
def count(
  correct_BS: jax.Array,
  total_BS: jax.Array,
  length_B: jax.Array,
  threshold: jax.Array,
  unit: jax.Array,
  *,
  ignore: bool,
) -> jax.Array:
  """Returns int32[4, B]: n, n_pos, sum of the positive steps' units and of u (unit - u).

  Every total is 0 or divides `unit`; a step with u units of `unit` is positive if u > `threshold`.
  `total_BS` may be [1, 1]. With `ignore`, steps of total 0 do not count.
  """
  # Integers are exact on every device; float32 sums and fused operations would not be.
  counted_BS = jnp.arange(correct_BS.shape[1])[None] < length_B[:, None]
  total_BS = total_BS.astype(jnp.int32)
  if ignore:
    counted_BS &= total_BS > 0
  units_BS = correct_BS.astype(jnp.int32) * (unit // jnp.maximum(total_BS, 1))
  positive_BS = counted_BS & (units_BS > threshold)
  spread_BS = jnp.where(counted_BS, units_BS * (unit - units_BS), 0)
  columns = counted_BS, positive_BS, jnp.where(positive_BS, units_BS, 0), spread_BS
  return jnp.stack([column_BS.sum(1, dtype=jnp.int32) for column_BS in columns])


@dataclasses.dataclass(frozen=True)
class _Source:
  """A Grain source of blocks: (table of the rows, padded arguments of `count`)."""

  table: ScoreTable
  slices: list[slice]
  rows: int  # of a block, padding included
  most_steps: int

  def __len__(self) -> int:
    return len(self.slices)

  def __getitem__(self, index: int) -> tuple[ScoreTable, tuple[np.ndarray, ...]]:
    table = self.table.take(self.slices[index])
    length_B = np.zeros(self.rows, np.int16)
    length_B[: len(table)] = table.steps
    held_BS = np.arange(self.most_steps, dtype=np.int16) < length_B[:, None]

    def padded(column: np.ndarray) -> np.ndarray:
      if not any(column.strides):  # one value
        return column[:1, None]
      dense_BS = np.zeros(held_BS.shape, column.dtype)
      dense_BS[held_BS] = column
      return dense_BS

    return table, (padded(table.correct), padded(table.total), length_B)


def read(
  table: ScoreTable, slices: list[slice], tau: float, unmeasured: str, unit: int
) -> Iterator[tuple[ScoreTable, Statistics]]:
  """Yields each block with its statistics; see `ScoreTable.statistics` and `ScoreTable.unit`."""
  most_steps = table.most_steps
  if not unit or not slices or most_steps > _MOST_STEPS:
    for rows in slices:
      yield (block := table.take(rows)), block.statistics(tau, unmeasured)
    return
  mesh = Mesh(np.array(jax.local_devices()), ("rows",), axis_types=(AxisType.Auto,))
  most = _padded(max(rows.stop - rows.start for rows in slices))
  source = _Source(table, slices, -(-most // mesh.size) * mesh.size, _padded(most_steps))
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
  threshold, ignore = np.int32(np.floor(tau * unit)), unmeasured == "ignore"
  waiting = []
  for block, arguments in grain.MapDataset.source(source).to_iter_dataset(options):
    split = [
      jax.device_put(array, NamedSharding(mesh, P("rows" if len(array) > 1 else None)))
      for array in arguments
    ]
    waiting.append((block, count(*split, threshold, np.int32(unit), ignore=ignore)))
    if len(waiting) > 1:  # the devices count one block while the host ranks the one before
      yield _finished(*waiting.pop(0), unit)
  yield _finished(*waiting.pop(), unit)


def _finished(block: ScoreTable, counts: jax.Array, unit: int) -> tuple[ScoreTable, Statistics]:
  n, n_pos, total, spread = np.asarray(counts)[:, : len(block)]
  return block, Statistics(n, n_pos, total / unit, spread / unit**2)


def over_processes(counts: np.ndarray) -> np.ndarray:
  """Returns the sum over all processes of arrays of equal shape and values below 2**31: int64."""
  devices = {device.process_index: device for device in jax.devices()}  # one of each process
  first = np.array([devices[index] for index in sorted(devices)])
  mesh = Mesh(first, ("processes",), axis_types=(AxisType.Auto,))
  local = np.zeros((1, _padded(counts.size)), np.int32)
  local[0, : counts.size] = counts.reshape(-1)
  split = jax.make_array_from_process_local_data(NamedSharding(mesh, P("processes")), local)
  sums = np.asarray(_adder(mesh)(split).addressable_data(0))
  return sums[: counts.size].reshape(counts.shape).astype(np.int64)


@functools.cache
def _adder(mesh: Mesh):
  return jax.jit(lambda split_DN: split_DN.sum(0), out_shardings=NamedSharding(mesh, P()))


def _padded(size: int) -> int:
  """Returns a power of two: programs are compiled for few sizes."""
  return 1 << max(size - 1, 0).bit_length()
