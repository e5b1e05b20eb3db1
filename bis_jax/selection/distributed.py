"""The same selection if every training process holds only a slice of the score table.

A radix select over 64-bit integers that sort as the scores do: 8 all-reduces of integer histograms.
"""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bis_jax.corpus.score_table import ScoreTable
from bis_jax.errors import UserError
from bis_jax.selection.manifest import KeptSource, Manifest
from bis_jax.selection.rule import Rule, kept_sources, manifest_of


def sort_keys(scores: np.ndarray) -> np.ndarray:
  """Returns uint64[rows] that compare as the float64 scores do; 0.0 and -0.0 share a key."""
  bits = (scores + 0.0).view(np.uint64)
  negative = bits >> np.uint64(63) == 1
  return np.where(negative, ~bits, bits | np.uint64(1 << 63))


def _row_mesh() -> Mesh:
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  return Mesh(np.array(devices), ("rows",), axis_types=(AxisType.Auto,))


def _count(group_N: jax.Array, byte_N: jax.Array, active_N: jax.Array, groups: int) -> jax.Array:
  """Returns int32[groups, 256]: number of active rows on all devices by group and byte value."""
  counts = jnp.zeros((groups, 256), jnp.int32)
  counts = counts.at[group_N, byte_N].add(active_N.astype(jnp.int32), mode="drop")
  return jax.lax.psum(counts, "rows")


def _find_cut(high_N, low_N, group_N, quota_G):
  """Returns uint32[2, G], the lowest key kept, and int32[1, G], rows at it kept on this device."""
  # Arguments: uint32[N] halves of the sort keys, int32[N] group (G: no group), and int32[G] number
  # of rows to keep of each group, at most its size.
  groups = quota_G.shape[0]
  words_N, cut_G = (high_N, low_N), [jnp.zeros_like(quota_G, jnp.uint32) for _ in range(2)]
  at_cut_N = group_N < groups
  # Per byte, the counts of rows by byte value give that byte of the k-th highest key.
  for word in (0, 1):
    for shift in (24, 16, 8, 0):
      byte_N = (words_N[word] >> shift) & 0xFF
      count_GV = _count(group_N, byte_N.astype(jnp.int32), at_cut_N, groups)
      at_least_GV = jnp.cumsum(count_GV[:, ::-1], axis=1)[:, ::-1]
      byte_G = jnp.sum(at_least_GV >= quota_G[:, None], axis=1, dtype=jnp.int32) - 1
      above_GV = at_least_GV - count_GV
      quota_G = quota_G - jnp.take_along_axis(above_GV, byte_G[:, None], axis=1)[:, 0]
      cut_G[word] = cut_G[word] | (byte_G.astype(jnp.uint32) << shift)
      at_cut_N &= byte_N == byte_G.astype(jnp.uint32).at[group_N].get(mode="clip")
  # Ties at the cut go to the first devices, whose rows come first in the file.
  ties_G = jnp.zeros((groups,), jnp.int32).at[group_N].add(at_cut_N.astype(jnp.int32), mode="drop")
  ties_DG = jax.lax.all_gather(ties_G, "rows")
  earlier_D = jnp.arange(ties_DG.shape[0]) < jax.lax.axis_index("rows")
  before_G = jnp.sum(jnp.where(earlier_D[:, None], ties_DG, 0), axis=0)
  return jnp.stack(cut_G), jnp.clip(quota_G - before_G, 0, ties_G)[None]


@functools.cache
def _jitted_find_cut(mesh: Mesh):
  rows = P("rows")
  return jax.jit(
    jax.shard_map(
      _find_cut, mesh=mesh, in_specs=(rows, rows, rows, P()), out_specs=(P(), rows), check_vma=False
    )
  )


