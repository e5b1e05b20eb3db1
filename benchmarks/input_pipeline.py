"""Examples per CPU second through the input pipeline, beside Hugging Face's image processor alone.

  python benchmarks/input_pipeline.py --tokenizer=DIR

Draws examples of about 100 tokens of text with one image each and reads them all once, at several
image sizes. The last column is `Qwen2VLImageProcessorPil` on the same decoded images, which does
less: no text, positions, window order, packing or batching. Results: benchmarks/RESULTS.md.
"""

import copy
import functools
import io
import time

import numpy as np
from absl import app, flags
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.row_budget import balanced_row_patches
from bis_jax.images import decode
from bis_jax.inputs import pack
from bis_jax.inputs.pipeline import BatchIterator, Example, measure
from bis_jax.models.qwen2_5_vl import prompt
from bis_jax.models.qwen2_5_vl.images import QwenImages

_TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenizer folder", required=True)
_COUNTS = {112: 3000, 336: 400, 672: 100}  # image side in pixels -> examples

LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 1280 * 28 * 28}


def draw(side: int, count: int) -> list[Example]:
  """Returns examples with PNG images of coloured squares, side x side pixels."""
  rng = np.random.default_rng(0)
  examples = []
  for i in range(count):
    squares = rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(squares).resize((side, side), Image.Resampling.NEAREST).save(file, "PNG")
    steps = tuple(f"There are {j} red and {rng.integers(9)} blue squares here." for j in range(6))
    labels = np.ones(len(steps), np.float32)
    examples.append(
      Example(
        id=f"drawn:{i}",
        question="How many squares?",
        steps=steps,
        image_sizes=[(side, side)],
        read_images=functools.partial(copy.copy, (file.getvalue(),)),
        targets=labels,
        weights=labels,
      )
    )
  return examples


def main(argv: list[str]) -> None:
  """Prints the table."""
  del argv
  formatter = prompt.QwenPrompt(prompt.load_tokenizer(_TOKENIZER.value))
  images, processor = QwenImages(**LIMITS), Qwen2VLImageProcessorPil(**LIMITS)
  print("| image | examples a CPU second | images a CPU second, Hugging Face processor alone |")
  print("|---|---|---|")
  for side, count in _COUNTS.items():
    examples = draw(side, count)
    measured = measure(examples, formatter, images, max_length=1024)
    row_patches = balanced_row_patches(*measured.costs.T[:2], 2048)
    plan = pack.plan(measured.costs, np.array([2048, row_patches, 256]))
    iterator = BatchIterator(measured, plan, rows_per_batch=4, prefetch=0)
    start = time.process_time()
    for _ in iterator:
      pass
    ours = count / (time.process_time() - start)
    decoded = [decode(examples[i].read_images()[0]) for i in range(count)]
    start = time.process_time()
    for image in decoded:
      processor(images=[image])
    print(f"| {side} x {side} | {ours:.0f} | {count / (time.process_time() - start):.0f} |")


if __name__ == "__main__":
  app.run(main)
