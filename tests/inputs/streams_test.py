"""Rows with streams: the plan keeps groups together within every budget, and rows hold them whole."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from bis_jax.inputs import pack, pipeline
from bis_jax.models.internvl.images import InternVLImages
from bis_jax.models.qwen2_5_vl.images import QwenImages
from bis_jax.models.qwen3_vl.images import Qwen3Images
from tests import streams
from tests.in_memory import in_memory
from tests.inputs.pipeline_test import encoded_image

PROCESSORS = {
  "qwen": QwenImages(28 * 28, 112 * 112),
  "qwen3": Qwen3Images(32 * 32, 128 * 128),
  "internvl": InternVLImages(max_tiles=2, tile=56),
}
BUDGETS, STREAMS = np.array([100, 256, 16]), (3, 20)

rollouts = st.lists(  # (group, tokens of its prefix, own tokens, patch slots, markers)
  st.tuples(
    st.integers(0, 6),
    st.integers(0, 50),
    st.integers(1, 45),
    st.integers(0, 5).map(lambda n: 64 * n),
    st.integers(0, 9),
  ),
  min_size=1,
  max_size=60,
)


@settings(max_examples=300)
@given(rollouts=rollouts, seed=st.integers(0, 3), lookahead=st.integers(1, 20))
def test_groups_within_every_budget(rollouts, seed, lookahead):
  """Mutations caught: two samples of a group in one stream, patches counted per sample, streams too
  short for what goes into them."""
  group, prefix, own, patches, markers = np.array(rollouts).T
  _, first, group = np.unique(group, return_index=True, return_inverse=True)
  prefix, patches = prefix[first[group]], patches[first[group]]  # of a group, the same
  costs = np.stack([prefix + own, patches, markers], axis=1)
  fits = (costs <= [60, 256, 16]).all(axis=1) & (markers > 0)
  if not fits.any():
    return
  plan = pack.plan(
    costs, BUDGETS, STREAMS, prefixes=prefix, groups=group, seed=seed, lookahead=lookahead, epochs=2
  )
  assert sorted(plan.too_long) == np.flatnonzero(~fits).tolist()
  for seen in np.split(plan.examples, 2):
    assert sorted(seen) == np.flatnonzero(fits).tolist()
  for r in range(len(plan)):
    room, left, used = 40, [20, 20, 20], np.zeros(3, int)
    members, places = plan.row(r), plan.places_of(r)
    for number in range(places[-1, 2] + 1):
      mine = places[:, 2] == number
      examples, (split, *_), into = members[mine], places[mine, 0], places[mine, 1]
      assert (places[mine, 0] == split).all() and len(set(group[examples])) == 1
      assert len(examples) == 1 or (prefix[examples] == split).all()
      assert len(set(into)) == len(into) <= 3
      room -= split
      used += [0, patches[examples[0]], markers[examples].sum()]
      for example, stream in zip(examples, into, strict=True):
        rest = costs[example, 0] - split
        assert (rest > 0) == (stream >= 0)
        if stream >= 0:
          left[stream] -= rest
    assert min(room, *left) >= 0 and (used <= BUDGETS).all()
    assert (np.diff(places[:, 2], prepend=0) >= 0).all()
  assert -1e-9 <= min(plan.padding) and max(plan.padding) <= 1


def test_what_fits_is_shared():
  """Two groups of three in one row; one of five takes two prefixes."""
  costs = np.array([[30, 64, 1]] * 6)
  options = dict(shuffle=False, prefixes=np.full(6, 20))
  plan = pack.plan(costs, BUDGETS, STREAMS, groups=np.array([0, 1] * 3), **options)
  assert len(plan) == 1 and plan.places.tolist() == [
    [20, 0, 0], [20, 1, 0], [20, 2, 0], [20, 0, 1], [20, 1, 1], [20, 2, 1],
  ]  # fmt: skip
  assert plan.examples.tolist() == [0, 2, 4, 1, 3, 5]
  assert plan.padding.tolist() == [0, 0.5, 1 - 6 / 16]
  plan = pack.plan(costs[:5], BUDGETS, STREAMS, groups=np.zeros(5, int), **options | {
    "prefixes": np.full(5, 20)
  })  # fmt: skip
  assert plan.places[:, 2].tolist() == [0, 0, 0, 1, 1]


def test_one_sample_may_be_longer_than_both_parts():
  plan = pack.plan(
    np.array([[55, 64, 1]]), BUDGETS, STREAMS, prefixes=np.array([9]), groups=np.zeros(1, int)
  )
  assert plan.places.tolist() == [[37, 0, 0]] or 55 - plan.places[0, 0] <= 20  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_row_with_streams_holds_every_sample(name):
  """Tokens, positions, features and labels of each sample are those that it has alone.

  Mutations caught: positions that begin anew in a stream, features of the second group's image.
  """
  processor = PROCESSORS[name]
  drawn = streams.draw(0, processor, [3, 1, 5, 2, 4])
  plan = streams.plan_of(drawn, (256, 1024, 64), (3, 40))
  batch = streams.rows_of(processor, drawn, plan)
  single = streams.rows_of(processor, drawn, streams.alone(drawn, (256, 1024, 64)))
  seen, images = 0, 0
  for r in range(len(plan)):
    ends = [0, *(136 + 40 * k for k in range(3))]
    for i, (split, stream, group) in zip(plan.row(r), plan.places_of(r), strict=True):
      n = len(drawn[i].sample.tokens)
      here = batch["segment_ids"][r] == group + 1
      assert (batch["tokens"][r][here][:split] == drawn[i].sample.tokens[:split]).all()
      start = np.flatnonzero(here)[0] if split else 0
      where = start + np.arange(n)
      if stream >= 0:
        where[split:] = ends[stream + 1] + np.arange(n - split)
        ends[stream + 1] += n - split
      assert here[where].all()
      for key in ("tokens", "positions"):
        np.testing.assert_array_equal(batch[key][r][..., where], single[key][i][..., :n])
      taken, own = batch["image_index"][r][where], single["image_index"][i][:n]
      np.testing.assert_array_equal(taken >= 0, own >= 0)
      units = [
        b["patches"].reshape(len(b["patches"]), -1, 4, b["patches"].shape[-1])
        for b in (batch, single)
      ]
      np.testing.assert_array_equal(units[0][r][taken[taken >= 0]], units[1][i][own[own >= 0]])
      mine = batch["example_index"][r] == i
      assert (batch["marker_index"][r][mine] == where[drawn[i].sample.markers]).all()
      assert len(set(batch["marker_rollout"][r][mine])) == 1
      np.testing.assert_array_equal(batch["marker_target"][r][mine], drawn[i].targets)
      seen += 1
    np.testing.assert_array_equal(batch["stream_ids"][r].ravel(), batch["segment_ids"][r][136:])
    images += batch["patch_segment"][r].max()
  assert seen == len(drawn)
  assert images < sum(len(one.images) for one in drawn)


def test_a_sample_of_another_question_is_refused():
  drawn = streams.draw(0, PROCESSORS["qwen"], [2])
  plan = streams.plan_of(drawn, (256, 1024, 64), (3, 40))
  drawn[plan.examples[1]].sample.tokens[1] += 1
  with pytest.raises(ValueError, match="are not those of its group"):
    streams.rows_of(PROCESSORS["qwen"], drawn, plan)


@pytest.fixture(scope="module")
def measured(tiny_prompt):
  """Twelve solutions of four questions with images; the last question has two pictures, twice."""
  images, source = PROCESSORS["qwen"], []
  for i in range(12):
    question = i % 4
    steps = tuple(f"Step {j} of {i}: {i * j} circles." for j in range(1 + i % 3))
    pictures = tuple(encoded_image(56, 56, seed=question + k) for k in range(question))
    labels = np.arange(len(steps), dtype=np.float32) / 10 + i
    one = in_memory(f"toy:{i}", f"How many in {question}?", steps, pictures, labels, labels)
    source.append(dataclasses.replace(one, images_id=f"{question}" if i != 11 else "other"))
  return pipeline.measure(source, tiny_prompt, images, max_length=300, chunk=5)


def test_solutions_of_a_question_have_one_prefix(measured):
  """Without the steps, and with the whole question; other images are another group."""
  assert len(set(measured.groups)) == 5
  for i in range(12):
    same = np.flatnonzero(measured.groups == measured.groups[i])
    assert same.tolist() == ([11] if i == 11 else [j for j in range(i % 4, 11, 4)])
    counts = [4] * (i % 4)
    tokens = [measured.sample(measured.examples[int(j)], counts) for j in same]
    for sample in tokens:
      prefix = sample.tokens[: measured.prefixes[i]]
      assert sample.prefix == len(prefix) and (prefix == tokens[0].tokens[: len(prefix)]).all()
      assert len(prefix) < sample.markers[0]
      assert len(sample.tokens) - len(prefix) < 1 + 40 * len(sample.markers)


def test_batches_are_the_same_for_any_number_of_processes_and_resume(measured):
  layout = pack.Layout(np.array([400, 512, 64]), (2, 110))
  inputs = ConfigDict({"lookahead": 5})
  plan = measured.plan_rows(inputs, rows=layout, seed=1, epochs=2)
  assert set(plan.places[:, 1]) == {0, 1}
  whole = [*pipeline.BatchIterator(measured, plan, rows_per_batch=2, prefetch=0)]
  shares = [
    pipeline.BatchIterator(measured, plan, rows_per_batch=2, share=(p, 2), prefetch=0)
    for p in (0, 1)
  ]
  for batch, *parts in zip(whole, *shares, strict=True):
    for key, array in batch.items():
      np.testing.assert_array_equal(array, np.concatenate([part[key] for part in parts]))
  later = pipeline.BatchIterator(measured, plan, rows_per_batch=2, prefetch=0)
  later.seek(len(whole) - 1)
  for key, array in next(later).items():
    np.testing.assert_array_equal(array, whole[-1][key])
  seen = np.concatenate([batch["example_index"].ravel() for batch in whole])
  assert (np.bincount(seen[seen >= 0]) == 2 * measured.costs[:, 2]).all()


def test_images_of_a_group_are_read_once(measured):
  layout = pack.Layout(np.array([400, 512, 64]), (3, 90))
  plan = measured.plan_rows(ConfigDict({"lookahead": 5}), rows=layout, shuffle=False)
  read = []
  examples = [
    dataclasses.replace(one, read_images=lambda one=one: read.append(one.id) or one.read_images())
    for one in measured.examples
  ]
  again = dataclasses.replace(measured, examples=examples)
  [*pipeline.BatchIterator(again, plan, rows_per_batch=1, prefetch=0)]
  assert (
    len(read)
    == len(
      set(
        map(
          tuple,
          np.stack(
            [np.repeat(np.arange(len(plan)), np.diff(plan.offsets)), plan.places[:, 2]], axis=1
          ).tolist(),
        )
      )
    )
    < 12
  )
