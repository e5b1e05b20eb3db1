"""A tiny random Qwen2.5-VL in torch and in ours, and samples that both can read.

The assembler here is written from Transformers' own window function and knows nothing of
`bis_jax.inputs`, so that a mistake there cannot hide one in the model.
"""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen2_5_VLConfig as TorchConfig
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_window_index

from bis_jax.hub import weights
from bis_jax.models import param_tree
from bis_jax.models.attention import attention
from bis_jax.models.decoder import DecoderLayer
from bis_jax.models.qwen2_5_vl.config import SIZES as QWEN_SIZES
from bis_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from bis_jax.models.qwen2_5_vl.model import Qwen2_5_VL

VOCAB, YES, NO, MARKER, IMAGE_PAD, VISION_START, VISION_END = 512, 11, 12, 505, 500, 501, 502
IDS = {
  "image_token_id": IMAGE_PAD,
  "video_token_id": 503,
  "vision_start_token_id": VISION_START,
  "vision_end_token_id": VISION_END,
}


@dataclasses.dataclass
class Sample:
  """One sample as Transformers takes it: ids [t], markers [m], images in the processor's order."""

  ids: np.ndarray
  markers: np.ndarray
  grids: np.ndarray  # int[images, 3]
  pixels: np.ndarray  # float32[patches, 1176]

  def torch_inputs(self) -> dict:
    ids = torch.tensor(self.ids, dtype=torch.long)[None]
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE_PAD).int()}
    if len(self.grids):
      inputs["image_grid_thw"] = torch.tensor(self.grids)
      inputs["pixel_values"] = torch.tensor(self.pixels)
    return inputs


