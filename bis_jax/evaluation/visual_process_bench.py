"""Loads and checks a benchmark in VisualProcessBench's layout (arXiv:2503.10291).

A folder with the images in `images/` or `images.zip`, and with `test.jsonl`, one item per line:

    {"image": ["images/MMMU/12_1.png"], "question": "<image1> What ...?", "answer": "B",
     "response": {"steps": ["...", "..."], "process_correctness": [1, -1]},
     "policy_model": "GPT-4o", "data_source": "MMMU"}
"""

import contextlib
import dataclasses
import hashlib
import io
import os
from collections.abc import Sequence
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
from etils import epath
from PIL import Image

from bis_jax import files, images
from bis_jax.corpus.image_root import ImageRoot
from bis_jax.corpus.rejections import BadRecord
from bis_jax.evaluation import json_records
from bis_jax.evaluation.json_records import EvaluationError
from bis_jax.inputs.texts import has_placeholder, question_text

SOURCES = ("MMMU", "MathVision", "MathVerse_VO", "DynaMath", "WeMath")
ANNOTATIONS = "test.jsonl"
CANVAS_COLUMNS = 3
MODES = ("multi", "canvas", "first")  # what is shown of an item with several images

Label = Annotated[int, msgspec.Meta(ge=-1, le=1)]
Steps = Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
_T = TypeVar("_T")


class _Response(msgspec.Struct):
  steps: Steps
  process_correctness: tuple[Label, ...]


class _Record(msgspec.Struct):
  question: str
  response: _Response
  data_source: str
  image: tuple[str, ...] = ()  # none: an item of text alone
  policy_model: Any = "unknown"
  answer: Any = ""


class EncodedImage(Protocol):
  """An image whose encoded bytes are read on demand; its name says which one it is."""

  @property
  def name(self) -> str: ...

  def read(self) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class BenchmarkImage:
  """An image file under a root; nothing outside the root is ever read."""

  root: ImageRoot
  name: str

  def read(self) -> bytes:
    try:
      return self.root.read(self.name)
    except BadRecord as error:
      raise EvaluationError(f"image {self.name!r} of the benchmark: {error}") from error


@dataclasses.dataclass(frozen=True)
class ColumnImage:
  """An image stored in a column of a table; its name is the digest of its content."""

  name: str
  content: bytes = dataclasses.field(repr=False)

  def read(self) -> bytes:
    return self.content


@dataclasses.dataclass(frozen=True)
class BenchmarkItem:
  """One model-written solution with a human label per step."""

  index: int  # from 0
  question: str  # without image placeholders
  images: tuple[EncodedImage, ...]
  image_sizes: tuple[tuple[int, int], ...]  # (height, width) in pixels after EXIF rotation
  steps: tuple[str, ...]
  labels: tuple[int, ...]  # 1 correct, -1 erroneous, 0 neutral: left out of every metric
  data_source: str
  policy_model: str
  answer: str


def load(
  folder: str | os.PathLike, image_root: str | os.PathLike | None = None
) -> list[BenchmarkItem]:
  """Returns the checked items of `folder`/test.jsonl, in file order.

  `image_root` is a folder or a zip (default: `folder`/images, else images.zip there, else the
  folder itself); names may begin with `images/` or not. Raises an EvaluationError that lists every
  fault with its line and item.
  """
  annotations = epath.Path(folder) / ANNOTATIONS
  if not annotations.is_file():
    raise FileNotFoundError(
      f"no {ANNOTATIONS} in {folder}: give the folder that holds VisualProcessBench's "
      f"{ANNOTATIONS} and its images"
    )
  root = ImageRoot(image_root) if image_root else find_images(annotations.parent)
  lines = files.read_lines(annotations, EvaluationError)
  records = enumerate((number, line) for number, line in lines if line.strip())
  return json_records.parse_items(
    annotations,
    ((f"line {number} (item {index})", line) for index, (number, line) in records),
    lambda index, line: _parse(index, line, root),
  )


def find_images(folder: epath.Path) -> ImageRoot:
  """Returns `folder`/images, else images.zip there, else the folder itself."""
  places = [folder / "images", folder / "images.zip"]
  return ImageRoot(next((place for place in places if place.exists()), folder))


def check_images(items: Sequence[BenchmarkItem]) -> None:
  """Decodes every image, one at a time; raises EvaluationError that lists the damaged ones."""
  json_records.parse_items(
    "images of the benchmark",
    ((f"item {item.index}", item) for item in items),
    lambda _, item: [_size(image, whole=True) for image in item.images],
  )


