"""A dress rehearsal at the corpus' full size: every stage up to the first step, a tiny model.

  python -m benchmarks.full_size FOLDER [--recipes=qwen_bis10,qwen_full] [--processes=2]
      [--shared=../shared] [--config.KEY=VALUE ...]

Draws 565,149 rollouts, 194,000 images (64 pictures, linked) and 2,866 benchmark items into
FOLDER unless they are there, with the generator and the tokenizer of --shared; then runs each
recipe with its own row sizes on as many processes as asked, up to its first step. Prints wall and
processor seconds, memory, and bytes read of every stage and process. Results: benchmarks/RESULTS.md.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

ROLLOUTS, ITEMS, PICTURES = 565_149, 2866, 64
ROOT = pathlib.Path(__file__).resolve().parents[1]


def draw(folder: pathlib.Path, shared: pathlib.Path, rollouts: int) -> None:
  """Writes annotations, images and the benchmark into `folder`, once."""
  if (folder / "drawn").exists():
    return
  tool = shared / "tools/make_visualprm_corpus.py"
  subprocess.run([sys.executable, tool, folder, "--rollouts", str(rollouts)], check=True)
  pictures = [_picture(folder / f"pictures/{i}.jpg", i) for i in range(PICTURES)]
  images, count = folder / "images", 0
  for path in sorted((folder / "annotations").iterdir()):
    records = [json.loads(line) for line in path.open()]
    with path.open("w") as file:
      for at, record in enumerate(records):
        for step in record["steps_with_score"]:  # the generator repeats 4,096 texts
          step["step"] = f"{at}, {step['step']}"
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    for record in records:
      references = record["image"]
      for name in [references] if isinstance(references, str) else references:
        plain = name.removeprefix("VisualPRM400K-v1.1-Raw/")
        place = images / (plain if plain != name else f"nlvr2/{name}")
        if not place.exists():
          place.parent.mkdir(parents=True, exist_ok=True)
          os.link(pictures[count % PICTURES], place)
          count += 1
  _draw_benchmark(folder / "benchmark", pictures)
  (folder / "drawn").write_text(f"{count} images\n")


def _picture(path: pathlib.Path, seed: int) -> pathlib.Path:
  """Draws a JPEG of about 340,000 pixels and 50 kB, as the released images are on average."""
  rng = np.random.default_rng(seed)
  pixels, shape = 340_000 * rng.lognormal(-0.1, 0.45), rng.uniform(0.6, 1.6)
  width, height = int((pixels * shape) ** 0.5), int((pixels / shape) ** 0.5)
  coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
  image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
  path.parent.mkdir(parents=True, exist_ok=True)
  noise = rng.normal(0, 6, (height, width, 3))
  noisy = (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)
  Image.fromarray(noisy).save(path, quality=80)
  return path


def _draw_benchmark(folder: pathlib.Path, pictures: list[pathlib.Path]) -> None:
  rng = random.Random(0)
  (folder / "images").mkdir(parents=True, exist_ok=True)
  sources = ("MMMU", "MathVision", "MathVerse_VO", "DynaMath", "WeMath")
  with (folder / "test.jsonl").open("w") as file:
    for i in range(ITEMS):
      name = f"images/{i // 4}.jpg"
      if not (folder / name).exists():
        os.link(rng.choice(pictures), folder / name)
      steps = [" ".join(rng.choices("so the angle is equal to".split(), k=30)) for _ in range(9)]
      record = {
        "image": [name],
        "question": "<image1> What is the angle?",
        "answer": "B",
        "response": {"steps": steps, "process_correctness": rng.choices([1, -1], k=len(steps))},
        "policy_model": f"policy {i % 4}",
        "data_source": sources[i % 5],
      }
      file.write(json.dumps(record) + "\n")


def rehearse(folder: pathlib.Path, shared: pathlib.Path, recipe: str, n: int, more: list[str]):
  """Runs a recipe on `n` processes up to its first step; their output goes to this terminal."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  workdir = folder / f"run_{recipe}"
  shutil.rmtree(workdir, ignore_errors=True)
  values = {
    "corpus.annotations": folder / "annotations",
    "corpus.images": folder / "images",
    "corpus.cache": folder / "cache",
    "evaluation.benchmark": folder / "benchmark",
    "inputs.tokenizer": shared / "data/tokenizers/qwen2_5_vl",
    "inputs.workers": 1,
    "inputs.prefetch": 1,
    "model.size": "tiny",
    "model.checkpoint": "",
    "model.dtype": "float32",
    "train.steps": 1,
    "train.global_batch": 64,  # one row per process at a time: attention without kernels is large
    "inputs.row_multiple": 4,
    "train.accumulate": 2,
  }
  command = [sys.executable, "-m", "benchmarks.full_size", "--child"]
  command += [f"--config=configs/{recipe}.py", f"--workdir={workdir}"]
  command += [f"--config.{key}={value}" for key, value in values.items()] + more
  running = [
    subprocess.Popen(
      command,
      cwd=ROOT,
      env=os.environ
      | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(n), "JAX_PROCESS_ID": str(i)}
      | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=false",
      },
    )
    for i in range(n)
  ]
  assert not any([process.wait() for process in running])


