"""Images: decoding, Qwen's resize rule, and patches in the order the vision tower reads them.

Layout. A patch is 14 x 14 pixels; 2 x 2 patches make a merge unit, which becomes one image token;
4 x 4 units (112 x 112 pixels, 64 patches) make an attention window, smaller at the right and lower
edges. The tower sees patches in blocks of 64 slots. A window never straddles two blocks, small
windows share one, and slots left over are zero:

    6 x 6 units, windows of 16, 8, 8 and 4 units:
    block 0  [window 1: 16 units]                         image tokens  0..3, 6..9, 12..15, 18..21
    block 1  [window 2: 8 units][window 3: 8 units]       image tokens  4, 5, 10, 11, ... 24..27 ...
    block 2  [window 4: 4 units][12 units empty]          image tokens  28, 29, 34, 35

Sources: Transformers `models/qwen2_vl/image_processing_pil_qwen2_vl.py` (resize, values, patches)
and `vision_utils.get_vision_window_index` (windows).
"""

import functools
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
  Qwen2VLImageProcessorPil,
  smart_resize,
)

PATCH = 14  # pixels along a side
MERGE = 2  # patches along a side of a merge unit
UNIT = PATCH * MERGE  # pixels along a side of a merge unit: one image token
UNIT_PATCHES = MERGE * MERGE
WINDOW = 4  # merge units along a side of an attention window
BLOCK = WINDOW * WINDOW * UNIT_PATCHES  # patch slots of a block: 64
PATCH_VALUES = 3 * 2 * PATCH * PATCH  # channels x frames x pixels: 1176; a still image fills both

MAX_ASPECT = 200  # Transformers refuses longer images; here they are squeezed to this
MAX_DECODED_PIXELS = 100_000_000  # of the stored image; larger is taken for a decompression bomb


class ImageError(ValueError):
  """An image that cannot be used; `reason` is "bomb" or "broken"."""

  def __init__(self, reason: str, detail: str):
    super().__init__(f"{reason} image: {detail}")
    self.reason = reason


def decode(data: bytes) -> Image.Image:
  """Returns an encoded image as a person sees it: upright RGB, the first frame, on white.

  Raises:
    ImageError: "bomb" if the header announces more than `MAX_DECODED_PIXELS` (nothing is decoded
      then), "broken" if the bytes are no image or are cut short.
  """
  try:
    with Image.open(io.BytesIO(data)) as image:
      _refuse_bomb(image)
      image.load()
      return _on_white(ImageOps.exif_transpose(image))
  except ImageError:
    raise
  except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
    raise ImageError("broken", str(error) or type(error).__name__) from error


def stored_size(data: bytes) -> tuple[int, int]:
  """Returns (height, width) of an encoded image after EXIF rotation, without decoding pixels.

  Raises:
    ImageError: as `decode`, as far as the header can tell.
  """
  try:
    with Image.open(io.BytesIO(data)) as image:
      _refuse_bomb(image)
      rotated = image.getexif().get(0x0112, 1) >= 5
  except ImageError:
    raise
  except Exception as error:
    raise ImageError("broken", str(error) or type(error).__name__) from error
  return (image.width, image.height) if rotated else (image.height, image.width)


def _refuse_bomb(image: Image.Image) -> None:
  if image.width * image.height > MAX_DECODED_PIXELS:
    raise ImageError(
      "bomb", f"{image.width} x {image.height} pixels, more than {MAX_DECODED_PIXELS:,}"
    )


def _on_white(image: Image.Image) -> Image.Image:
  """Returns the image in RGB, transparency over white, 16-bit grey scaled to 8 bits."""
  if image.mode.startswith("I"):
    return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
  if "A" not in image.getbands() and "transparency" not in image.info:
    return image.convert("RGB")
  image = image.convert("RGBA")
  white = Image.new("RGBA", image.size, (255, 255, 255, 255))
  return Image.alpha_composite(white, image).convert("RGB")


@dataclass(frozen=True)
class Patches:
  """One image as the vision tower reads it. S slots, a multiple of 64; U = image tokens.

  Attributes:
    values: float32[S, 1176], normalised pixels, zero at empty slots.
    window: int32[S], 1.. the window of the slot, 0 at empty slots.
    position: int32[S, 2], (row, column) of the patch in the image, 0 at empty slots.
    unit_slot: int32[U], for each image token in reading order, its merge unit (slot // 4).
    grid: (rows, columns) of merge units; U is their product.
  """

  values: np.ndarray
  window: np.ndarray
  position: np.ndarray
  unit_slot: np.ndarray
  grid: tuple[int, int]


