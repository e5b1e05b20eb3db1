"""Batches hold every example at its position, whole, for any number of processes, and resume."""

import dataclasses
import io
import types

import numpy as np
import pytest
from absl import flags
from PIL import Image

from bis_jax.inputs import pack, pipeline
from bis_jax.inputs.pipeline import BatchIterator, InputError, measure
from bis_jax.models.qwen2_5_vl.images import QwenImages
from tests.in_memory import encode, in_memory

IMAGES = QwenImages(min_pixels=28 * 28, max_pixels=336 * 336)
ROW = np.array([320, 512, 24])
SIZES = ((112, 112), (56, 140), (224, 168), (30, 31))


def encoded_image(height, width, seed):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG")
  return buffer.getvalue()


def example(i, **changes):
  """Example i: 0 to 3 images, 1 to 5 steps, and labels that name the example and the step."""
  steps = tuple(f"Step {j} of {i}: there are {i * j} circles." for j in range(1 + i % 5))
  images = tuple(encoded_image(*SIZES[(i + k) % 4], seed=i + k) for k in range(i % 4))
  targets = np.array([i + j / 100 for j in range(len(steps))], np.float32)
  weights = np.array([(i + j) % 3 > 0 for j in range(len(steps))], np.float32)
  fields = dict(id=f"toy:{i}", question=f"How many in {i}?", steps=steps, images=images)
  return in_memory(**(fields | {"targets": targets, "weights": weights} | changes))


@pytest.fixture(scope="module")
def source():
  return [example(i) for i in range(40)]


@pytest.fixture(scope="module")
def measured(source, tiny_prompt):
  return measure(source, tiny_prompt, IMAGES, max_length=320, chunk=7)


@pytest.fixture(scope="module")
def plan(measured):
  return pack.plan(measured.costs, ROW, seed=3, epochs=2, lookahead=8)


def assert_equal(left, right):
  assert left.keys() == right.keys()
  for name in left:
    np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_measured_costs_are_those_of_single_samples(source, measured, tiny_prompt):
  for i in range(len(source)):
    costs = [IMAGES.cost(*size) for size in source[i].image_sizes]
    counts = [tokens for tokens, _ in costs]
    sample = encode(tiny_prompt, source[i].question, source[i].steps, counts, max_length=320)
    assert measured.costs[i, 0] == len(sample.tokens)
    assert measured.costs[i, 1] == sum(slots for _, slots in costs)
    assert measured.costs[i, 2] == len(sample.markers)
    assert measured.dropped_steps[i] == sample.dropped_steps
    again = measured.sample(source[i], counts)
    np.testing.assert_array_equal(again.tokens, sample.tokens)
    np.testing.assert_array_equal(again.markers, sample.markers)


def test_parts_that_processes_measure_are_the_whole(source, measured, tiny_prompt):
  """Mutation caught: a part that begins at 0."""
  parts = []
  for i in range(3):
    gather = lambda rows: parts.append(rows) or rows  # noqa: E731
    measure(source, tiny_prompt, IMAGES, max_length=320, chunk=7, share=(i, 3), gather=gather)
  whole = np.column_stack([measured.costs, measured.dropped_steps])
  assert [len(part) for part in parts] == [13, 13, 14]
  np.testing.assert_array_equal(np.concatenate(parts)[:, :4], whole)


def alone(source, measured, i):
  """Row 0 of a batch that holds example i alone."""
  one = pack.plan(measured.costs[i : i + 1], ROW)
  one = dataclasses.replace(one, examples=np.array([i]))
  batch = next(BatchIterator(measured, one, rows_per_batch=1, prefetch=0))
  return {name: array[0] for name, array in batch.items()}


def features(row, tokens):
  """The feature of each image token: the four patches of its merge unit and their positions."""
  units = row["image_index"][tokens]
  units = units[units >= 0]
  patches = row["patches"].reshape(-1, 4, row["patches"].shape[-1])[units]
  return patches, row["patch_position"].reshape(-1, 4, 2)[units]


