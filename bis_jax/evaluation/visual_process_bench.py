"""Loads and checks a benchmark in VisualProcessBench's layout; see the paper's arXiv:2503.10291.

A benchmark is a folder with `test.jsonl`, one item a line, and the images its items name, in
`images/` or in an `images.zip` that stays as it is:

    {"image": ["images/MMMU/12_1.png"], "question": "<image1> What ...?", "answer": "B",
     "response": {"steps": ["...", "..."], "process_correctness": [1, -1]},
     "policy_model": "GPT-4o", "data_source": "MMMU"}

Labels are 1 (correct), -1 (erroneous) and 0 (neutral, left out of every metric).
"""

import dataclasses
import io
import json
import pathlib
import re
from collections.abc import Sequence

from PIL import Image

from bis_jax.corpus.image_root import ImageRoot
from bis_jax.images import ImageError, decode, upright_size

SOURCES = ("MMMU", "MathVision", "MathVerse_VO", "DynaMath", "WeMath")
ANNOTATIONS = "test.jsonl"
CANVAS_COLUMNS = 3
MODES = ("multi", "canvas", "first")  # what is shown of an item with several images
_SHOWN_FAULTS = 20
_IMAGE_PLACEHOLDER = re.compile(r"<image\d*>")


@dataclasses.dataclass(frozen=True)
class BenchmarkImage:
  """An image file: its name under a root that nothing outside is ever read from."""

  root: ImageRoot
  name: str

  def read(self) -> bytes:
    """Returns the encoded bytes; raises `BadRecord` if they can't be read any more."""
    return self.root.read(self.name)


@dataclasses.dataclass(frozen=True)
class BenchmarkItem:
  """One model-written solution with a human label a step.

  `index` counts the benchmark's items from 0. `question` has no image placeholder and no outer
  blanks. `image_sizes` are (height, width) in pixels as the image is shown, EXIF rotation done.
  """

  index: int
  question: str
  images: tuple[BenchmarkImage, ...]
  image_sizes: tuple[tuple[int, int], ...]
  steps: tuple[str, ...]
  labels: tuple[int, ...]
  data_source: str
  policy_model: str
  answer: str


def load(folder: str, image_root: str | None = None) -> list[BenchmarkItem]:
  """Returns the items of `folder`/test.jsonl, in file order, every one of them checked.

  `image_root` is a folder or a zip (default: `folder`/images, else images.zip there, else the
  folder itself); names may begin with `images/` or not. A file outside it is never opened, whether
  reached by an absolute path, by `..` or by a link. Raises FileNotFoundError when there is no
  test.jsonl or no image root, and ValueError that lists each fault with its line and item.
  """
  annotations = pathlib.Path(folder) / ANNOTATIONS
  if not annotations.is_file():
    raise FileNotFoundError(
      f"no {ANNOTATIONS} in {folder}: give the folder that holds VisualProcessBench's "
      f"{ANNOTATIONS} and its images"
    )
  places = [annotations.with_name("images"), annotations.with_name("images.zip")]
  root = ImageRoot(image_root or next((p for p in places if p.exists()), annotations.parent))
  items, faults = [], []
  lines = annotations.read_bytes().split(b"\n")
  for line_number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    index = len(items) + len(faults)
    try:
      items.append(_parse(line, index, root))
    except ValueError as error:
      faults.append(f"line {line_number} (item {index}): {error}")
  if faults:
    raise ValueError(listed(annotations, faults))
  if not items:
    raise ValueError(f"{annotations} holds no item: it is empty or has only blank lines")
  return items


def without_placeholders(question: str) -> str:
  """Returns the question without `<image>`, `<image1>`, ... and without outer blanks."""
  return _IMAGE_PLACEHOLDER.sub("", question).strip()


def listed(where: object, faults: list[str]) -> str:
  """Returns the message about a benchmark's bad items: how many, and the first twenty."""
  shown = "\n  ".join(faults[:_SHOWN_FAULTS])
  more = f"\n  ... and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
  return f"{where}: {len(faults)} bad items; correct them:\n  {shown}{more}"


