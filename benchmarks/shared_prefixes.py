"""Rollouts per second and memory with shared prefixes, against rows without, on this machine.

  python -m benchmarks.shared_prefixes [--case=qwen|internvl] [--what=training|scoring]

About 50M parameters, 3 rollouts per question in training and 16 in scoring, as in Best-of-16. Of a
rollout 350 tokens (Qwen2.5-VL) or 1,130 (InternVL) are its question and image, and 270 on average its
own; own lengths are log-normal. The layout is the one that a run or a scorer proposes. Both sides run
in turn in one process, on the first rows of plans over all drawn rollouts; a row counts as the mean
number of rollouts per row of its plan. Memory is the compiler's. Results: benchmarks/RESULTS.md.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict
from PIL import Image

from bis_jax.inputs import layout, pack
from bis_jax.inputs.prompt import Sample
from bis_jax.inputs.rows import Batch, Place, RowWriter, device_arrays, empty_batch
from bis_jax.models import backbones
from bis_jax.models.internvl import config as internvl
from bis_jax.models.internvl.images import InternVLImages
from bis_jax.models.qwen2_5_vl import config as qwen
from bis_jax.models.qwen2_5_vl.images import QwenImages
from bis_jax.parallel.sharding import OnMesh, make_mesh, put_rows
from bis_jax.scoring.step_scorer import _TOTALS, make_score_step
from bis_jax.training import train_state, train_step
from configs import common

_CASE = flags.DEFINE_enum("case", None, ("qwen", "internvl"), "one of the cases")
_WHAT = flags.DEFINE_enum("what", None, ("training", "scoring"), "one of the two")
_STEPS = flags.DEFINE_integer("steps", 3, "timed steps per side")

PAD, MARKER, OWN = 3, 5, 270


@dataclasses.dataclass(frozen=True)
class Case:
  """A model with its image processor, the size of each image, and the tokens of a prefix."""

  model: Any
  images: Any
  size: tuple[int, int]  # height, width
  prefix: int
  row_tokens: int
  row_patches: int


def case_of(name: str) -> Case:
  if name == "qwen":
    text = qwen.TextConfig(152_064, 256, 1024, 8, 2, 1)  # heads of 128, as published
    vision = qwen.VisionConfig(
      depth=4, hidden_size=192, intermediate_size=512, num_heads=4, full_attention_period=4
    )
    model = qwen.Qwen2_5_VLConfig(text, vision, remat="dots")
    return Case(model, QwenImages(28 * 28, 448 * 448), (448, 448), 350, 4096, 7168)
  text = internvl.TextConfig(152_064, 256, 1024, 8, 2, 1)
  vision = internvl.VisionConfig(4, 192, 512, 4)
  model = internvl.InternVLConfig(text, vision, remat="dots")
  return Case(model, InternVLImages(max_tiles=3), (448, 1344), 1130, 4096, 12 * 1024)


def draw(case: Case, groups: int, size: int) -> tuple[list[Sample], Any, layout.Costs]:
  """Returns solutions, `size` per group, the one image of all groups, and the costs."""
  rng = np.random.default_rng(0)
  picture = case.images.patches(Image.fromarray(rng.integers(0, 256, (*case.size, 3), np.uint8)))
  span = np.array([[6, picture.image_tokens]], np.int32)
  samples, costs = [], []
  for _ in range(groups):
    # Of images of one size; questions differ.
    length = case.prefix + rng.integers(-40, 41)
    prefix = rng.integers(10, 150_000, length, dtype=np.int32)
    prefix[6 : 6 + picture.image_tokens] = PAD
    for length in np.exp(rng.normal(np.log(OWN) - 0.125, 0.5, size)).clip(40, 1200).astype(int):
      own = rng.integers(10, 150_000, length, dtype=np.int32)
      own[np.linspace(9, length - 1, 6).astype(int)] = MARKER
      tokens = np.concatenate([prefix, own])
      markers = np.flatnonzero(tokens == MARKER).astype(np.int32)
      samples.append(Sample(tokens, markers, span, prefix=len(prefix)))
      costs.append((len(tokens), case.images.cost(*case.size)[1], len(markers)))
  number, prefixes = np.repeat(np.arange(groups), size), np.array([s.prefix for s in samples])
  return samples, picture, layout.Costs(np.array(costs), prefixes, number)


def rows_of(case: Case, samples: list[Sample], picture: Any, plan: pack.Plan, rows: int) -> Batch:
  batch = empty_batch(case.images, rows, *plan.layout)
  rng = np.random.default_rng(0)
  for r in range(rows):
    row = RowWriter(case.images, {name: array[r] for name, array in batch.items()})
    for i, place in zip(plan.row(r).tolist(), plan.places_of(r).tolist(), strict=True):
      labels = rng.integers(0, 2, len(samples[i].markers)).astype(np.float32)
      ones = np.ones_like(labels)
      row.add(samples[i], [picture], labels, ones, example_index=i, place=Place(*place))
  return batch


def parameters(shapes: dict[str, Any]) -> dict[str, jax.Array]:
  return {
    path: jax.random.normal(jax.random.key(i), shape.shape, shape.dtype) * 0.02
    + float(path.endswith("scale"))
    for i, (path, shape) in enumerate(shapes.items())
  }


def training(case: Case, batch: Batch, mesh: Any) -> tuple[Callable[[], None], int]:
  """Returns (one step, bytes) of training on rows one by one."""
  config = common.get_config()
  config.model.backbone = case.model.backbone
  step = train_step.step_of(config, case.model, mesh, 100)
  params = parameters(step.state.params | step.frozen)
  frozen = {path: params.pop(path) for path in step.frozen}
  state = train_state.first_state(step.optimizer, params, step.state)
  arrays = put_rows(device_arrays(batch), mesh, len(batch["tokens"]))
  memory = step.step.lower(state, frozen, arrays).compile().memory_analysis()

  def run() -> None:
    nonlocal state
    state, metrics = step.step(state, frozen, arrays)
    jax.block_until_ready(metrics)

  assert memory
  return run, memory.temp_size_in_bytes + memory.argument_size_in_bytes


def scoring(case: Case, batch: Batch, mesh: Any) -> tuple[Callable[[], None], int]:
  """Returns (one step, bytes) of scoring."""
  graph, shapes = backbones.structure(case.model, mesh)
  step, params = OnMesh(make_score_step(graph), mesh), parameters(shapes)
  arrays = put_rows(device_arrays(batch), mesh)
  memory = step.lower(params, arrays).compile().memory_analysis()
  assert memory
  bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes
  return lambda: jax.block_until_ready(step(params, arrays)), bytes


def measure(name: str, what: str) -> str:
  case, mesh = case_of(name), make_mesh(1, 1, 1, jax.devices()[:1])
  trains = what == "training"
  samples, picture, costs = draw(case, *((300, 3) if trains else (48, 16)))
  inputs = ConfigDict(
    dict(row_tokens=case.row_tokens, row_patches=case.row_patches, row_markers=256, lookahead=512)
  )
  inputs.row_streams, inputs.stream_tokens = -1, 0
  multiple = case.images.slot_multiple
  totals = (1,) if trains else _TOTALS
  shared, _ = layout.choose(costs, inputs, multiple, totals=totals)
  sides = []
  for rows in (pack.Layout(pack.row_budgets(inputs)), shared):
    plan = pack.plan(
      costs.costs, *rows, prefixes=costs.prefixes, groups=costs.groups, shuffle=trains
    )
    count = 1 if trains else max(1, 4 * case.row_tokens // int(rows.budgets[0]))
    batch = rows_of(case, samples, picture, plan, count)
    run, size = (training if trains else scoring)(case, batch, mesh)
    run()
    sides.append((run, len(samples) / len(plan) * count, size, []))
  for _ in range(_STEPS.value):
    for run, _, _, seconds in sides:
      start = time.perf_counter()
      run()
      seconds.append(time.perf_counter() - start)
  rates = [rollouts / statistics.median(seconds) for _, rollouts, _, seconds in sides]
  number, length = shared.streams
  return (
    f"| {what} | {name} | {shared.prefix_tokens} + {number} x {length}, {shared.budgets[1]} patches "
    f"| {rates[0]:.2f} | {rates[1]:.2f} | {rates[1] / rates[0]:.2f} "
    f"| {sides[0][2] / 1e9:.2f} | {sides[1][2] / 1e9:.2f} |"
  )


def main(argv: list[str]) -> None:
  """Prints a Markdown table."""
  del argv
  print(
    "| | | row: prefixes + streams | without, rollouts/s | shared | times | GB without | shared |"
  )
  print("|---|---|---|---|---|---|---|---|")
  for what in ("training", "scoring"):
    for name in ("qwen", "internvl"):
      if _CASE.value in (None, name) and _WHAT.value in (None, what):
        print(measure(name, what), flush=True)


if __name__ == "__main__":
  app.run(main)
