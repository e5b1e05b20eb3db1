"""The benchmark's GPU path, on shapes alone: its rows fit the step at 7B width."""

import jax
import numpy as np
import pytest

from benchmarks.train_step import MARKER, _collate_packed, draw, our_step, size_of
from bis_jax.inputs.rows import device_arrays


@pytest.fixture(scope="module")
def drawn():
  size = size_of("7b-layers=2")
  return size, *draw(size)


def test_torch_gets_the_same_rows(drawn):
  """Tokens, mRoPE positions and markers; samples start where our segments do."""
  size, batch, rollouts = drawn
  for row in range(size.rows):
    own = [rollout for rollout in rollouts if rollout["row"] == row]
    inputs, (_, markers), _, starts = _collate_packed(own, size.row_tokens, "cpu")
    tokens, segments = inputs["input_ids"][0].numpy(), batch["segment_ids"][row]
    np.testing.assert_array_equal(tokens, batch["tokens"][row])
    used = segments > 0
    positions = inputs["position_ids"][:, 0].numpy()
    np.testing.assert_array_equal(positions[:, used], batch["positions"][row][:, used])
    assert (tokens[markers.numpy()] == MARKER).all()
    changes = 1 + np.flatnonzero(np.diff(segments))
    assert np.unique(starts).tolist() == [0, *changes, size.row_tokens]


def test_the_step_at_7b_width_takes_the_rows_that_are_drawn(drawn):
  size, batch, rollouts = drawn
  assert sum(len(r["tokens"]) for r in rollouts) == np.count_nonzero(batch["segment_ids"])
  assert sum(len(r["markers"]) for r in rollouts) == batch["marker_weight"].sum()
  ours = our_step(size)
  rows = {
    key: jax.ShapeDtypeStruct(
      (size.micro_batches, size.rows // size.micro_batches, *array.shape[1:]), array.dtype
    )
    for key, array in device_arrays(batch).items()
  }
  with jax.set_mesh(ours.step.mesh):
    after, metrics = jax.eval_shape(ours.step.jitted, ours.state, ours.frozen, rows)
  embedding = after.params["language_model.embed_tokens.embedding"]
  assert (embedding.shape, embedding.dtype) == ((152_064, 3584), np.float32)
  assert metrics["loss"].shape == ()


def test_a_size_that_there_is_not():
  with pytest.raises(ValueError, match="7b-layers=N"):
    size_of("7b")
