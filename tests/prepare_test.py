"""The command `python -m bis_jax.prepare`."""

import json
import subprocess
import sys

import pytest
from PIL import Image

STEP = {"step": "Count.", "score": 0.5, "num_mc_correct": 8, "num_mc_total": 16}


@pytest.fixture
def raw(tmp_path):
  (tmp_path / "annotations").mkdir()
  (tmp_path / "images").mkdir()
  Image.new("RGB", (4, 4)).save(tmp_path / "images/1.png")
  good = json.dumps({"image": "1.png", "question": "How many?", "steps_with_score": [STEP]})
  (tmp_path / "annotations/a.jsonl").write_text(f"{good}\noops\n")
  return tmp_path


def run(raw, *options):
  flags = [f"--annotations={raw}/annotations", f"--images={raw}/images", f"--out={raw}/corpus"]
  return subprocess.run(
    [sys.executable, "-m", "bis_jax.prepare", *flags, *options], capture_output=True, text=True
  )


def test_prepares_once_and_says_what_it_rejected(raw):
  first = run(raw, "--max_rejected_fraction=0.5")
  assert first.returncode == 0, first.stderr
  assert "rejected        1  not_json" in first.stderr
  assert "prepared 1 rollouts with 1 images" in first.stderr
  assert "reusing the corpus" in run(raw, "--max_rejected_fraction=0.5").stderr


def test_bad_input_is_told_without_a_traceback(raw):
  rejected = run(raw)
  missing = run(raw, "--annotations=nowhere")
  assert rejected.returncode == missing.returncode == 1
  assert "prepare: 1 of 2 records are rejected" in rejected.stderr
  assert "prepare: no annotations at" in missing.stderr
  assert "Traceback" not in rejected.stderr + missing.stderr
  assert not (raw / "corpus").exists()