def encoded_images(item: BenchmarkItem, multi_image: str = "multi") -> tuple[bytes, ...]:
  """Returns the encoded images the model is shown for `item`.

  `multi_image` says what becomes of an item's images: "multi" gives each file as it is,
  "first" only the first file, "canvas" one PNG with all of them side by side (`canvas`); an item
  with one image is that file in every mode. Raises ValueError on another mode.
  """
  _check_mode(multi_image)
  if multi_image == "canvas" and len(item.images) > 1:
    return (canvas([image.read() for image in item.images]),)
  kept = item.images[:1] if multi_image == "first" else item.images
  return tuple(image.read() for image in kept)


def shown_sizes(item: BenchmarkItem, multi_image: str = "multi") -> list[tuple[int, int]]:
  """Returns the (height, width) of each image of `encoded_images`, without reading pixels."""
  _check_mode(multi_image)
  if multi_image == "canvas" and len(item.images) > 1:
    columns, rows = _canvas_grid(len(item.images))
    heights, widths = zip(*item.image_sizes, strict=True)
    return [(rows * max(heights), columns * max(widths))]
  return list(item.image_sizes[:1] if multi_image == "first" else item.image_sizes)


def canvas(encoded: Sequence[bytes]) -> bytes:
  """Returns a PNG of all images on one white canvas, as the released evaluation lays them out.

  At most three columns; every cell has the largest width and the largest height; each image is
  pasted in the middle of its cell at its own size, row by row. Raises `ImageError` on broken files.
  """
  images = [decode(data) for data in encoded]
  columns, rows = _canvas_grid(len(images))
  width, height = max(image.width for image in images), max(image.height for image in images)
  sheet = Image.new("RGB", (columns * width, rows * height), "white")
  for i, image in enumerate(images):
    left = (i % columns) * width + (width - image.width) // 2
    top = (i // columns) * height + (height - image.height) // 2
    sheet.paste(image, (left, top))
  png = io.BytesIO()
  sheet.save(png, "PNG")
  return png.getvalue()


def _canvas_grid(n: int) -> tuple[int, int]:
  columns = min(CANVAS_COLUMNS, n)
  return columns, -(-n // columns)


def _check_mode(multi_image: str) -> None:
  if multi_image not in MODES:
    raise ValueError(f"multi_image is {multi_image!r}; it must be one of {', '.join(MODES)}")


def _parse(line: bytes, index: int, root: ImageRoot) -> BenchmarkItem:
  """Returns the checked item of one line; raises ValueError with the first fault found."""
  try:
    record = json.loads(line)
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ValueError(f"not UTF-8 JSON: {error}") from error
  if not isinstance(record, dict):
    raise ValueError(f"a JSON object is wanted, found {type(record).__name__}")
  response = record.get("response")
  if not isinstance(response, dict):
    raise ValueError("`response` must be an object with `steps` and `process_correctness`")
  steps, labels = _steps_and_labels(response)
  names = record.get("image")
  if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
    raise ValueError(f"`image` must be a list of at least one path, found {names!r}")
  images = tuple(BenchmarkImage(root, root.locate(name)) for name in names)
  for key in ("question", "data_source"):
    if not isinstance(record.get(key), str):
      raise ValueError(f"`{key}` must be a string, found {record.get(key)!r}")
  return BenchmarkItem(
    index=index,
    question=without_placeholders(record["question"]),
    images=images,
    image_sizes=tuple(_image_size(image) for image in images),
    steps=steps,
    labels=labels,
    data_source=record["data_source"],
    policy_model=str(record.get("policy_model", "unknown")),
    answer=str(record.get("answer", "")),
  )


def _steps_and_labels(response: dict) -> tuple[tuple[str, ...], tuple[int, ...]]:
  steps, labels = response.get("steps"), response.get("process_correctness")
  if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
    raise ValueError("`response.steps` must be a list of at least one string")
  if not isinstance(labels, list):
    raise ValueError("`response.process_correctness` must be a list")
  if len(labels) != len(steps):
    raise ValueError(f"{len(steps)} steps but {len(labels)} labels")
  for i, label in enumerate(labels):
    if type(label) is not int or label not in (-1, 0, 1):
      raise ValueError(f"label of step {i} is {label!r}; it must be 1, 0 or -1")
  return tuple(steps), tuple(labels)


def _image_size(image: BenchmarkImage) -> tuple[int, int]:
  """Returns (height, width) as shown; decodes the image, so that a damaged one is found now."""
  try:
    return upright_size(image.read(), whole=True)
  except ImageError as error:
    raise ValueError(f"image {image.name!r} can't be opened: {error}") from error
