"""A benchmark to evaluate, and a real browser to look at pages with."""

import json
import pathlib
import shutil
import subprocess
import types

import numpy as np
import pytest
from PIL import Image

SOURCES = ("MMMU", "MathVision", "MathVerse_VO", "DynaMath", "WeMath")


def benchmark_record(i: int) -> dict:
  """A line of test.jsonl; every third item has two images."""
  return {
    "image": [f"images/{i}_{k}.png" for k in range(1 + (i % 3 == 2))],
    "question": f"<image1> What is in picture {i}?",
    "answer": str(i),
    "response": {
      "steps": [f"step {j} of {i}" for j in range(2 + i % 4)],
      "process_correctness": [(1, -1, 1, 0, 1)[j] for j in range(2 + i % 4)],
    },
    "policy_model": f"model-{i % 2}",
    "data_source": SOURCES[i % 5],
    "a key nobody knows": None,
  }


def write_benchmark(folder: pathlib.Path, records: list[dict]) -> pathlib.Path:
  """Writes records as test.jsonl, and the images of ten `benchmark_record`s, into `folder`."""
  (folder / "images").mkdir(parents=True, exist_ok=True)
  for i in range(10):
    for k in range(2):
      Image.new("RGB", (40 + 10 * k, 30), (20 * i, 100, 50)).save(folder / f"images/{i}_{k}.png")
  lines = [json.dumps(record) for record in records]
  (folder / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
  return folder


@pytest.fixture(name="benchmark_record")
def _benchmark_record():
  """`benchmark_record`."""
  return benchmark_record


@pytest.fixture(name="write_benchmark")
def _write_benchmark():
  """`write_benchmark`."""
  return write_benchmark


@pytest.fixture
def benchmark(tmp_path) -> pathlib.Path:
  """A folder with ten items in VisualProcessBench's layout."""
  return write_benchmark(tmp_path / "benchmark", [benchmark_record(i) for i in range(10)])


@pytest.fixture
def random_run():
  """random_run(seed, n_items) -> (items, scores): labels, neutral steps, ties, five sources."""

  def draw(seed: int, n_items: int = 60):
    rng = np.random.default_rng(seed)
    items, scores = [], []
    for i in range(n_items):
      labels = rng.choice([1, -1, 0], rng.integers(1, 9), p=[0.55, 0.35, 0.1])
      noisy = np.clip(0.5 + 0.2 * labels + rng.normal(0, 0.3, len(labels)), 0, 1)
      items.append(
        types.SimpleNamespace(
          labels=tuple(labels.tolist()),
          data_source=SOURCES[rng.integers(5)],
          policy_model=f"model-{i % 3}",
        )
      )
      scores.append(np.round(noisy, 2) if i % 2 else noisy)
    return items, scores

  return draw


@pytest.fixture(scope="session")
def browse(tmp_path_factory):
  """browse(file, fragment="") -> (DOM after scripts, console messages) in headless Chromium."""
  program = shutil.which("chromium") or shutil.which("google-chrome")
  if program is None:
    pytest.skip("opens a page in a real browser, and there is no chromium on PATH")

  def open_page(file: pathlib.Path, fragment: str = "") -> tuple[str, list[str]]:
    run = subprocess.run(
      [
        program,
        *"--headless --no-sandbox --disable-gpu --disable-quic --no-first-run".split(),
        *"--disable-background-networking --disable-component-update --disable-sync".split(),
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
        "--dump-dom",
        file.resolve().as_uri() + fragment,
      ],
      capture_output=True,
      text=True,
      timeout=60,
      check=True,
    )
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]

  return open_page
