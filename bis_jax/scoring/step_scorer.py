"""Step scores from a model: the probability that each step of each example is correct."""

import collections
import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bis_jax.console import progress_bar
from bis_jax.errors import UserError
from bis_jax.images import decode
from bis_jax.inputs import layout, pack, pipeline
from bis_jax.inputs.images import ImagePatches
from bis_jax.inputs.pipeline import Examples
from bis_jax.inputs.rows import HOST_KEYS, NO_SLOT, Batch, device_arrays, empty_batch
from bis_jax.models.backbone import Processor
from bis_jax.models.chip_settings import compiler_options
from bis_jax.models.param_tree import Params, merge
from bis_jax.models.reward_model import belief
from bis_jax.parallel.sharding import OnMesh, batch_shards, batch_share, put_rows
from bis_jax.scoring.prefix_cache import PrefixCache
from bis_jax.scoring.restore import load_run
from bis_jax.settings.keys import SETTINGS

# Layouts with streams that are compiled for one scorer, and the rows that are worth compiling one.
_MOST_LAYOUTS, _WORTHWHILE = 3, 8
_TOTALS = (1, 2, 4)  # times row_tokens, of rows with streams: many solutions then fill them evenly


class UnscoredStepError(UserError):
  """Examples whose steps do not all fit the length limit; the message names them."""