@dataclass(frozen=True)
class QwenImages:
  """Qwen2.5-VL's view of images under pixel limits, the same in training and evaluation.

  Attributes:
    min_pixels, max_pixels: limits of height x width after the resize.
  """

  min_pixels: int
  max_pixels: int

  def grid(self, height: int, width: int) -> tuple[int, int]:
    """Returns (rows, columns) of merge units of a stored image of that size."""
    # Past the longest aspect ratio that Transformers accepts, the image is squeezed to it.
    height, width = min(height, MAX_ASPECT * width), min(width, MAX_ASPECT * height)
    resized = smart_resize(height, width, UNIT, self.min_pixels, self.max_pixels)
    return resized[0] // UNIT, resized[1] // UNIT

  def cost(self, height: int, width: int) -> tuple[int, int]:
    """Returns (image tokens, patch slots with blocks filled up) without decoding anything."""
    rows, columns = self.grid(height, width)
    return rows * columns, _layout(rows, columns).blocks * BLOCK

  def patches(self, image: Image.Image) -> Patches:
    """Returns the patches of an RGB image; values equal the Hugging Face processor's."""
    rows, columns = self.grid(image.height, image.width)
    size = (columns * UNIT, rows * UNIT)
    if image.size != size:
      image = image.resize(size, Image.Resampling.BICUBIC)
    layout = _layout(rows, columns)
    # [unit rows, unit columns, patch row, patch column, channel, pixel row, pixel column]
    pixels = np.asarray(image).reshape(rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    pixels = pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, UNIT_PATCHES, 3, -1)
    values = np.zeros((layout.blocks * BLOCK // UNIT_PATCHES, UNIT_PATCHES, 3, 2, PATCH**2), "f4")
    for channel, table in enumerate(_value_tables()):
      values[layout.unit_slot, :, channel] = table[pixels[:, :, channel, None]]
    return Patches(
      values=values.reshape(-1, PATCH_VALUES),
      window=layout.window,
      position=layout.position,
      unit_slot=layout.unit_slot,
      grid=(rows, columns),
    )


@functools.cache
def _value_tables() -> np.ndarray:
  """Returns float32[3, 256]: the normalised value of every 8-bit value, a channel a row."""
  processor = Qwen2VLImageProcessorPil()
  levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
  values = processor.normalize(
    processor.rescale(levels, processor.rescale_factor), processor.image_mean, processor.image_std
  )
  return values.reshape(3, 256)


@dataclass(frozen=True)
class _Layout:
  blocks: int
  unit_slot: np.ndarray
  window: np.ndarray
  position: np.ndarray


@functools.lru_cache(maxsize=4096)
def _layout(rows: int, columns: int) -> _Layout:
  """Returns where the units of a grid go: windows, larger first, into the first block with room."""
  windows = [
    [r * columns + c for r in range(top, min(top + WINDOW, rows))
     for c in range(left, min(left + WINDOW, columns))]
    for top in range(0, rows, WINDOW)
    for left in range(0, columns, WINDOW)
  ]  # fmt: skip
  capacity = WINDOW * WINDOW
  used: list[int] = []
  unit_slot = np.zeros(rows * columns, np.int32)
  unit_window = np.zeros(rows * columns, np.int32)
  for number, units in enumerate(sorted(windows, key=len, reverse=True), start=1):
    full = len(units) == capacity
    block = (
      len(used)
      if full
      else next((b for b, u in enumerate(used) if u + len(units) <= capacity), len(used))
    )
    if block == len(used):
      used.append(0)
    unit_slot[units] = block * capacity + used[block] + np.arange(len(units))
    unit_window[units] = number
    used[block] += len(units)
  return _spread(rows, columns, len(used), unit_slot, unit_window)


def _spread(
  rows: int, columns: int, blocks: int, unit_slot: np.ndarray, unit_window: np.ndarray
) -> _Layout:
  """Returns the layout with per-patch windows and positions."""
  window = np.zeros((blocks * WINDOW * WINDOW, UNIT_PATCHES), np.int32)
  window[unit_slot] = unit_window[:, None]
  row, column = np.divmod(np.arange(rows * columns), columns)
  corner = np.stack([row, column], axis=1) * MERGE
  inside = np.array([(0, 0), (0, 1), (1, 0), (1, 1)])
  position = np.zeros((*window.shape, 2), np.int32)
  position[unit_slot] = corner[:, None] + inside
  return _Layout(blocks, unit_slot, window.reshape(-1), position.reshape(-1, 2))
