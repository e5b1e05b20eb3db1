"""Raw corpora in the layout of VisualPRM400K-v1.1-Raw."""

import io
import json
import pathlib
import subprocess
import sys

import pytest
from PIL import Image


def _record_of(scores=(1.0, 0.5, 0.0), **fields):
  """A good record with one step per MC score in sixteenths; `fields` replace or (None) remove keys."""
  record = {
    "image": "VisualPRM400K-v1.1-Raw/geo/1.png",
    "question": "<image>\nAnswer.\n\nQuestion:\n\nHow long is AB?",
    "question_orig": "How long is AB?",
    "answer": "7",
    "response": "...",
    "num_mc_sequences": 16,
    "steps_with_score": [
      {"step": f"Step {at}.", "score": s, "num_mc_correct": int(16 * s), "num_mc_total": 16}
      for at, s in enumerate(scores)
    ],
  }
  record |= fields
  return {key: value for key, value in record.items() if value is not None}


def _line_of(record=None):
  return json.dumps(_record_of() if record is None else record, ensure_ascii=False).encode()


def _png(width=8, height=6, colour=(200, 30, 30)):
  encoded = io.BytesIO()
  Image.new("RGB", (width, height), colour).save(encoded, "PNG")
  return encoded.getvalue()


@pytest.fixture(scope="session")
def record_of():
  return _record_of


@pytest.fixture(scope="session")
def line_of():
  """Encodes a record (by default a good one) as a line without its end."""
  return _line_of


@pytest.fixture(scope="session")
def png():
  """Encodes a small picture of one colour."""
  return _png


@pytest.fixture
def write_files(tmp_path):
  """Writes {relative name: bytes} under a new folder and returns it."""

  def write(files, folder="raw"):
    for name, data in files.items():
      path = tmp_path / folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(data)
    return tmp_path / folder

  return write


@pytest.fixture(scope="session")
def dirty_corpus(shared, tmp_path_factory) -> pathlib.Path:
  """600 rollouts with images, 40 of them planted bad (dirty.json), by the shared generator."""
  folder = tmp_path_factory.mktemp("dirty")
  pool = folder / "pool"
  pool.mkdir()
  for at in range(5):
    (pool / f"{at}.png").write_bytes(_png(20 + at, 30, (40 * at, 0, 0)))
  tool = shared / "tools" / "make_visualprm_corpus.py"
  options = ["--rollouts", "600", "--files", "6", "--dirty", "40", "--image-pool", str(pool)]
  subprocess.run([sys.executable, tool, folder, *options], check=True, stdout=subprocess.DEVNULL)
  return folder
