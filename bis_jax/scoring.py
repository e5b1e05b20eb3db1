"""Step scores from a model: the probability that each step of each example is correct."""

import sys

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from bis_jax.inputs import pack, pipeline
from bis_jax.inputs.images import QwenImages
from bis_jax.inputs.pipeline import Examples
from bis_jax.inputs.prompt import QwenPrompt
from bis_jax.sharding import batch_sharding
from bis_jax.state import Params
from bis_jax.train_step import HOST_KEYS, make_score_step


class UnscoredStepError(ValueError):
  """Examples whose steps do not all fit the length limit; the message names them."""


def score(
  examples: Examples,
  prompt: QwenPrompt,
  images: QwenImages,
  inputs: ConfigDict,
  mesh: Mesh,
  graph: nnx.GraphDef,
  params: Params,
) -> list[np.ndarray]:
  """Returns for every example its step scores float32[n], P(correct) in [0, 1].

  Scores do not depend on batching, order, packing or devices.

  Args:
    examples: what to score; targets and weights are not read.
    prompt, images: the formatter and the image rule that the model was trained with.
    inputs: `config.inputs`.
    mesh, graph, params: the model.

  Raises:
    UnscoredStepError: an example is longer than `inputs.max_length`.
  """
  measured = pipeline.measure(examples, prompt, images, max_length=inputs.max_length)
  plan = pack.plan(
    *measured.costs,
    row_tokens=inputs.row_tokens,
    row_patches=inputs.row_patches,
    row_markers=inputs.row_markers,
    shuffle=False,
    lookahead=inputs.lookahead,
  )
  _refuse_unscored(examples, measured, plan)
  iterator = pipeline.batches(
    examples,
    measured,
    plan,
    images,
    rows_per_batch=inputs.row_multiple,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    workers=inputs.workers,
    prefetch=inputs.prefetch,
  )
  score_step, sharding = make_score_step(graph), batch_sharding(mesh)
  scores = [np.zeros(count, np.float32) for count in measured.marker_counts]
  for batch in tqdm(iterator, desc="score", unit="batch", disable=not sys.stderr.isatty()):
    arrays = {
      key: jax.make_array_from_process_local_data(sharding, array[None])
      for key, array in batch.items()
      if key not in HOST_KEYS
    }
    index = {key: batch[key] for key in HOST_KEYS}
    score_BR = multihost_utils.process_allgather(score_step(params, arrays), tiled=True)
    if jax.process_count() > 1:
      index = multihost_utils.process_allgather(index, tiled=True)
    used_BR = index["example_index"] >= 0
    placed = (index["example_index"][used_BR], index["step_index"][used_BR], score_BR[used_BR])
    for example, step, value in zip(*placed, strict=True):
      scores[example][step] = value
  return scores


def _refuse_unscored(examples: Examples, measured: pipeline.Measured, plan: pack.Plan) -> None:
  cut = sorted({*np.flatnonzero(measured.dropped_steps).tolist(), *plan.too_long})
  if cut:
    names = ", ".join(examples[i].id for i in cut[:10])
    raise UnscoredStepError(
      f"{len(cut)} examples are too long to score every step ({names}{', ...' * (len(cut) > 10)}): "
      "raise config.inputs.max_length, row_tokens and row_patches"
    )
