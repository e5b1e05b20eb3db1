"""The one image opener: odd files decode as a person expects, bad ones are named."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from bis_jax import images
from bis_jax.images import ImageError


def picture(height, width, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
  return Image.fromarray(pixels)


def encode(image, kind, **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def test_transparency_is_seen_on_white():
  image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
  image.putpixel((1, 0), (0, 0, 255, 255))
  palette = Image.new("P", (4, 4), 0)
  palette.putpalette([10, 20, 30, 0, 0, 255])
  palette.putpixel((1, 0), 1)
  for data in (
    encode(image, "PNG"),
    encode(image, "WEBP", lossless=True),
    encode(palette, "PNG", transparency=0),
    encode(Image.new("LA", (4, 4), (0, 0)), "PNG"),
  ):
    decoded = images.decode(data)
    assert decoded.mode == "RGB" and decoded.getpixel((3, 3)) == (255, 255, 255)
    assert decoded.getpixel((1, 0)) in ((0, 0, 255), (255, 255, 255))
  assert images.decode(encode(image, "PNG")).getpixel((1, 0)) == (0, 0, 255)
  assert images.decode(encode(palette, "PNG")).getpixel((3, 3)) == (10, 20, 30)


def test_every_mode_becomes_rgb():
  grey = Image.new("L", (3, 2), 200)
  for image, kind in ((grey, "PNG"), (grey.convert("1"), "PNG"), (grey.convert("CMYK"), "JPEG")):
    decoded = images.decode(encode(image, kind))
    assert decoded.mode == "RGB" and min(decoded.getpixel((0, 0))) >= 195
  deep = Image.fromarray(np.full((2, 3), 200 * 256, np.uint16))
  assert images.decode(encode(deep, "PNG")).getpixel((0, 0)) == (200, 200, 200)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
  image = Image.new("RGB", (40, 20))
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encode(image, "JPEG", exif=exif)
  expected = (40, 20) if orientation >= 5 else (20, 40)
  decoded = images.decode(data)
  assert (decoded.height, decoded.width) == expected
  assert images.upright_size(data) == images.upright_size(data, whole=True) == expected
  assert decoded.getexif().get(0x0112, 1) == 1


def test_animated_gif_shows_its_first_frame():
  frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
  data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
  assert images.decode(data).getpixel((0, 0)) == (255, 0, 0)


def png_header(width, height):
  body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
  return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 40_000])
def test_decompression_bomb_is_named_before_it_is_decoded(side):
  with pytest.raises(ImageError, match="bomb image: .*pixels") as error:
    images.decode(png_header(side, side))
  assert error.value.reason == "bomb"


def test_broken_images_are_named():
  whole = encode(picture(64, 64), "PNG")
  for data in (b"", b"not an image", whole[: len(whole) // 2], whole[:60]):
    with pytest.raises(ImageError) as error:
      images.decode(data)
    assert error.value.reason == "broken"


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_size_of_a_png_is_upright_wherever_its_orientation_is(orientation, tmp_path):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encode(picture(20, 40), "PNG", exif=exif)
  start = data.index(b"eXIf") - 4
  stop = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
  end = data.index(b"IEND") - 4
  behind_pixels = data[:start] + data[stop:end] + data[start:stop] + data[end:]
  for encoded in (data, behind_pixels):
    (tmp_path / "x.png").write_bytes(encoded)
    decoded = images.decode(tmp_path / "x.png")
    assert images.upright_size(tmp_path / "x.png") == (decoded.height, decoded.width)
    assert decoded.size == ((20, 40) if orientation == 6 else (40, 20))


def test_size_comes_from_the_header_unless_the_whole_file_is_asked_for():
  data = encode(picture(64, 64), "PNG")
  cut = data[: len(data) // 2]
  assert images.upright_size(cut) == (64, 64)
  with pytest.raises(ImageError, match="broken image"):
    images.upright_size(cut, whole=True)


def test_only_raster_formats_are_opened(monkeypatch):
  """Pillow passes an EPS file to Ghostscript, regardless of its name."""
  monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("ran"))
  eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
  assert Image.open(io.BytesIO(eps)).format == "EPS"
  with pytest.raises(ImageError, match="broken image: not one of BMP, GIF, JPEG, PNG,"):
    images.decode(eps)


def test_errors_travel_between_processes():
  error = pickle.loads(pickle.dumps(ImageError("bomb", "huge")))
  assert (str(error), error.reason) == ("bomb image: huge", "bomb")


def test_a_jpeg_of_very_many_scans_is_a_bomb():
  """82 kB of 300 scans took 14 s to decode at 16 megapixels."""
  encoded = io.BytesIO()
  Image.new("L", (64, 64)).save(encoded, "JPEG", progressive=True, comment=b"\xff\xda" * 40)
  data = encoded.getvalue()
  images.decode(data)
  scan, end = data.rindex(b"\xff\xc4"), data.rindex(b"\xff\xd9")
  bomb = data[:end] + data[scan:end] * 40 + data[end:]
  with pytest.raises(images.ImageError, match="bomb image: a JPEG of 46 scans, more than 32"):
    images.decode(bomb)
