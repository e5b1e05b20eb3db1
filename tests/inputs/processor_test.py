"""The whole path from text and files to arrays, against the Hugging Face processor."""

import functools
import types

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ProcessorMixin
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bis_jax.inputs import pack
from bis_jax.inputs.pipeline import BatchIterator, measure
from bis_jax.models.qwen2_5_vl.images import QwenImages
from tests.in_memory import in_memory

LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 400 * 28 * 28}


class ImageTextProcessor(Qwen2_5_VLProcessor):
  """Qwen2.5-VL's processor without its video half, which needs torchvision."""

  def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
    self.image_token = "<|image_pad|>"
    self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
    self.video_token = "<|video_pad|>"
    self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
    ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def processed(tokenizer, question, steps, pictures):
  """The processor's arrays for the joined text, cut after the last marker, and its positions."""
  processor = ImageTextProcessor(Qwen2VLImageProcessorPil(**LIMITS), tokenizer)
  process = "Process: " + "\n\n".join(step + "<prm>" for step in steps)
  content = [{"type": "image"}] * len(pictures) + [
    {"type": "text", "text": f"Question: {question}"}
  ]
  text = tokenizer.apply_chat_template(
    [{"role": "user", "content": content}, {"role": "assistant", "content": process}],
    tokenize=False,
  )
  out = processor(images=pictures or None, text=[text], return_tensors="pt")
  model = types.SimpleNamespace(config=Qwen2_5_VLConfig())
  model.get_vision_position_ids = functools.partial(Qwen2_5_VLModel.get_vision_position_ids, model)
  positions, _ = Qwen2_5_VLModel.get_rope_index(
    model, out["input_ids"], out["mm_token_type_ids"], out.get("image_grid_thw")
  )
  ids = out["input_ids"][0]
  length = int(torch.nonzero(ids == tokenizer.convert_tokens_to_ids("<prm>"))[-1]) + 1
  return ids[:length].numpy(), positions[:, 0, :length].numpy(), out.get("pixel_values")


SAMPLES = [
  ("Which is taller?", ["The left one.", "Final answer: left"], [(224, 364)]),
  (
    "Compare.",
    ["\\( 3 > 2 \\)\n\nso yes", "求面积。", "Final answer: yes"],
    [(336, 504), (100, 30)],
  ),
  ("Three?", ["One.", "Two."], [(448, 448), (560, 280), (31, 672)]),
  ("Only text?", ["Yes.", "Final answer: yes"], []),
]


@pytest.mark.parametrize("which", ["tiny", "qwen"])
def test_packed_row_equals_the_processor_sample_by_sample(request, tmp_path, which):
  """Ids, positions and pixels of every image token, for none, one and several images."""
  tokenizer = request.getfixturevalue(f"{which}_tokenizer")
  formatter = request.getfixturevalue(f"{which}_prompt")
  rng = np.random.default_rng(0)
  pictures = [
    [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    for _, _, sizes in SAMPLES
  ]
  examples = []
  for i, (question, steps, _) in enumerate(SAMPLES):
    files = []
    for picture in pictures[i]:
      picture.save(tmp_path / "image.png")
      files.append((tmp_path / "image.png").read_bytes())
    zeros = np.zeros(len(steps), np.float32)
    examples.append(in_memory(f"s:{i}", question, tuple(steps), tuple(files), zeros, zeros))
  source, limits = examples, QwenImages(**LIMITS)
  measured = measure(source, formatter, limits, max_length=4096)
  plan = pack.plan(measured.costs, np.array([4096, 8192, 16]), shuffle=False)
  batch = next(BatchIterator(measured, plan, rows_per_batch=1))
  for segment, i in enumerate(plan.row(0), start=1):
    here = batch["segment_ids"][0] == segment
    ids, positions, pixels = processed(tokenizer, *SAMPLES[i][:2], pictures[i])
    np.testing.assert_array_equal(batch["tokens"][0, here], ids)
    np.testing.assert_array_equal(batch["positions"][0][:, here], positions)
    units = batch["image_index"][0, here]
    units = units[units >= 0]
    found = batch["patches"][0].reshape(-1, 4, 1176)[units].reshape(-1, 1176)
    np.testing.assert_array_equal(found, pixels if pixels is not None else np.zeros((0, 1176)))
  assert len(plan) == 1
