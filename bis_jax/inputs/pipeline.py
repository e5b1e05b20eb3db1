"""From examples to batches (see `rows`): measure, plan (see `pack`), then read them through Grain.

    measured = measure(examples, prompt, images, max_length=...)
    plan = measured.plan_rows(config.inputs, seed=..., epochs=...)
    iterator = BatchIterator(measured, plan, rows_per_batch=...)

Batch number n of a run is a pure function of (examples, plan, n), so a run resumes at any batch, on
any number of processes and workers.
"""

import array
import concurrent.futures
import hashlib
import itertools
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, SupportsIndex

import grain
import numpy as np
from ml_collections import ConfigDict

from bis_jax.console import log, progress_bar, start_worker, without_collector
from bis_jax.errors import UserError
from bis_jax.images import decode
from bis_jax.inputs import layout, pack
from bis_jax.inputs.images import Batch, ImagePatches, ImageProcessor
from bis_jax.inputs.prompt import Prompt, Sample, expand
from bis_jax.inputs.rows import NO_SLOT, Place, RowWriter, empty_batch

_SHARED_MEMORY = pathlib.Path("/dev/shm")
_READERS = 16  # examples of a row that are read at the same time, for corpora in a bucket


@dataclass(frozen=True)
class Example:
  """One question with its images and the n steps of one answer."""

  id: str  # names the example in errors, "source:line"
  question: str
  steps: tuple[str, ...]
  image_sizes: Sequence[tuple[int, int]]  # upright (height, width) of every image
  # Returns encoded images, or patches of the same processor; picklable.
  read_images: Callable[[], Sequence[bytes | ImagePatches]]
  targets: np.ndarray  # float32[n] in [0, 1], probability that the step is correct
  weights: np.ndarray  # float32[n], 1 if the step is labelled, else 0
  # Equal for examples whose images are the same bytes; None: not known, so no prefix is shared.
  images_id: str | None = None


def unlabelled(
  id: str,
  question: str,
  steps: Sequence[str],
  image_sizes: Sequence[tuple[int, int]],
  read_images: Callable[[], Sequence[bytes | ImagePatches]],
  images_id: str | None = None,
) -> Example:
  zeros = np.zeros(len(steps), np.float32)
  return Example(id, question, tuple(steps), image_sizes, read_images, zeros, zeros, images_id)


