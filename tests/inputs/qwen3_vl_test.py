"""Qwen3-VL's pixels, grids, positions and tokens equal those of Transformers' processor."""

import functools
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.vision_utils import get_vision_position_ids

from bis_jax.inputs import pack
from bis_jax.inputs.pipeline import BatchIterator, measure
from bis_jax.models.qwen2_5_vl.prompt import QwenPrompt
from bis_jax.models.qwen3_vl.images import PATCH_VALUES, UNIT, Qwen3Images
from bis_jax.models.qwen3_vl.record import QWEN3_VL
from tests.in_memory import in_memory

LIMITS = {"min_pixels": 64 * 32 * 32, "max_pixels": 400 * 32 * 32}
# The turns of the released template: unlike Qwen2.5-VL's it has no system prompt of its own.
TEMPLATE = (
  "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
  "{%- if message.content is string %}{{- message.content }}{%- else %}"
  "{%- for part in message.content %}{%- if part.type == 'image' %}"
  "<|vision_start|><|image_pad|><|vision_end|>{%- elif 'text' in part %}{{- part.text }}"
  "{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
)


def picture(height, width, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
  return Image.fromarray(pixels)


def processor(limits):
  """With the values in preprocessor_config.json of the release."""
  return Qwen2VLImageProcessorPil(
    size={"shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]},
    patch_size=16,
    image_mean=[0.5] * 3,
    image_std=[0.5] * 3,
  )


@pytest.mark.parametrize(
  ("height", "width"),
  [(224, 224), (333, 451), (30, 700), (700, 30), (28, 28), (700, 1300), (5, 4000), (640, 640)],
)
def test_values_and_grid_equal_the_hugging_face_processor(height, width):
  image = picture(height, width)
  images = Qwen3Images(**LIMITS)
  patches = images.patches(image)
  if max(height, width) > 200 * min(height, width):  # refused there, squeezed here
    image = picture(height, 200 * height) if width > height else picture(200 * width, width)
  reference = processor(LIMITS)(images=[image])
  rows, columns = patches.grid
  assert reference["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
  assert images.cost(height, width) == (rows * columns, 4 * rows * columns)
  if image.size == (width, height):
    values = np.zeros((4 * patches.image_tokens, PATCH_VALUES), np.float32)
    patches.write_values(values)
    np.testing.assert_array_equal(values, reference["pixel_values"])


@settings(max_examples=60)
@given(rows=st.integers(1, 26), columns=st.integers(1, 26), before=st.integers(0, 3))
def test_slots_have_transformers_order(rows, columns, before):
  """Mutation caught: (column, row) for (row, column)."""
  images = Qwen3Images(UNIT**2, 26**2 * UNIT**2)
  patches = images.patches(Image.new("RGB", (columns * UNIT, rows * UNIT)))
  row = {name: array[0] for name, array in images.empty(1, 8, 4 * rows * columns + 16).items()}
  row["patch_segment"] = np.zeros(len(row["patches"]), np.int32)
  end, features = patches.add_to(row, 4 * before, 7)
  here = slice(4 * before, end)
  reference = get_vision_position_ids(torch.tensor([[1, 2 * rows, 2 * columns]]), 2)
  np.testing.assert_array_equal(row["patch_position"][here], reference.numpy())
  assert (row["patch_grid"][here] == [2 * rows, 2 * columns]).all()
  assert features.tolist() == [*range(before, before + rows * columns)]
  used = row["patch_segment"] > 0
  assert used[here].all() and used.sum() == 4 * rows * columns


class ImageTextProcessor(Qwen3VLProcessor):
  """Qwen3-VL's processor without its video half, which needs torchvision."""

  def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
    self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
    self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
    self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
    ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def processed(tokenizer, question, steps, pictures):
  """The processor's arrays for the joined text, cut after the last marker, and its positions."""
  process = "Process: " + "\n\n".join(step + "<prm>" for step in steps)
  content = [{"type": "image"}] * len(pictures) + [
    {"type": "text", "text": f"Question: {question}"}
  ]
  messages = [{"role": "user", "content": content}, {"role": "assistant", "content": process}]
  text = tokenizer.apply_chat_template(messages, tokenize=False)
  assert text.startswith("<|im_start|>user\n")
  both = ImageTextProcessor(processor(LIMITS), tokenizer)
  out = both(images=pictures or None, text=[text], return_tensors="pt")
  model = types.SimpleNamespace(config=Qwen3VLConfig())
  model.get_vision_position_ids = functools.partial(Qwen3VLModel.get_vision_position_ids, model)
  positions, _ = Qwen3VLModel.get_rope_index(
    model, out["input_ids"], out["mm_token_type_ids"], out.get("image_grid_thw")
  )
  ids = out["input_ids"][0]
  length = int(torch.nonzero(ids == tokenizer.convert_tokens_to_ids("<prm>"))[-1]) + 1
  return ids[:length].numpy(), positions[:, 0, :length].numpy(), out.get("pixel_values")


SAMPLES = [
  ("Which is taller?", ["The left one.", "Final answer: left"], [(224, 364)]),
  ("Compare.", ["\\( 3 > 2 \\)\n\nso yes", "求面积。"], [(336, 504), (100, 30)]),
  ("Three?", ["One.", "Two."], [(448, 448), (560, 280), (31, 672)]),
  ("Only text?", ["Yes.", "Final answer: yes"], []),
]


@pytest.mark.parametrize("which", ["tiny", "qwen"])
def test_packed_row_equals_the_processor_sample_by_sample(request, tmp_path, which):
  """Ids, positions and pixels of every image token, for none, one and several images.

  The tokenizer of Qwen3-VL is that of Qwen2.5-VL with four more special tokens.
  """
  folder = request.getfixturevalue(f"{which}_tokenizer").name_or_path
  tokenizer = QWEN3_VL.load_tokenizer(folder)
  tokenizer.chat_template = TEMPLATE
  rng = np.random.default_rng(0)
  pictures, examples = [], []
  for i, (question, steps, sizes) in enumerate(SAMPLES):
    pictures.append([picture(*size, seed=int(rng.integers(99))) for size in sizes])
    files = []
    for one in pictures[i]:
      one.save(tmp_path / "image.png")
      files.append((tmp_path / "image.png").read_bytes())
    zeros = np.zeros(len(steps), np.float32)
    examples.append(in_memory(f"s:{i}", question, tuple(steps), tuple(files), zeros, zeros))
  measured = measure(examples, QwenPrompt(tokenizer), Qwen3Images(**LIMITS), max_length=4096)
  plan = pack.plan(measured.costs, np.array([4096, 8192, 16]), shuffle=False)
  batch = next(BatchIterator(measured, plan, rows_per_batch=1))
  for segment, i in enumerate(plan.row(0), start=1):
    here = batch["segment_ids"][0] == segment
    ids, positions, pixels = processed(tokenizer, *SAMPLES[i][:2], pictures[i])
    np.testing.assert_array_equal(batch["tokens"][0, here], ids)
    np.testing.assert_array_equal(batch["positions"][0][:, here], positions)
    units = batch["image_index"][0, here]
    units = units[units >= 0]
    found = batch["patches"][0].reshape(-1, 4, PATCH_VALUES)[units].reshape(-1, PATCH_VALUES)
    wanted = np.zeros((0, PATCH_VALUES)) if pixels is None else pixels
    np.testing.assert_array_equal(found, wanted)
  assert len(plan) == 1