def _draw(seed: int, sizes: tuple[tuple[int, int], ...], words: int = 24) -> Sample:
  """A random sample with an image of each (height, width) in px and `words` tokens of text."""
  rng = np.random.default_rng(seed)
  grids = np.array([(1, h // 14, w // 14) for h, w in sizes], int).reshape(-1, 3)
  ids = []
  for grid in grids:
    ids += [VISION_START, *[IMAGE_PAD] * (grid.prod() // 4), VISION_END]
    ids += rng.integers(20, 490, 3).tolist()  # images are not neighbours
  text = rng.integers(20, 490, words)
  text[5::6] = MARKER
  ids = np.array([*ids, *text])
  pixels = rng.normal(size=(grids.prod(axis=1).sum(), 1176)).astype(np.float32)
  return Sample(ids, np.flatnonzero(ids == MARKER), grids, pixels)


def _layout(grids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Slot and window of every patch in Transformers' window order, and that order's patch index.

  Windows are laid into blocks of 64 slots one after the other.
  """
  unit_order, bounds = get_vision_window_index(torch.tensor(grids), 2, 112, 14)
  patch_order = (unit_order.numpy()[:, None] * 4 + np.arange(4)).reshape(-1)
  slots, windows, used = [], [], 0
  for number, size in enumerate(np.diff(bounds.numpy()), start=1):
    if used % 64 + size > 64:
      used += -used % 64
    slots.append(used + np.arange(size))
    windows.append(np.full(size, number))
    used += size
  return np.concatenate(slots), np.concatenate(windows), patch_order


def _assemble(torch_model, rows: list[list[Sample]], t: int, p: int, r: int) -> dict:
  """Packs samples into rows by the batch layout that `Qwen2_5_VL.__call__` documents."""
  b = len(rows)
  batch = {
    "tokens": np.zeros((b, t), np.int32),
    "segment_ids": np.zeros((b, t), np.int32),
    "positions": np.zeros((b, 3, t), np.int32),
    "patches": np.zeros((b, p, 1176), np.float32),
    "patch_position": np.zeros((b, p, 2), np.int32),
    "patch_window": np.zeros((b, p), np.int32),
    "patch_segment": np.zeros((b, p), np.int32),
    "image_index": np.full((b, t), -1, np.int32),
    "marker_index": np.zeros((b, r), np.int32),
  }
  for row, samples in enumerate(rows):
    token, marker, slot, image, window = 0, 0, 0, 0, 0
    for segment, sample in enumerate(samples, start=1):
      span = slice(token, token + len(sample.ids))
      batch["tokens"][row, span] = sample.ids
      batch["segment_ids"][row, span] = segment
      batch["positions"][row, :, span] = _positions(torch_model, sample)
      at = slice(marker, marker + len(sample.markers))
      batch["marker_index"][row, at] = token + sample.markers
      if len(sample.grids):
        slots, windows, order = _layout(sample.grids)
        slots = slots + slot
        batch["patches"][row, slots] = sample.pixels[order]
        batch["patch_window"][row, slots] = windows + window
        owner = np.repeat(np.arange(len(sample.grids)), sample.grids.prod(axis=1))
        batch["patch_segment"][row, slots] = owner[order] + image + 1
        batch["patch_position"][row, slots] = _patch_positions(sample.grids)[order]
        units = np.empty(len(order) // 4, int)  # in reading order
        units[order[::4] // 4] = slots[::4] // 4
        batch["image_index"][row, token + np.flatnonzero(sample.ids == IMAGE_PAD)] = units
        slot = slots.max() + 1 + -(slots.max() + 1) % 64
        window, image = window + windows.max(), image + len(sample.grids)
      token, marker = span.stop, at.stop
  return batch


def _positions(torch_model, sample: Sample) -> np.ndarray:
  if not len(sample.grids):
    return np.broadcast_to(np.arange(len(sample.ids)), (3, len(sample.ids)))
  inputs = sample.torch_inputs()
  inputs.pop("pixel_values")
  return torch_model.model.get_rope_index(**inputs)[0][:, 0].numpy()


def _patch_positions(grids: np.ndarray) -> np.ndarray:
  """(row, column) of every patch in the processor's order: merge units of 2 x 2 patches."""
  parts = []
  for _, h, w in grids:
    row_column = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), axis=-1)
    parts.append(row_column.reshape(h // 2, 2, w // 2, 2, 2).swapaxes(1, 2).reshape(-1, 2))
  return np.concatenate(parts)


def layer_output(
  layer: DecoderLayer, x: jax.Array, rope: tuple[jax.Array, jax.Array], segment: jax.Array
) -> jax.Array:
  """A decoder layer's output for rows without streams."""
  return layer(x, rope, lambda *qkv: attention(*qkv, segment, causal=True))


def _relative_error(ours, reference) -> float:
  """||ours - reference|| / ||reference||, in float64."""
  ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
  return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


def _shapes(config: Qwen2_5_VLConfig, sharding=None) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of every parameter by path, all on one device unless `sharding` says otherwise."""
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  _, shapes = param_tree.split(nnx.eval_shape(lambda: Qwen2_5_VL(config, nnx.Rngs(0))))
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)


def _model(config: Qwen2_5_VLConfig, params: dict[str, jax.Array]) -> Qwen2_5_VL:
  graph, _ = param_tree.split(nnx.eval_shape(lambda: Qwen2_5_VL(config, nnx.Rngs(0))))
  return param_tree.merge(graph, params)


@pytest.fixture(scope="session")
def lab() -> types.SimpleNamespace:
  """The functions above, for tests that cannot import them."""
  return types.SimpleNamespace(
    assemble=_assemble,
    draw=_draw,
    forward=jax.jit(lambda model, batch: model(batch)),
    layout=_layout,
    model=_model,
    relative_error=_relative_error,
    row=(256, 1024, 8),  # tokens, patch slots and markers: one shape, compiled once
    shapes=_shapes,
    ids=IDS,
    yes=YES,
    no=NO,
    marker=MARKER,
    image_pad=IMAGE_PAD,
  )


@pytest.fixture(scope="session")
def config() -> Qwen2_5_VLConfig:
  return QWEN_SIZES["tiny"].with_vocabulary(VOCAB)


@pytest.fixture(scope="session")
def torch_model(config) -> Qwen2_5_VLForConditionalGeneration:
  """The reference, float32, with weights large enough that every mask and angle shows."""
  torch.manual_seed(0)
  torch_config = TorchConfig(**config.to_hugging_face(), **IDS)
  torch_config._attn_implementation = "eager"
  model = Qwen2_5_VLForConditionalGeneration(torch_config).eval()
  for name, parameter in model.named_parameters():
    fan_in = parameter[0].numel()
    spread = {1: 0.1}.get(parameter.ndim, 1.0 if "embed_tokens" in name else fan_in**-0.5)
    torch.nn.init.normal_(parameter, mean=float("norm" in name or "ln_q" in name), std=spread)
  return model


@pytest.fixture(scope="session")
def folder(torch_model, tmp_path_factory):
  """The reference as Transformers saves it, in several files with an index."""
  path = tmp_path_factory.mktemp("checkpoint")
  torch_model.save_pretrained(path, max_shard_size="200KB")
  assert "weight_map" in json.loads((path / "model.safetensors.index.json").read_text())
  return path


@pytest.fixture(scope="session")
def params(folder, config) -> dict[str, jax.Array]:
  """The reference's weights in our parameters, through our own loader."""
  return weights.load(
    folder, config, _shapes(config), yes_token=YES, no_token=NO, marker_token=None
  )


@pytest.fixture(scope="session")
def model(config, params) -> Qwen2_5_VL:
  return _model(config, params)