class Meter:
  """Prints what every stage of this process and its workers took."""

  def __init__(self):
    self.process, self._peak = int(os.environ["JAX_PROCESS_ID"]), 0
    threading.Thread(target=self._watch, daemon=True).start()

  def _watch(self) -> None:
    while True:
      self._peak = max(self._peak, self._state()[3])
      time.sleep(0.5)

  def _state(self) -> tuple[float, float, int, int]:
    """Returns wall seconds, processor seconds, bytes read and bytes of memory, with workers."""
    ticks, read, memory = 0, 0, 0
    for pid in _family(os.getpid()):
      try:
        values = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, values[11:15]))
        for line in pathlib.Path(f"/proc/{pid}/io").read_text().splitlines():
          read += int(line.split()[1]) if line.startswith("rchar") else 0
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
          memory += int(line.split()[1]) << 10 if line.startswith("Pss:") else 0
      except OSError:
        pass  # it has just ended
    return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), read, memory

  def stage(self, name: str, start: tuple[float, float, int, int]) -> None:
    """Prints one line of the table: what was used since `start`."""
    state = self._state()
    self._peak = max(self._peak, state[3])
    print(
      f"| {self.process} | {name} | {state[0] - start[0]:.1f} | {state[1] - start[1]:.1f} | "
      f"{(state[2] - start[2]) / 1e6:.0f} | {state[3] / 1e9:.2f} | {self._peak / 1e9:.2f} |",
      flush=True,
    )
    self._peak = 0

  def timed(self, owner: Any, name: str, label: str) -> None:
    """Replaces a function of `owner` by one that prints its stage."""
    plain: Callable = getattr(owner, name)

    def call(*arguments, **more):
      start = self._state()
      result = plain(*arguments, **more)
      self.stage(label, start)
      return result

    setattr(owner, name, call)


def _family(pid: int) -> list[int]:
  try:
    below = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    tasks = pathlib.Path(f"/proc/{pid}/task").iterdir()
    below += [c for task in tasks for c in (task / "children").read_text().split()]
  except OSError:
    return [pid]
  return [pid, *(p for child in dict.fromkeys(below) for p in _family(int(child)))]


def child() -> None:
  """Runs `bis_jax.main` and prints its stages; ends after the first step."""
  meter = Meter()
  start = meter._state()
  from absl import app

  from bis_jax import main
  from bis_jax.inputs import pipeline
  from bis_jax.parallel import processes
  from bis_jax.run import stages
  from bis_jax.training import loop

  meter.stage("imports", start)
  for owner, name, label in (
    (processes, "start", "join the other processes"),
    (stages, "check_inputs", "check the inputs"),
    (stages, "prepare_corpus", "prepare or open the corpus"),
    (stages, "select_rollouts", "select"),
    (stages, "make_processor", "tokenizer"),
    (stages, "make_evaluator", "benchmark and held-out rollouts"),
    (pipeline, "measure", "measure"),
    (pipeline.Measured, "plan_rows", "plan"),
    (loop, "first_params", "parameters"),
    (pipeline.BatchIterator, "__next__", "first batch"),
  ):
    meter.timed(owner, name, label)
  begun = meter._state()

  def write(writer: Any, step: int, values: dict[str, float]) -> None:
    meter.stage(f"until step {step} is done, loss {values['loss']:.4f}", begun)
    processes.wait_for_all("measured")
    os._exit(0)

  loop.MetricWriter.write = write
  app.run(main.main)


def main() -> None:
  """Draws, rehearses and prints the tables."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--recipes", default="qwen_bis10,qwen_full")
  parser.add_argument("--processes", type=int, default=2)
  parser.add_argument("--rollouts", type=int, default=ROLLOUTS)
  parser.add_argument("--shared", type=pathlib.Path, default=ROOT.parent / "shared")
  options, more = parser.parse_known_args()
  draw(options.folder, options.shared, options.rollouts)
  print("| process | stage | seconds | processor s | MB read | GB after | GB at most |")
  print("|---|---|---|---|---|---|---|", flush=True)
  for recipe in options.recipes.split(","):
    rehearse(options.folder.absolute(), options.shared, recipe, options.processes, more)


if __name__ == "__main__":
  if sys.argv[1:2] == ["--child"]:
    del sys.argv[1]
    child()
  else:
    main()