def _kept_rows(keys: np.ndarray, group: np.ndarray, quotas: np.ndarray) -> np.ndarray:
  """Returns bool[rows], True for this process's rows to keep."""
  # `group` is int32[rows], `quotas.size` for rows that are never kept; `quotas` is the number of
  # rows to keep over all processes, at most the size of the group.
  mesh = _row_mesh()
  local = jax.local_device_count()
  most = int(multihost_utils.process_allgather(np.int32(keys.size)).max())
  block = max(1, -(-most // local))  # rows per device: that of the largest slice

  def shard(column: np.ndarray, padding: int) -> jax.Array:
    padded = np.full(local * block, padding, column.dtype)
    padded[: column.size] = column
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P("rows")), padded)

  high, low = (keys >> np.uint64(32)).astype(np.uint32), keys.astype(np.uint32)
  replicated = NamedSharding(mesh, P())
  quotas = jax.make_array_from_process_local_data(replicated, quotas.astype(np.int32))
  cut, mine = _jitted_find_cut(mesh)(
    shard(high, 0), shard(low, 0), shard(group, quotas.size), quotas
  )
  cut = np.asarray(cut.addressable_data(0)).astype(np.uint64)
  cut_keys = np.append((cut[0] << np.uint64(32)) | cut[1], np.uint64(2**64 - 1))[group]
  kept, ties = keys > cut_keys, keys == cut_keys
  pieces = sorted(mine.addressable_shards, key=lambda piece: piece.index[0].start or 0)
  for device, piece in enumerate(pieces):
    rows = slice(device * block, (device + 1) * block)
    quota = np.append(np.asarray(piece.data)[0], 0)
    for g in np.flatnonzero(quota):
      kept[rows][np.flatnonzero(ties[rows] & (group[rows] == g))[: quota[g]]] = True
  return kept


def _sum_over_processes(counts: np.ndarray) -> np.ndarray:
  return multihost_utils.process_allgather(counts.astype(np.int32)).sum(0, dtype=np.int64)


def _gather_sources(sources: tuple[KeptSource, ...]) -> tuple[KeptSource, ...]:
  counts = np.array([[s.scorable, s.dropped, s.lines.size] for s in sources], np.int32)
  counts = multihost_utils.process_allgather(counts)  # [processes, sources, 3]
  sizes = counts[:, :, 2]
  lines = np.zeros(sizes.sum(1).max(), np.int32)
  lines[: sizes[jax.process_index()].sum()] = np.concatenate([s.lines for s in sources])
  ends = sizes.cumsum(1)
  held = [
    np.split(every[: end[-1]], end[:-1])
    for every, end in zip(multihost_utils.process_allgather(lines), ends, strict=True)
  ]
  return tuple(
    KeptSource(
      source.name,
      scorable=int(counts[:, i, 0].sum()),
      dropped=int(counts[:, i, 1].sum()),
      lines=np.concatenate([of_process[i] for of_process in held]),
    )
    for i, source in enumerate(sources)
  )


def select(table: ScoreTable, **rule) -> Manifest:
  """Returns on every process the manifest that `rule.select` returns for the whole table.

  `table` is this process's slice, from `ScoreTable.load(path, part=(process, processes))`. Raises
  UserError as `rule.select` does, or if the processes have different rules or tables.
  """
  rule = Rule(**rule)
  same = dataclasses.astuple(rule) + (table.source_names, table.tau, table.unmeasured, table.digest)
  _check_same(repr(same))
  ranked, scores = rule.ranked(table), rule.scores(table)
  per_source = rule.scope == "per_source"
  groups = len(table.source_names) if per_source else 1
  group = table.source.astype(np.int32) if per_source else np.zeros(len(table), np.int32)
  rollouts = _sum_over_processes(np.bincount(group[ranked], minlength=groups))
  group[scores == -np.inf] = groups
  eligible = _sum_over_processes(np.bincount(group, minlength=groups + 1)[:groups])
  quotas = np.minimum([rule.quota(int(m)) for m in rollouts], eligible)
  kept = _kept_rows(sort_keys(scores), group, quotas)
  sources = _gather_sources(kept_sources(table, rule, kept))
  return manifest_of(rule, table, _checksum(table), sources)


def _checksum(table: ScoreTable) -> str:
  halves = np.array([table.row_hash_sum()], np.uint64).view(np.uint32)  # jax has no uint64 here
  every = multihost_utils.process_allgather(halves).reshape(-1, 2)
  every = np.ascontiguousarray(every, np.uint32).view(np.uint64)
  return f"{int(every.sum(dtype=np.uint64)):016x}"


def _check_same(text: str) -> None:
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
  every = multihost_utils.process_allgather(digest).reshape(-1, digest.size)
  if (every != digest).any():
    raise UserError(
      "the processes have different selection rules or score tables: give all the same "
      "parameters and the same score table"
    )
