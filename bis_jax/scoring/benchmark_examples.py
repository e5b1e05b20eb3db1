"""Benchmark items as examples of the input pipeline."""

import functools
import io
from collections.abc import Sequence

from PIL import Image

from bis_jax.evaluation.visual_process_bench import BenchmarkItem, encoded_images, shown_sizes
from bis_jax.inputs.pipeline import Example, unlabelled


def benchmark_examples(
  items: Sequence[BenchmarkItem], images: str, *, blank: bool = False
) -> list[Example]:
  """Returns the items to be scored; `images` is `config.evaluation.images`.

  `blank` replaces every image by a grey one, to measure how much of a score comes from the text.
  """
  examples = []
  for item in items:
    sizes = shown_sizes(item, images)
    read = (
      functools.partial(_grey_images, sizes)
      if blank
      else functools.partial(encoded_images, item, images)
    )
    names = repr([image.name for image in item.images])  # of one folder
    examples.append(unlabelled(f"item {item.index}", item.question, item.steps, sizes, read, names))
  return examples


def _grey_images(sizes: Sequence[tuple[int, int]]) -> list[bytes]:
  encoded = []
  for height, width in sizes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (128, 128, 128)).save(file, "PNG")
    encoded.append(file.getvalue())
  return encoded
