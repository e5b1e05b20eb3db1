"""Random groups of solutions, in rows with streams or each in a row of its own."""

import dataclasses

import numpy as np
from PIL import Image

from bis_jax.inputs import pack
from bis_jax.inputs.prompt import Sample
from bis_jax.inputs.rows import Place, RowWriter, empty_batch

PAD, MARKER = 3, 5


@dataclasses.dataclass
class Rollout:
  sample: Sample
  images: list
  targets: np.ndarray
  weights: np.ndarray
  group: int
  patches: int  # slots


def draw(seed, processor, sizes, *, words=(4, 12), steps=(1, 4), step_words=(2, 9)):
  """Rollouts of one group per entry of `sizes`, with 0 to 2 images, in random order."""
  rng = np.random.default_rng(seed)
  rollouts = []
  for group, size in enumerate(sizes):
    sides = rng.permutation([(56, 56), (56, 112), (112, 56)])[: group % 3].tolist()
    pictures = [
      processor.patches(Image.fromarray(rng.integers(0, 256, (*side, 3), dtype=np.uint8)))
      for side in sides
    ]
    slots = sum(processor.cost(*side)[1] for side in sides)
    prefix, spans = [], []
    for picture in pictures:
      prefix += rng.integers(10, 60, 2).tolist()
      spans.append((len(prefix), picture.image_tokens))
      prefix += [PAD] * picture.image_tokens
    prefix += rng.integers(10, 60, rng.integers(*words)).tolist()
    for _ in range(size):
      own = []
      for _ in range(rng.integers(*steps)):
        own += [*rng.integers(10, 60, rng.integers(*step_words)).tolist(), MARKER]
      tokens = np.array(prefix + own, np.int32)
      markers = np.flatnonzero(tokens == MARKER).astype(np.int32)
      image_spans = np.array(spans, np.int32).reshape(-1, 2)
      sample = Sample(tokens, markers, image_spans, prefix=len(prefix))
      labels = rng.integers(0, 2, (2, len(markers))).astype(np.float32)
      rollouts.append(Rollout(sample, pictures, labels[0], labels[1], group, slots))
  return [rollouts[i] for i in rng.permutation(len(rollouts))]


def plan_of(rollouts, budgets, streams=(0, 0), **options):
  costs = np.array([(len(r.sample.tokens), r.patches, len(r.sample.markers)) for r in rollouts])
  prefixes = np.array([r.sample.prefix for r in rollouts])
  groups = np.array([r.group for r in rollouts])
  options = {"shuffle": False} | options
  return pack.plan(costs, np.array(budgets), streams, prefixes=prefixes, groups=groups, **options)


def rows_of(processor, rollouts, plan, multiple=1):
  """All rows of a plan as one batch, filled with empty rows to a multiple."""
  rows = -(-len(plan) // multiple) * multiple
  batch = empty_batch(processor, rows, plan.layout.budgets, plan.layout.streams)
  for r in range(len(plan)):
    row = RowWriter(processor, {name: array[r] for name, array in batch.items()})
    for i, place in zip(plan.row(r).tolist(), plan.places_of(r).tolist(), strict=True):
      one = rollouts[i]
      row.add(
        one.sample, one.images, one.targets, one.weights, example_index=i, place=Place(*place)
      )
  return batch


def alone(rollouts, budgets):
  """Every rollout in a row of its own."""
  plan = plan_of(rollouts, budgets)
  n = len(rollouts)
  lengths = [len(r.sample.tokens) for r in rollouts]
  places = np.stack([lengths, np.full(n, -1), np.zeros(n, int)], axis=1)
  return dataclasses.replace(plan, offsets=np.arange(n + 1), examples=np.arange(n), places=places)
