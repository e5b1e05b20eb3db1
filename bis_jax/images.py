"""Opens all image files: corpus, benchmark, scoring, pages and captions."""

import contextlib
import io
import os
from collections.abc import Iterator

import numpy as np
from etils import epath
from PIL import Image, ImageOps, UnidentifiedImageError

from bis_jax.errors import UserError

# Raster formats only: for others Pillow may start programs (EPS runs Ghostscript).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_STORED_PIXELS = 89_478_485  # Pillow's own limit; larger is taken for a decompression bomb
MAX_SCANS = 32  # of a progressive JPEG, usually about 10; each costs time for all of the pixels

_ORIENTATION = 0x0112  # EXIF tag; the values from 5 to 8 swap height and width
# A PNG may store its orientation after the pixels, which Pillow must decode to find it.
_PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")


class ImageError(UserError):
  """An image that cannot be used; `reason` is "bomb" or "broken"."""

  def __init__(self, reason: str, detail: str):
    super().__init__(reason, detail)
    self.reason, self.detail = reason, detail

  def __str__(self) -> str:
    return f"{self.reason} image: {self.detail}"


@contextlib.contextmanager
def opened(source: bytes | str | os.PathLike) -> Iterator[Image.Image]:
  """Opens encoded bytes or a file; only the header is read until the caller asks for pixels.

  Raises ImageError: "bomb" for more than `MAX_STORED_PIXELS`; "broken" if the format is not in
  `FORMATS`, or for any failure to decode in the `with` block.
  """
  data = source if isinstance(source, bytes) else epath.Path(source).read_bytes()
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      if image.width * image.height > MAX_STORED_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise ImageError("bomb", f"{size}, more than {MAX_STORED_PIXELS:,}")
      if image.format == "JPEG" and _scans(data) > MAX_SCANS:
        raise ImageError("bomb", f"a JPEG of {_scans(data)} scans, more than {MAX_SCANS}")
      yield image
  except ImageError:
    raise
  except Image.DecompressionBombError as error:  # Pillow's own check, at twice our limit
    raise ImageError("bomb", str(error)) from error
  except UnidentifiedImageError as error:
    raise ImageError("broken", f"not one of {', '.join(FORMATS)}, or cut short") from error
  except Exception as error:  # Pillow's decoders raise many types of errors for damaged files
    raise ImageError("broken", str(error) or type(error).__name__) from error


def _scans(jpeg: bytes) -> int:
  at = 2  # segments up to the first scan, some of which hold any bytes
  while jpeg[at : at + 1] == b"\xff" and jpeg[at + 1 : at + 2] not in (b"\xda", b""):
    at += 2 + int.from_bytes(jpeg[at + 2 : at + 4])
  return jpeg.count(b"\xff\xda", at)


def decode(source: bytes | str | os.PathLike) -> Image.Image:
  """Returns an image as a person sees it: upright RGB, the first frame, on white; ImageError."""
  with opened(source) as image:
    return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
  """Returns an opened image upright in RGB: transparency over white, 16-bit grey as 8 bits."""
  image.load()
  ImageOps.exif_transpose(image, in_place=True)
  if image.mode.startswith("I"):
    return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
  if "A" not in image.getbands() and "transparency" not in image.info:
    return image.convert("RGB")
  image = image if image.mode == "RGBA" else image.convert("RGBA")
  rgb = Image.new("RGB", image.size)
  for top in range(0, image.height, 256):  # in bands: whole copies would take much memory
    band = image.crop((0, top, image.width, min(top + 256, image.height)))
    white = Image.new("RGBA", band.size, (255, 255, 255, 255))
    rgb.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
  return rgb


def stored_pixels(source: bytes) -> int:
  """Returns width x height, surely from the header alone; ImageError as `opened`."""
  with opened(source) as image:
    return image.width * image.height


def upright_size(source: bytes | str | os.PathLike, *, whole: bool = False) -> tuple[int, int]:
  """Returns (height, width) in pixels after EXIF rotation, from the header; ImageError as `opened`.

  `whole` also decodes the pixels, JPEGs at an eighth of their size, to find a truncated file.
  """
  data = source if isinstance(source, bytes) else epath.Path(source).read_bytes()
  with opened(data) as image:
    width, height = image.size
    orientation = 1
    if image.format != "PNG" or any(mark in data for mark in _PNG_ORIENTATION):
      orientation = image.getexif().get(_ORIENTATION, 1)
    if whole:
      image.draft(None, (max(1, width // 8), max(1, height // 8)))
      image.load()
  return (width, height) if orientation in (5, 6, 7, 8) else (height, width)