def encoded_images(item: BenchmarkItem, mode: str = "multi") -> tuple[bytes, ...]:
  """Returns the encoded images that the model is shown; "canvas" makes one PNG of several."""
  encoded = [image.read() for image in _shown(item.images, mode)]
  return (canvas(encoded),) if _on_canvas(item, mode) else tuple(encoded)


def shown_sizes(item: BenchmarkItem, mode: str = "multi") -> list[tuple[int, int]]:
  """Returns the (height, width) of each image of `encoded_images`, without reading pixels."""
  sizes = _shown(item.image_sizes, mode)
  if not _on_canvas(item, mode):
    return list(sizes)
  columns, rows = _canvas_grid(len(sizes))
  return [(rows * max(height for height, _ in sizes), columns * max(width for _, width in sizes))]


def _shown(values: Sequence[_T], mode: str) -> Sequence[_T]:
  if mode not in MODES:
    raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
  return values[:1] if mode == "first" else values


def _on_canvas(item: BenchmarkItem, mode: str) -> bool:
  return mode == "canvas" and len(item.images) > 1


def canvas(encoded: Sequence[bytes]) -> bytes:
  """Returns a PNG of all images on one white canvas, as the released evaluation lays them out."""
  # At most three columns; cells have the largest width and height, each image is centred in its
  # own.
  decoded = [images.decode(data) for data in encoded]
  columns, rows = _canvas_grid(len(decoded))
  width, height = max(image.width for image in decoded), max(image.height for image in decoded)
  sheet = Image.new("RGB", (columns * width, rows * height), "white")
  for i, image in enumerate(decoded):
    left = (i % columns) * width + (width - image.width) // 2
    top = (i // columns) * height + (height - image.height) // 2
    sheet.paste(image, (left, top))
  png = io.BytesIO()
  sheet.save(png, "PNG")
  return png.getvalue()


def _canvas_grid(n: int) -> tuple[int, int]:
  columns = min(CANVAS_COLUMNS, n)
  return columns, -(-n // columns)


def _parse(index: int, line: bytes, root: ImageRoot) -> BenchmarkItem:
  try:
    value = files.parse_json(line)
  except ValueError as error:
    raise EvaluationError(f"not UTF-8 JSON: {error}") from error
  return parse_row(index, ("", value), root=root)


def parse_row(index: int, row: tuple[str, Any], *, root: ImageRoot) -> BenchmarkItem:
  """Returns the item of a (subset, record); an image may be a path below the root, or contents."""
  value = row[1]
  contents: dict[str, ColumnImage] = {}
  if isinstance(value, dict):  # a row of a table has images in its column, or its response as text
    value = value | {"image": _names(value.get("image"), contents)}
    if isinstance(value.get("response"), str):
      with contextlib.suppress(ValueError):
        value["response"] = files.parse_json(value["response"].encode())
  record = json_records.convert(value, _Record)
  steps, labels = record.response.steps, record.response.process_correctness
  if len(labels) != len(steps):
    raise EvaluationError(f"{len(steps)} steps but {len(labels)} labels")
  if not record.image and has_placeholder(record.question):
    raise EvaluationError("its question has an image placeholder, but it has no `image`")
  found = tuple(
    contents.get(name) or BenchmarkImage(root, root.locate(name)) for name in record.image
  )
  return BenchmarkItem(
    index=index,
    question=question_text(record.question),
    images=found,
    image_sizes=tuple(map(_size, found)),
    steps=steps,
    labels=labels,
    data_source=record.data_source,
    policy_model=str(record.policy_model),
    answer=str(record.answer),
  )


def _names(images: Any, contents: "dict[str, ColumnImage]") -> Any:
  """Returns images as names, and adds those of a column to `contents`."""
  names = []
  for image in images if isinstance(images, list) else [images] if images else []:
    if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
      column = ColumnImage(
        hashlib.blake2b(image["bytes"], digest_size=16).hexdigest(), image["bytes"]
      )
      contents[column.name], image = column, column.name
    names.append(image.get("path") if isinstance(image, dict) else image)
  return names if isinstance(images, list | dict | None) else images


def _size(image: EncodedImage, whole: bool = False) -> tuple[int, int]:
  try:
    return images.upright_size(image.read(), whole=whole)
  except images.ImageError as error:
    raise EvaluationError(f"image {image.name!r} can't be opened: {error}") from error