def test_a_packed_row_is_its_samples_one_after_the_other(source, measured, plan):
  """Each sample has the tokens, positions, images and labels that it has alone in a row.

  Mutations caught: image_index without the row's patch offset, marker_index without its token
  offset, labels of the next example, positions that continue from the previous sample.
  """
  seen = 0
  iterator = BatchIterator(measured, plan, rows_per_batch=4, prefetch=0)
  for number, batch in enumerate(iterator):
    for b in range(4):
      row = {name: array[b] for name, array in batch.items()}
      members = plan.row(4 * number + b)
      start = images = 0
      for segment, i in enumerate(members, start=1):
        single = alone(source, measured, i)
        length = int(measured.costs[i, 0])
        here = np.arange(start, start + length)
        assert (row["segment_ids"][here] == segment).all()
        for name in ("tokens", "positions"):
          np.testing.assert_array_equal(row[name][..., here], single[name][..., :length])
        for found, expected in zip(
          features(row, here), features(single, np.arange(length)), strict=True
        ):
          np.testing.assert_array_equal(found, expected)
        assert (row["image_index"][here] >= 0).sum() == (
          row["tokens"][here] == measured.prompt.special.image_pad
        ).sum()
        mine = row["example_index"] == i
        np.testing.assert_array_equal(
          row["marker_index"][mine], here[single["tokens"][:length] == measured.prompt.special.prm]
        )
        steps = row["step_index"][mine]
        np.testing.assert_array_equal(steps, np.arange(len(source[i].steps)))
        np.testing.assert_array_equal(row["marker_target"][mine], source[i].targets)
        np.testing.assert_array_equal(row["marker_weight"][mine], source[i].weights)
        start += length
        images += len(source[i].image_sizes)
        seen += 1
      assert not row["segment_ids"][start:].any() and (row["image_index"][start:] == -1).all()
      assert row["patch_segment"].max() == images
      assert not row["marker_weight"][row["example_index"] < 0].any()
  assert seen == 80  # two epochs


def test_images_and_windows_of_a_row_stay_apart(source, measured, plan):
  for batch in BatchIterator(measured, plan, rows_per_batch=4, prefetch=0):
    for b in range(4):
      segment, window = batch["patch_segment"][b], batch["patch_window"][b]
      assert ((segment > 0) == (window > 0)).all()
      assert not batch["patches"][b][segment == 0].any()
      block = np.arange(len(window)) // 64
      for number in range(1, window.max() + 1):
        members = window == number
        assert members.any()
        assert len(set(segment[members])) == 1 and len(set(block[members])) == 1


