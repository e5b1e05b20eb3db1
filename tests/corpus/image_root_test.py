"""Image references: what they mean, and that nothing outside the root is read."""

import io
import os
import pickle
import struct
import zipfile
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bis_jax.corpus.image_root import ImageRoot, candidates, image_size
from bis_jax.corpus.rejections import BadRecord, CorpusError


@pytest.fixture
def root(write_files, tmp_path, png):
  folder = write_files(
    {"geo/1.png": png(), "nlvr2/images/2.png": png(), "nlvr2/3.png": png(), "4.png": png()}
  )
  (tmp_path / "secret.png").write_bytes(png())
  (tmp_path / "outside").mkdir()
  (tmp_path / "outside" / "5.png").write_bytes(png())
  (folder / "inside.png").symlink_to(folder / "geo" / "1.png")
  (folder / "leak.png").symlink_to(tmp_path / "secret.png")
  (folder / "leak").symlink_to(tmp_path / "outside")
  (folder / "loop.png").symlink_to(folder / "loop.png")
  os.mkfifo(folder / "pipe.png")
  return folder


@pytest.mark.parametrize(
  ("reference", "names"),
  [
    ("VisualPRM400K-v1.1-Raw/geo/1.png", ("geo/1.png",)),
    ("images/2.png", ("2.png", "nlvr2/images/2.png", "nlvr2/2.png")),
    ("geo/1.png", ("geo/1.png",)),
    ("geo//./1.png", ("geo/1.png",)),
    ("geo/../4.png", ("4.png",)),
  ],
)
def test_candidates(reference, names):
  assert candidates(reference) == names


@pytest.mark.parametrize(
  "reference",
  ["..", "../x.png", "a/../../x.png", "/etc/passwd", "VisualPRM400K-v1.1-Raw//etc/passwd"]
  + ["VisualPRM400K-v1.1-Raw/../../etc/passwd", "images/../x.png", "images//etc/passwd", "a\0.png"],
)
def test_names_that_leave_the_root(reference):
  with pytest.raises(BadRecord, match="image_outside_root"):
    candidates(reference)


@pytest.mark.parametrize("packed", [False, True])
def test_locate_and_read(root, tmp_path, packed):
  if packed:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
      for name in ("geo/1.png", "nlvr2/images/2.png", "nlvr2/3.png", "4.png"):
        archive.write(root / name, f"images/{name}")
  images = pickle.loads(pickle.dumps(ImageRoot(tmp_path / "images.zip" if packed else root)))
  assert images.locate("VisualPRM400K-v1.1-Raw/geo/1.png") == "geo/1.png"
  assert images.locate("images/2.png") == "nlvr2/images/2.png"
  assert images.locate("images/3.png") == "nlvr2/3.png"
  assert images.locate("images/4.png") == "4.png"
  assert images.read("geo/1.png") == (root / "geo/1.png").read_bytes()
  listed = {name for name, *_ in images.listing()}
  assert listed - {"inside.png", "leak.png", "loop.png"} == {
    "geo/1.png",
    "nlvr2/images/2.png",
    "nlvr2/3.png",
    "4.png",
  }
  if not packed:  # links to files, to nothing and in a circle are listed, those to folders are not
    assert {"inside.png", "leak.png", "loop.png"} <= listed
  for missing in ("geo/2.png", "geo", "", "x" * 5000):
    with pytest.raises(BadRecord, match="missing_image"):
      images.locate(missing)


def test_links_may_not_leave_the_root(root):
  images = ImageRoot(root)
  assert images.locate("inside.png") == "geo/1.png"
  for leak in ("leak.png", "leak/5.png"):
    with pytest.raises(BadRecord, match="image_outside_root.*is a link to"):
      images.locate(leak)
  for nothing in ("loop.png", "pipe.png"):  # a pipe would block whoever opens it
    with pytest.raises(BadRecord, match="missing_image"):
      images.locate(nothing)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
  st.lists(
    st.sampled_from(["..", ".", "", "geo", "1.png", "leak", "5.png", "images", "secret.png"]),
    max_size=6,
  ),
  st.sampled_from(["", "VisualPRM400K-v1.1-Raw/", "images/", "/"]),
)
def test_what_is_located_is_inside(root, parts, prefix):
  try:
    name = ImageRoot(root).locate(prefix + "/".join(parts))
  except BadRecord:
    return
  assert os.path.realpath(root / name).startswith(f"{os.path.realpath(root)}/")


def test_a_root_that_is_not_there(tmp_path):
  with pytest.raises(CorpusError, match="no image folder or zip at .*nowhere"):
    ImageRoot(tmp_path / "nowhere")
  (tmp_path / "text.zip").write_text("no zip")
  with pytest.raises(CorpusError, match="neither a folder nor a zip"):
    ImageRoot(tmp_path / "text.zip")


def test_a_damaged_zip_member_is_unreadable(tmp_path, png):
  with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
    archive.writestr("images/1.png", png())
  data = (tmp_path / "images.zip").read_bytes()
  (tmp_path / "images.zip").write_bytes(data.replace(b"IDAT", b"XXXX"))
  images = ImageRoot(tmp_path / "images.zip")
  with pytest.raises(BadRecord, match="unreadable_image: 1.png"):
    images.read(images.locate("1.png"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_size_is_upright_and_cut_files_are_found(kind):
  encoded = io.BytesIO()
  noise = Image.effect_noise((40, 30), 80)
  noise.save(encoded, kind)
  assert image_size(encoded.getvalue(), "x") == (30, 40)
  with pytest.raises(BadRecord, match="unreadable_image: x:"):
    image_size(encoded.getvalue()[: encoded.tell() // 2], "x")


@pytest.mark.parametrize(("orientation", "size"), [(1, (30, 40)), (3, (30, 40)), (6, (40, 30))])
def test_size_after_exif_rotation(orientation, size):
  exif = Image.Exif()
  exif[0x0112] = orientation
  encoded = io.BytesIO()
  Image.new("RGB", (40, 30)).save(encoded, "JPEG", exif=exif)
  assert image_size(encoded.getvalue(), "x") == size


def test_a_bomb_is_not_decoded():
  def chunk(kind, data):
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum

  for side in (10_000, 50_000):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    with pytest.raises(BadRecord, match="unreadable_image: x: .*pixels"):
      image_size(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b""), "x")
