"""Times the page of all 2,866 benchmark items in headless Chromium, from file://.

  python benchmarks/items_page_time.py

Writes a page with 26,950 steps of the released lengths (24 words at the median) and one image per
item, opens it three times in a fresh profile, and prints wall and processor time from the start of
the browser's process to its end, with the page drawn and its list written out.
Results: benchmarks/RESULTS.md.
"""

import pathlib
import resource
import shutil
import subprocess
import tempfile
import time

import numpy as np
from evaluation_time import ITEMS, draw_run
from PIL import Image

from bis_jax.corpus.image_root import ImageRoot
from bis_jax.evaluation.visual_process_bench import BenchmarkImage, BenchmarkItem
from bis_jax.reports import items_page

FLAGS = (
  "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --enable-logging=stderr "
  "--disable-background-networking --disable-component-update --disable-sync --dump-dom"
).split()


def write_page(folder: pathlib.Path) -> pathlib.Path:
  """Writes items.html and its images into `folder` and returns the page's path."""
  rng = np.random.default_rng(0)
  (folder / "images").mkdir()
  for k in range(20):
    noise = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((960, 720)).save(folder / f"images/{k}.jpg")
  root = ImageRoot(folder / "images")
  words = np.array("the angle of triangle ABC is equal to so we find that x = 12 and".split())
  drawn, scores = draw_run(0)
  items = []
  for i, item in enumerate(drawn):
    lengths = rng.lognormal(np.log(24), 0.6, len(item.labels)).astype(int) + 1
    items.append(
      BenchmarkItem(
        index=i,
        question=" ".join(rng.choice(words, 30)),
        images=(BenchmarkImage(root, f"{i % 20}.jpg"),),
        image_sizes=((720, 960),),
        steps=tuple(" ".join(rng.choice(words, n)) for n in lengths),
        labels=item.labels,
        data_source=item.data_source,
        policy_model=item.policy_model,
        answer="12",
      )
    )
  items_page.write_items_page(folder, title="VisualProcessBench", items=items, runs={"run": scores})
  return folder / "items.html"


def processor_seconds() -> float:
  """Returns the processor time of all processes that have ended so far."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def open_page(page: pathlib.Path) -> tuple[str, str, list[str]]:
  """Returns (times, DOM, console messages) of opening a page in a browser of its own."""
  program = shutil.which("chromium") or shutil.which("google-chrome")
  with tempfile.TemporaryDirectory() as profile:
    start, before = time.perf_counter(), processor_seconds()
    run = subprocess.run(
      [program, *FLAGS, f"--user-data-dir={profile}", page.as_uri()],
      capture_output=True,
      text=True,
      check=True,
    )
    wall, busy = time.perf_counter() - start, processor_seconds() - before
  return (
    f"{wall:.2f} s ({busy:.2f} s)",
    run.stdout,
    [line for line in run.stderr.splitlines() if "CONSOLE" in line],
  )


def main() -> None:
  """Prints the times."""
  with tempfile.TemporaryDirectory() as folder:
    start = time.perf_counter()
    page = write_page(pathlib.Path(folder))
    images = len(list((page.parent / "items").iterdir()))
    print(f"wrote {page.stat().st_size / 1e6:.1f} MB and {images} images", end=" ")
    print(f"in {time.perf_counter() - start:.1f} s")
    empty = page.with_name("empty.html")
    empty.write_text("<!doctype html><title>empty</title>")
    for name, file in (("an empty page", empty), ("all items", page)):
      walls = []
      for _ in range(3):
        wall, dom, console = open_page(file)
        walls.append(wall)
        assert console == [], console
      if file is page:
        assert dom.count("<tr data-item=") == ITEMS
      print(f"{name:14} wall (processor): " + ", ".join(walls))


if __name__ == "__main__":
  main()
