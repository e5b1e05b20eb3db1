"""InternVL's batches: every sample at its position, each image token with its own feature."""

import io

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from bis_jax.inputs import pack, pipeline
from bis_jax.models.internvl import prompt as internvl_prompt
from bis_jax.models.internvl.config import InternVLConfig, TextConfig, VisionConfig
from bis_jax.models.internvl.images import InternVLImages
from bis_jax.models.internvl.model import InternVL
from tests.in_memory import encode, in_memory


def _png(height, width, seed):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, "png")
  return out.getvalue()


def _example(name, sizes, steps):
  labels = np.arange(len(steps), dtype=np.float32) / max(1, len(steps))
  images = tuple(_png(*size, seed) for seed, size in enumerate(sizes))
  return in_memory(name, f"求 {name}?", tuple(steps), images, labels, np.ones_like(labels))


@pytest.fixture(scope="module")
def batch(shared):
  """One row of three examples: an image of 3 tiles, none, and two images of 1 and 4 tiles."""
  examples = [
    _example("a", [(400, 900)], ["one", "two"]),
    _example("b", [], ["only"]),
    _example("c", [(448, 448), (1400, 470)], ["x", "y", "z"]),
  ]
  tokenizer = internvl_prompt.load_tokenizer(str(shared / "data/tokenizers/internlm2_5"))
  prompt, images = internvl_prompt.InternVLPrompt(tokenizer), InternVLImages(6)
  measured = pipeline.measure(examples, prompt, images, max_length=4096)
  assert measured.costs[:, 1].tolist() == [3 * 1024, 0, 5 * 1024]
  plan = pack.plan(measured.costs, np.array([4096, 9 * 1024, 8]), shuffle=False)
  iterator = pipeline.BatchIterator(measured, plan, rows_per_batch=1, prefetch=0)
  return examples, prompt, images, next(iterator)


def test_a_row_holds_every_sample_with_its_own_tiles(batch):
  examples, prompt, images, row = batch
  row = {name: array[0] for name, array in row.items()}
  assert row["patches"].shape == (9 * 1024, 588) and row["positions"].shape == (4096,)
  token = patch = image_number = 0
  for segment in (1, 2, 3):  # in the order of the plan: found by its first marker's example
    marker = row["segment_ids"][row["marker_index"]] == segment
    marker &= row["marker_weight"] > 0
    [number] = set(row["example_index"][marker].tolist())
    example = examples[number]
    tiles = [images.patches(pipeline.decode(data)) for data in example.read_images()]
    counts = [image.image_tokens for image in tiles]
    sample = encode(prompt, example.question, example.steps, counts, max_length=4096)
    here = slice(token, token + len(sample.tokens))
    np.testing.assert_array_equal(row["tokens"][here], sample.tokens)
    assert (row["segment_ids"][here] == segment).all()
    np.testing.assert_array_equal(row["positions"][here], np.arange(len(sample.tokens)))
    np.testing.assert_array_equal(row["marker_index"][marker], token + sample.markers)
    np.testing.assert_array_equal(row["marker_target"][marker], example.targets)
    context = sample.tokens == prompt.special.image_pad
    assert (row["image_index"][here][~context] == -1).all()
    first = patch // 4  # four patches per image token
    np.testing.assert_array_equal(
      row["image_index"][here][context], first + np.arange(context.sum())
    )
    for image in tiles:
      image_number += 1
      used = slice(patch, patch + 1024 * len(image.pixels))
      values = np.zeros((1024 * len(image.pixels), 588), np.float32)
      image.write_values(values)
      np.testing.assert_array_equal(row["patches"][used], values)
      assert (row["patch_segment"][used] == image_number).all()
      patch = used.stop
    token = here.stop
  assert patch == 8 * 1024 and not row["patch_segment"][patch:].any()
  assert (row["segment_ids"][token:] == 0).all()


def test_a_model_with_the_released_tiles_reads_the_batch(batch):
  """448 px tiles through a narrow model: finite, and an image moves its own sample's logits alone."""
  config = InternVLConfig(
    text=TextConfig(92554, 16, 16, 1, 2, 1),
    vision=VisionConfig(1, 16, 16, 2),
  )
  model = InternVL(config, nnx.Rngs(0))
  row = {name: array for name, array in batch[3].items() if name != "example_index"}
  forward = jax.jit(lambda model, row: model(row))
  plain = np.asarray(forward(model, row))
  blank = row["patches"] * (row["patch_segment"] != 1)[:, :, None]
  changed = np.asarray(forward(model, row | {"patches": blank}))
  assert np.isfinite(plain).all()
  owner = np.take_along_axis(row["segment_ids"], row["marker_index"], axis=1)
  moved = (np.abs(plain - changed).max(axis=-1) > 1e-7) & (row["marker_weight"] > 0)
  first_image = int(row["segment_ids"][0][(row["image_index"][0] >= 0).argmax()])
  assert set(owner[moved].tolist()) == {first_image}
