"""The benchmark's GPU path, on shapes alone: its rows fit the step at 7B width."""

import jax
import numpy as np
import pytest

from benchmarks.train_step import draw, our_step, size_of
from bis_jax.inputs.rows import device_arrays


def test_the_step_at_7b_width_takes_the_rows_that_are_drawn():
  size = size_of("7b-layers=2")
  batch, rollouts = draw(size)
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
