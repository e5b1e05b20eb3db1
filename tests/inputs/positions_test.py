"""mRoPE positions equal Transformers' `get_rope_index`."""

import functools
import types

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from bis_jax.models.qwen2_5_vl import images


def reference(types_of_tokens, grids):
  """int[3, t] from Transformers for one sample; 1 marks image tokens."""
  model = types.SimpleNamespace(config=Qwen2_5_VLConfig())
  model.get_vision_position_ids = functools.partial(Qwen2_5_VLModel.get_vision_position_ids, model)
  kinds = torch.tensor([types_of_tokens], dtype=torch.int32)
  grid = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids]) if grids else None
  ids, _ = Qwen2_5_VLModel.get_rope_index(model, torch.zeros_like(kinds), kinds, grid)
  return ids[:, 0].numpy()


@settings(max_examples=100)
@given(
  parts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7)), max_size=4),
  tail=st.integers(1, 9),
)
def test_positions_equal_get_rope_index(parts, tail):
  """Text-only, one and several images of unequal size, any text between.

  Mutations caught: the wider side for the longer one, height and width swapped.
  """
  kinds, spans, grids = [], [], []
  for text, rows, columns in parts:
    kinds += [0] * text
    spans.append((len(kinds), rows * columns))
    grids.append((rows, columns))
    kinds += [1] * (rows * columns)
  kinds += [0] * tail
  found = images.mrope(len(kinds), np.array(spans).reshape(-1, 2), grids)
  np.testing.assert_array_equal(found, reference(kinds, grids))


def test_truncated_sample_has_the_positions_of_its_prefix():
  spans = np.array([(2, 6)])
  whole = images.mrope(20, spans, [(2, 3)])
  np.testing.assert_array_equal(images.mrope(12, spans, [(2, 3)]), whole[:, :12])
  assert whole.dtype == np.int32
  assert whole[:, 2:9].tolist() == [
    [2, 2, 2, 2, 2, 2, 5],
    [2, 2, 2, 3, 3, 3, 5],
    [2, 3, 4, 2, 3, 4, 5],
  ]