class Scorer:
  """A model that scores; scores do not depend on batching, order, packing or devices."""

  def __init__(
    self,
    processor: Processor,
    inputs: ConfigDict,
    mesh: Mesh,
    graph: nnx.GraphDef,
    params: Params,
    *,
    batch_rows: int,
    name: str = "",
    adapt_rows: bool = False,
    options: str = "",
    thresholds: Mapping[str, float] | None = None,
    believes: bool = False,
  ):
    """`inputs` is `config.inputs`, `batch_rows` the maximum, `name` the model's for users.

    `adapt_rows`: an example larger than a row gets larger rows, which are compiled when needed.
    `options`: config.train.compiler_options. `thresholds`: of the model's evaluation, by origin.
    `believes`: it was trained to have concentrations.
    """
    self._adapt_rows = adapt_rows
    self.name, self.thresholds, self.believes = name, thresholds or {}, believes
    self._processor, self._inputs, self._params = processor, inputs, params
    self._layouts: list[pack.Layout] = []  # with streams, that are compiled
    self._fixed = False  # the layouts: no other is compiled
    self._mesh, self._share, self._graph = mesh, batch_share(mesh), graph
    self._options = compiler_options(mesh, options)
    self.cache: PrefixCache | None = None
    self._sizes = [batch_shards(mesh)]  # rows per batch; few sizes, so that few are compiled
    while self._sizes[-1] < batch_rows:
      self._sizes.append(2 * self._sizes[-1])
    self._make_step = functools.partial(make_score_step, graph, self._options)
    self._step = OnMesh(self._make_step(), mesh)

  def with_params(self, params: Params) -> "Scorer":
    """Returns a scorer with other parameters of the same model; the compiled step is shared."""
    other = copy.copy(self)
    other._params, other.cache = params, None
    return other

  def of_concentrations(self) -> "Scorer":
    """Returns a scorer that gives the concentrations of beliefs in place of their means."""
    other = self.with_params(self._params)
    other._step = OnMesh(self._make_step(concentrations=True), self._mesh)
    return other

  def score(self, examples: Examples) -> list[np.ndarray]:
    """Returns the step scores float32[n] of every example; raises UnscoredStepError."""
    scores, refused = self.score_each(examples)
    _check_none_refused(examples, refused)
    return scores

  def image_patches(self, encoded: bytes) -> ImagePatches:
    """Returns an image as an example's `read_images` may give it; raises ImageError."""
    return self._processor.images.patches(decode(encoded))

  def refused(self, examples: Examples) -> dict[int, str]:
    """Returns {index: reason} of the examples that `score_each` would reject; reads no image."""
    return self._measured(examples)[1]

  def _measured(self, examples: Examples) -> tuple[pipeline.Measured, dict[int, str]]:
    measured = _measure(examples, self._processor, self._inputs)
    return measured, _refused(measured, self._inputs, larger=self._adapt_rows)

  def score_each(self, examples: Examples) -> tuple[list[np.ndarray], dict[int, str]]:
    """Returns (scores, {index: reason it was rejected}); the scores of those are empty."""
    measured, refused = self._measured(examples)
    inputs = self._inputs if self._fixed else measured.fitted(self._inputs)
    scores = [np.zeros(0, np.float32)] * len(examples)
    costs = measured.costs
    large = (costs > pack.row_budgets(inputs)).any(axis=1)
    accepted = np.array([i not in refused for i in range(len(examples))], bool)
    fitting = np.flatnonzero(accepted & ~large)
    try:
      if self.cache:
        given = self._params, measured, scores
        others, waiting = self.cache.score(*given, fitting, may_wait=True)
        self._score_rows(measured, inputs, others, scores)
        fitting, _ = self.cache.score(*given, waiting, may_wait=False)
      self._score_rows(measured, inputs, fitting, scores)
    except BaseException:
      if self.cache:  # its memory may be gone
        self.cache.clear()
      raise
    if len(fitting := np.flatnonzero(accepted & large)):
      larger = _larger_rows(inputs, costs[fitting].max(axis=0))
      plan = measured.plan_rows(larger, only=fitting, shuffle=False)
      fewest = self._sizes[0]
      self._run(measured, plan, scores, [fewest] * -(-len(plan) // fewest))
    return scores, refused

  def _score_rows(
    self,
    measured: pipeline.Measured,
    inputs: ConfigDict,
    chosen: np.ndarray,
    scores: list[np.ndarray],
  ) -> None:
    if not len(chosen):
      return
    rows = self._layout(measured, inputs, chosen)
    plan = measured.plan_rows(inputs, rows=rows, only=chosen, shuffle=False)
    most = self._sizes[-1] * inputs.row_tokens // int(rows.budgets[0])
    if self.cache:
      measured = dataclasses.replace(measured, slots=self.cache.slots(plan))
    self._run(measured, plan, scores, self.batch_rows(len(plan), most))
    if self.cache:
      self.cache.note(scores)

  def _layout(
    self, measured: pipeline.Measured, inputs: ConfigDict, chosen: np.ndarray
  ) -> pack.Layout:
    """Returns the layout of rows for the examples `chosen`, with streams if that is faster."""
    inputs = inputs.copy_and_resolve_references()
    with inputs.unlocked():
      inputs.row_streams, inputs.stream_tokens = -1, 0
    few = measured.costs[chosen, 0].sum() < _WORTHWHILE * inputs.row_tokens
    rows, _ = measured.layout(
      inputs,
      only=chosen,
      totals=[total for total in _TOTALS if total * self._sizes[0] <= self._sizes[-1]],
      shards=self._sizes[0],
      known=self._layouts,
      only_known=self._fixed or len(self._layouts) == _MOST_LAYOUTS or few,
    )
    if rows.streams[0] and not any(rows is known for known in self._layouts):
      self._layouts.append(rows)
    return rows

  def warm_up(self, cache_bytes: int = 0) -> None:
    """Compiles the step for rows without streams and with; scoring then compiles no other layout.

    With `cache_bytes` of each device's memory, solutions continue what they hold of earlier ones
    instead of sharing a row; for one process.
    """
    images, self._fixed, self._layouts = self._processor.images, True, []
    if cache_bytes:  # takes the place of streams
      parts = self._graph, self._params, images, self._inputs, self._mesh
      try:
        self.cache = PrefixCache(*parts, cache_bytes, self._options)
        self.cache.warm_up(self._params)
      except jax.errors.JaxRuntimeError as error:
        raise UserError(
          f"the device has no room for the model and --cache_mb={cache_bytes >> 20}: lower it, or set "
          f"it to 0 ({str(error).splitlines()[0]})"
        ) from error
    else:
      self._layouts = layout.ahead(self._inputs, images.slot_multiple)
    plain = pack.Layout(pack.row_budgets(self._inputs))
    for rows in [plain, *self._layouts]:
      for count in self._sizes:
        batch = empty_batch(images, count, rows.budgets, rows.streams)
        if self.cache:
          batch["slots"] = np.full_like(batch["tokens"], NO_SLOT)
        jax.block_until_ready(self._scores_of(batch))

  def batch_rows(self, rows: int, most: int | None = None) -> list[int]:
    """Returns the sizes of the batches that hold `rows` packed rows, decreasing, up to `most` each.

    Only the last batch may have empty rows, up to a quarter of it unless it has the smallest size.
    With sizes 1, 2, 4, 8, 13 rows are [8, 4, 1] and 15 are [8, 8].
    """
    batches = []
    while rows > 0:
      fitting = [size for size in self._sizes if 3 * size <= 4 * rows and size <= (most or size)]
      batches.append(fitting[-1] if fitting else self._sizes[0])
      rows -= batches[-1]
    return batches

  def _run(
    self,
    measured: pipeline.Measured,
    plan: pack.Plan,
    scores: list[np.ndarray],
    batches: list[int],
  ) -> None:
    for i in plan.examples:
      scores[i] = np.zeros(measured.costs[i, 2], np.float32)
    first_row = 0
    with progress_bar("score", len(plan), unit="row") as bar:
      for rows, count in collections.Counter(batches).items():
        offsets = plan.offsets[first_row : first_row + rows * count + 1]
        first_row += rows * count
        for batch in pipeline.BatchIterator(
          measured,
          dataclasses.replace(plan, offsets=offsets),
          rows_per_batch=rows,
          share=self._share,
          workers=self._inputs.workers,
          prefetch=self._inputs.prefetch,
        ):
          self._score_batch(batch, scores)
          bar.update(rows)

  def _score_batch(self, batch: Batch, scores: list[np.ndarray]) -> None:
    index = {key: batch[key] for key in HOST_KEYS}
    score_BR = multihost_utils.process_allgather(self._scores_of(batch), tiled=True)
    if jax.process_count() > 1:  # through the devices, so that rows come in the order of the scores
      index = multihost_utils.process_allgather(put_rows(index, self._mesh), tiled=True)
      index = {key: array[0] for key, array in index.items()}
    used_BR = index["example_index"] >= 0
    placed = (index["example_index"][used_BR], index["step_index"][used_BR], score_BR[used_BR])
    for example, step, value in zip(*placed, strict=True):
      scores[example][step] = value

  def _scores_of(self, batch: Batch) -> jax.Array:
    """Returns float32[B, R], B rows of all processes, from this process's share of a batch."""
    if self.cache and "slots" in batch:
      return self.cache.run(self._params, batch)
    return self._step(self._params, put_rows(device_arrays(batch), self._mesh))


def load(
  checkpoint: str,
  *,
  base: str | None = None,
  batch_rows: int | None = None,
  adapt_rows: bool = True,
  **inputs: int,
) -> Scorer:
  """Returns the scorer of a workdir, exported folder or hub id; raises as `load_run` does.

  `base` as in `load_run`. `batch_rows` and `inputs`, such as max_length=4096, replace settings of the
  run's config; a UserError names those out of range.
  """
  for key, value in inputs.items():
    setting = SETTINGS[f"inputs.{key}"]
    if not setting.allows(value):
      raise UserError(f"--{key} is {value}; it must be {setting.words()}")
  run = load_run(checkpoint, base=base)
  run.config.inputs.update(inputs)
  return Scorer(
    run.processor,
    run.config.inputs,
    run.mesh,
    run.graph,
    run.params,
    batch_rows=batch_rows or run.config.evaluation.batch_rows,
    name=f"{checkpoint} step {run.step}",
    thresholds=run.thresholds,
    adapt_rows=adapt_rows,
    believes=run.config.labels.kind == "beta",
  )


def check_lengths(examples: Examples, processor: Processor, inputs: ConfigDict) -> None:
  """Raises UnscoredStepError if `Scorer.score` would; reads only texts and image sizes."""
  _check_none_refused(examples, _refused(_measure(examples, processor, inputs), inputs))


def _measure(examples: Examples, processor: Processor, inputs: ConfigDict) -> pipeline.Measured:
  return pipeline.measure(
    examples, processor.prompt, processor.images, max_length=inputs.max_length
  )


def _check_none_refused(examples: Examples, refused: dict[int, str]) -> None:
  if refused:
    names = "; ".join(f"{examples[i].id}: {why}" for i, why in list(refused.items())[:10])
    raise UnscoredStepError(
      f"{len(refused)} examples are too long to score every step: raise config.inputs.max_length, "
      "row_tokens, row_patches and row_markers, or put an item's images on one canvas "
      f"(config.evaluation.images). {names}"
    )


def _larger_rows(inputs: ConfigDict, largest: np.ndarray) -> ConfigDict:
  """Returns `inputs` with rows doubled until `largest` int64[3] fits, so that few are compiled."""
  larger = inputs.copy_and_resolve_references()
  with larger.unlocked():
    for key, need in zip(pack.BUDGETS.values(), largest.tolist(), strict=True):
      while larger[key] < need:
        larger[key] *= 2
  return larger


def _refused(
  measured: pipeline.Measured, inputs: ConfigDict, larger: bool = False
) -> dict[int, str]:
  """Returns {index: reason} of those without a step, too long, or, unless `larger`, than a row."""
  budgets = pack.row_budgets(inputs)
  refused = pack.over_budget(
    measured.costs, measured.costs.max(0, initial=0) if larger else budgets
  )
  for i in np.flatnonzero(measured.dropped_steps).tolist():
    kept = measured.costs[i, 2]
    refused[i] = (
      f"only {kept} of {kept + measured.dropped_steps[i]} steps fit into {inputs.max_length} tokens: "
      "raise max_length"
    )
  return refused


def make_score_step(
  graph: nnx.GraphDef, options: dict[str, Any] | None = None, *, concentrations: bool = False
) -> jax.stages.Wrapped:
  """Returns the jitted (params, batch [1, B, ...]) -> P("correct") at markers, float32[B, R].

  With `concentrations` it gives those of the beliefs, see `reward_model.belief`.
  """

  def score_step(params, batch):
    rows = {key: array[0] for key, array in batch.items()}
    logits_BR2 = merge(graph, params)(rows)
    return belief(logits_BR2)[1] if concentrations else jax.nn.softmax(logits_BR2)[..., 0]

  return jax.jit(score_step, compiler_options=options)