def test_processes_read_their_share_of_every_batch(source, measured, plan):
  whole = list(BatchIterator(measured, plan, rows_per_batch=4))
  assert len(whole) == len(BatchIterator(measured, plan, rows_per_batch=4))
  for count in (2, 4):
    shares = [
      BatchIterator(measured, plan, rows_per_batch=4, share=(p, count)) for p in range(count)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
      assert_equal(batch, {n: np.concatenate([part[n] for part in parts]) for n in batch})
  with pytest.raises(ValueError, match="4 rows per batch do not divide over 3 processes"):
    BatchIterator(measured, plan, rows_per_batch=4, share=(0, 3))


def test_last_batch_is_filled_with_empty_rows(source, measured, plan):
  rows = len(plan) - 1
  *_, last = BatchIterator(measured, plan, rows_per_batch=rows)
  empty = {name: array[1:] for name, array in last.items()}
  assert (last["example_index"][0] >= 0).any()
  assert all((empty[name] == -1).all() for name in ("image_index", "example_index", "step_index"))
  assert not any(
    empty[name].any()
    for name in empty
    if name not in ("image_index", "example_index", "step_index")
  )


def test_run_resumes_at_the_next_batch(source, measured, plan):
  """Also on another number of processes."""
  make = lambda **options: BatchIterator(  # noqa: E731
    measured, plan, rows_per_batch=4, **options
  )
  whole = list(make())
  iterator = make(prefetch=3)
  for _ in range(3):
    next(iterator)
  assert iterator.next_batch == 3
  resumed = make()
  resumed.seek(3)
  for expected, found in zip(whole[3:], resumed, strict=True):
    assert_equal(expected, found)
  half = make(share=(1, 2))
  half.seek(3)
  assert_equal({name: array[2:] for name, array in whole[3].items()}, next(half))
  with pytest.raises(IndexError, match="batch 999 of a run of"):
    half.seek(999)


def test_worker_process_gives_the_same_batches(source, measured, plan):
  flags.FLAGS.mark_as_parsed()  # Grain's workers read flags; a command's main has parsed them
  options = {"rows_per_batch": 6}
  expected = list(BatchIterator(measured, plan, **options))
  iterator = BatchIterator(measured, plan, workers=1, **options)
  iterator.seek(1)
  for left, right in zip(expected[1:], iterator, strict=True):
    assert_equal(left, right)
  iterator.close()


def test_scoring_reads_every_example_once_in_order_of_rows(source, measured):
  plan = pack.plan(measured.costs, ROW, shuffle=False)
  scores = [np.full(len(source[i].steps), -1.0) for i in range(len(source))]
  for batch in BatchIterator(measured, plan, rows_per_batch=4):
    used = batch["example_index"] >= 0
    for i, step, target in zip(
      batch["example_index"][used],
      batch["step_index"][used],
      batch["marker_target"][used],
      strict=True,
    ):
      assert scores[i][step] == -1.0
      scores[i][step] = target
  for i, found in enumerate(scores):
    np.testing.assert_allclose(found, source[i].targets)


def test_long_examples_lose_trailing_steps_with_their_labels(tiny_prompt):
  source = [example(4), example(9, images=())]
  measured = measure(source, tiny_prompt, IMAGES, max_length=150)
  assert measured.dropped_steps.min() > 0 and measured.costs[:, 2].min() > 0
  plan = pack.plan(measured.costs, ROW, shuffle=False)
  batch = next(BatchIterator(measured, plan, rows_per_batch=2))
  for i in range(2):
    kept = measured.costs[i, 2]
    found = batch["marker_target"][batch["example_index"] == i]
    np.testing.assert_array_equal(found, source[i].targets[:kept])


WRONG_SIZES = {"image_sizes": [(224, 224)]}


@pytest.mark.parametrize(
  "measured_change, read_change, message",
  [
    (
      WRONG_SIZES,
      WRONG_SIZES,
      r"example toy:1: .*text has \[64\] image tokens.*give \[16\] features",
    ),
    ({}, {"read_images": lambda: (b"\x89PNG\r\n",)}, r"example toy:1: broken image"),
    ({}, {"steps": ("a", "b", "c")}, r"example toy:1: .* 2 steps when measured, now .* 3"),
  ],
)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_name_the_example(tiny_prompt, measured_change, read_change, message, prefetch):
  """Its images have other sizes than it states, or are damaged later, or it gets another step."""
  one = example(1, images=(encoded_image(112, 112, 0),))
  source = [dataclasses.replace(one, **measured_change)] * 2
  measured = measure(source, tiny_prompt, IMAGES, max_length=320)
  source = [dataclasses.replace(one, **read_change)] * 2
  plan = pack.plan(measured.costs, ROW, shuffle=False)
  with pytest.raises(InputError, match=message):
    next(
      BatchIterator(
        dataclasses.replace(measured, examples=source), plan, rows_per_batch=1, prefetch=prefetch
      )
    )


@pytest.mark.parametrize(
  ("free", "used", "said"),
  [(10**12, 8, ""), (64 * 2**20, 2, "using 2 of them"), (10**6, 0, "using threads")],
)
def test_a_small_shared_memory_leaves_fewer_workers(
  measured, plan, monkeypatch, caplog, free, used, said
):
  """Grain's workers die with SIGBUS if /dev/shm is full; containers have 64 MB there."""
  usage = types.SimpleNamespace(free=free)
  monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: usage)
  iterator = BatchIterator(measured, plan, rows_per_batch=2, workers=8, prefetch=8)
  assert iterator._workers == used
  assert said in caplog.text and bool(said) == ("docker run --shm-size" in caplog.text)