class Examples(Protocol):
  """Examples made on access without reading images; picklable if worker processes are used.

  Those that are faster to make together also have `__getitems__`, as torch calls it.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, i: int, /) -> Example: ...


def _several(examples: Examples, indices: Sequence[int]) -> Sequence[Example]:
  together = getattr(examples, "__getitems__", None)
  return together(indices) if together else [examples[i] for i in indices]


class InputError(UserError):
  """An example that cannot be put into a batch; the message names it."""


@dataclass(frozen=True)
class Measured:
  """Examples with their costs in a row."""

  # Texts are tokenized again when a batch is assembled: the tokens of half a million rollouts would
  # take 0.4 GB in each of the processes that assemble, of which each needs its own few.
  examples: Examples
  prompt: Prompt
  images: ImageProcessor
  max_length: int
  costs: np.ndarray  # int64[n, 3], tokens, patch slots and step markers
  dropped_steps: np.ndarray  # int64[n], trailing steps beyond the length limit
  prefixes: np.ndarray  # int64[n], tokens before the first step
  groups: np.ndarray  # int64[n], equal for examples with the same images and prefix
  # Of the examples that are remembered, the slots of their tokens, see `rows`; None: none is.
  slots: Mapping[int, np.ndarray] | None = None

  def sample(self, example: Example, image_token_counts: Sequence[int]) -> Sample:
    [(compact, dropped, prefix)] = self.prompt.encode_batch(
      [(example.question, example.steps)], [image_token_counts], max_length=self.max_length
    )
    return expand(compact, image_token_counts, self.prompt.special, dropped, prefix)

  def fitted(self, inputs: ConfigDict) -> ConfigDict:
    """Returns `inputs`, with rows of no patch slots if no example has an image."""
    if self.costs[:, 1].any():
      return inputs
    fitted = inputs.copy_and_resolve_references()
    with fitted.unlocked():
      fitted.row_patches = 0
    return fitted

  def image_patches(self, example: Example) -> list[ImagePatches]:
    return [
      self.images.patches(decode(image)) if isinstance(image, bytes) else image
      for image in example.read_images()
    ]

  def layout(
    self, inputs: ConfigDict, *, only: np.ndarray | None = None, **options: Any
  ) -> tuple[pack.Layout, float]:
    """Returns the layout of rows for the examples `only`, and what it saves; see `layout.choose`."""
    costs = layout.Costs(self.costs, self.prefixes, self.groups)
    costs = costs if only is None else costs.of(only)
    return layout.choose(costs, inputs, self.images.slot_multiple, **options)

  def plan_rows(
    self,
    inputs: ConfigDict,
    *,
    only: np.ndarray | None = None,
    rows: pack.Layout | None = None,
    **options: Any,
  ) -> pack.Plan:
    """Returns the row plan of the examples `only` (int64[k], None: all); see `pack.plan`.

    `rows` None are those of `inputs`, without streams.
    """
    chosen = slice(None) if only is None else only
    plan = pack.plan(
      self.costs[chosen],
      *(rows or pack.Layout(pack.row_budgets(inputs))),
      prefixes=self.prefixes[chosen],
      groups=self.groups[chosen],
      lookahead=inputs.lookahead,
      **options,
    )
    return plan if only is None else replace(plan, examples=only[plan.examples])


def measure(
  examples: Examples,
  prompt: Prompt,
  images: ImageProcessor,
  *,
  max_length: int,
  progress: bool = False,
  chunk: int = 2048,
  share: tuple[int, int] = (0, 1),
  gather: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> Measured:
  """Returns the costs of all examples; reads texts and image sizes, no pixels.

  Samples have at most `max_length` tokens: trailing steps beyond it are dropped and counted.
  `chunk` examples are tokenized at once. With `share` (i, n) this process measures the i-th of n
  parts, and `gather` returns the concatenated rows of the parts of all.
  """
  first, end = (len(examples) * part // share[1] for part in (share[0], share[0] + 1))
  rows, digests = [], []
  with (
    progress_bar("measure", end - first, unit="rollout", disable=None if progress else True) as bar,
    without_collector(),
  ):
    for start in range(first, end, chunk):
      chosen = _several(examples, range(start, min(start + chunk, end)))
      of_images = [[images.cost(*size) for size in example.image_sizes] for example in chosen]
      counts = [[image_tokens for image_tokens, _ in cost] for cost in of_images]
      texts = [(example.question, example.steps) for example in chosen]
      encoded = prompt.encode_batch(texts, counts, max_length=max_length)
      for i, (example, cost, (compact, dropped, prefix)) in enumerate(
        zip(chosen, of_images, encoded, strict=True), start
      ):
        in_images = sum(image_tokens - 1 for image_tokens, _ in cost)
        kept, slots = len(example.steps) - dropped, sum(slots for _, slots in cost)
        rows.append((len(compact) + in_images, slots, kept, dropped, prefix + in_images))
        names = repr((i if example.images_id is None else example.images_id, cost)).encode()
        shared = array.array("i", compact[:prefix]).tobytes()
        digests.append(hashlib.blake2b(names + shared, digest_size=16).digest())
      bar.update(len(chosen))
  # As 32-bit numbers, which processes can gather; equal digests are checked again in the row.
  digest = np.frombuffer(b"".join(digests), np.int32).reshape(-1, 4)
  table = gather(np.concatenate([np.array(rows, np.int32).reshape(-1, 5), digest], axis=1))
  _, groups = np.unique(table[:, 5:], axis=0, return_inverse=True)
  costs = table.astype(np.int64)
  return Measured(
    examples, prompt, images, max_length, costs[:, :3], costs[:, 3], costs[:, 4], groups.reshape(-1)
  )


@dataclass(frozen=True)
class BatchSource:
  """The batches of a run by number, assembled on access; the last one is filled with empty rows.

  `share` (i, n): this process reads the i-th of n contiguous shares of every global batch.
  """

  measured: Measured
  plan: pack.Plan
  rows_per_batch: int  # of a global batch
  share: tuple[int, int]

  def __post_init__(self):
    if self.rows_per_batch % self.share[1]:
      raise ValueError(
        f"{self.rows_per_batch} rows per batch do not divide over {self.share[1]} processes; "
        f"use a multiple of {self.share[1]}"
      )

  def __len__(self) -> int:
    return -(-len(self.plan) // self.rows_per_batch)

  def __getitem__(self, number: SupportsIndex, /) -> Batch:
    rows = self.rows_per_batch // self.share[1]
    batch = empty_batch(self.measured.images, rows, *self.plan.layout)
    slots = self.measured.slots
    if slots is not None:
      batch["slots"] = np.full_like(batch["tokens"], NO_SLOT)
    start = int(number) * self.rows_per_batch + self.share[0] * rows
    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
      for b in range(rows):
        row = RowWriter(self.measured.images, {name: array[b] for name, array in batch.items()})
        indices = self.plan.row(start + b).tolist()
        places = [Place(*place) for place in self.plan.places_of(start + b).tolist()]
        groups = [-1, *(place.group for place in places)]
        leads = [before != group for before, group in itertools.pairwise(groups)]
        examples = _several(self.measured.examples, indices)
        found = readers.map(self._read, indices, examples, leads)
        for i, example, place, (sample, images) in zip(
          indices, examples, places, found, strict=True
        ):
          labels = example.targets, example.weights
          try:
            kept = slots.get(i) if slots else None
            row.add(sample, images, *labels, example_index=i, place=place, slots=kept)
          except ValueError as error:
            raise InputError(f"example {example.id}: {error}") from error
    return batch

  def _read(self, i: int, example: Example, leads: bool) -> tuple[Sample, list[ImagePatches]]:
    # The images of a group are read once, with the example that leads it.
    rule = self.measured.images
    try:
      images = self.measured.image_patches(example) if leads else []
      planned = [rule.cost(*size)[0] for size in example.image_sizes]
      found = [image.image_tokens for image in images] if leads else planned
      if planned != found:
        raise ValueError(
          f"its text has {planned} image tokens, but its images give {found} features; "
          "the corpus states other sizes than its images have: prepare it again"
        )
      sample = self.measured.sample(example, found)
      now, measured = (len(sample.tokens), len(sample.markers)), self.measured.costs[i, [0, 2]]
      if now != tuple(measured):
        was = "{} tokens and {} steps when measured".format(*measured)
        raise ValueError("{}, now {} and {}".format(was, *now))
      if not len(example.steps) == len(example.targets) == len(example.weights):
        raise ValueError(
          f"{len(example.steps)} steps with {len(example.targets)} targets and "
          f"{len(example.weights)} weights"
        )
      return sample, images
    except (UserError, ValueError) as error:
      raise InputError(f"example {example.id}: {error}") from error


def _ahead(workers: int, prefetch: int) -> int:
  """Returns the batches that each worker process assembles ahead."""
  return max(1, -(-prefetch // workers))


def _workers_that_fit(source: BatchSource, workers: int, prefetch: int) -> int:
  """Returns how many of the worker processes can pass their batches through /dev/shm."""
  # One that finds no room there is killed (SIGBUS). Containers have 64 MB unless told otherwise.
  if not workers or not _SHARED_MEMORY.exists():
    return workers
  row = empty_batch(source.measured.images, 1, *source.plan.layout)
  rows = source.rows_per_batch // source.share[1]
  size = rows * sum(array.nbytes for array in row.values())
  # Each worker holds those ahead and one in its hands; two are on their way to the device.
  needed = {n: size * (n * (1 + _ahead(n, prefetch)) + 2) for n in range(1, workers + 1)}
  free = shutil.disk_usage(_SHARED_MEMORY).free
  fitting = max((n for n, space in needed.items() if space <= free), default=0)
  if fitting < workers:
    log.warning(
      "%s has %.0f MB free, and %d worker processes need %.0f MB there: using %s; raise it (such as "
      "docker run --shm-size=%.0fg), or set config.inputs.workers",
      _SHARED_MEMORY,
      free / 1e6,
      workers,
      needed[workers] / 1e6,
      f"{fitting} of them" if fitting else "threads",
      -(-needed[workers] // 1e9),
    )
  return fitting


class BatchIterator(Iterator[Batch]):
  """Iterates over a run's batches; its only state is the number of the next global batch."""

  # The number is the same on every process and for any number of processes and workers, so a
  # checkpoint of one process resumes them all.

  def __init__(
    self,
    measured: Measured,
    plan: pack.Plan,
    *,
    rows_per_batch: int,
    share: tuple[int, int] = (0, 1),
    workers: int = 0,
    prefetch: int = 2,
  ):
    """`rows_per_batch` and `share` as in `BatchSource`.

    Args:
      workers: processes that assemble batches; 0 uses threads of this process.
      prefetch: batches assembled ahead; 0 assembles each on demand.
    """
    self.next_batch = 0
    self.rows_per_batch = rows_per_batch
    self._source = BatchSource(measured, plan, rows_per_batch, share)
    self._workers = _workers_that_fit(self._source, workers, prefetch)
    self._prefetch = prefetch
    self._reader: grain.DatasetIterator | None = None

  def __len__(self) -> int:
    return len(self._source)

  def __next__(self) -> Batch:
    if self._reader is None:
      self._reader = iter(self._dataset())
    batch = next(self._reader)
    self.next_batch += 1
    return batch

  def seek(self, next_batch: int) -> None:
    """Sets the next global batch; raises IndexError past the run's end."""
    if not 0 <= next_batch <= len(self):
      raise IndexError(f"batch {next_batch} of a run of {len(self)} batches")
    self.close()
    self.next_batch = next_batch

  def close(self) -> None:
    if self._reader is not None:
      self._reader.close()
      self._reader = None

  def _dataset(self) -> grain.IterDataset:
    # pyrefly: ignore[bad-argument-type]  # Grain's stub wants a parameter of another name
    dataset = grain.MapDataset.source(self._source)[self.next_batch :]
    if not self._workers:
      ahead = grain.ReadOptions(num_threads=self._prefetch, prefetch_buffer_size=self._prefetch)
      return dataset.to_iter_dataset(ahead)
    one_by_one = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return dataset.to_iter_dataset(one_by_one).mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=self._workers,
        per_worker_buffer_size=_ahead(self._workers, self._prefetch),
      ),
      start_worker,
    )
