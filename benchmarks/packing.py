"""How full packed rows are on a whole corpus, and how long measuring and planning take.

  python -m benchmarks.packing --annotations=DIR --tokenizer=DIR [--limit=N]
      [--config=configs/internvl_bis10.py]

Reads the annotations (VisualPRM400K layout) and the tokenizer, no images: annotations do not state
image sizes, so each source gets a typical size, 250 to 1200 pixels, and an aspect ratio, and its
images vary by about 25 % around them. Padding is the share of all token and patch slots of the
rows, the slots that windows leave empty in their blocks included. Results: benchmarks/RESULTS.md.
"""

import json
import pathlib
import time

import numpy as np
from absl import app, flags

from benchmarks.row_budget import balanced_row_patches
from bis_jax.inputs import pack
from bis_jax.inputs.pipeline import Example, measure, unlabelled
from bis_jax.models.processor import make_processor
from bis_jax.models.qwen2_5_vl.images import UNIT_PATCHES
from bis_jax.settings import recipe

_ANNOTATIONS = flags.DEFINE_string("annotations", None, "folder of *.jsonl", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenizer folder", required=True)
_CONFIG = flags.DEFINE_string("config", "qwen_bis10", "recipe whose backbone reads")
_LIMIT = flags.DEFINE_integer("limit", 0, "read about this many, evenly spread; 0: all")


def read_rollouts(folder: pathlib.Path, limit: int) -> list[Example]:
  """Returns every rollout, or about `limit` of them, evenly spread, with synthetic image sizes."""
  rollouts = []
  rng = np.random.default_rng(0)
  paths = sorted(folder.glob("*.jsonl"))
  total = sum(path.read_bytes().count(b"\n") for path in paths)
  stride = max(1, total // limit) if limit else 1
  for path in paths:
    side, aspect = np.exp(rng.uniform(np.log(250), np.log(1200))), rng.uniform(0.5, 1.4)
    for line in path.read_text(encoding="utf-8").splitlines()[::stride]:
      record = json.loads(line)
      steps = [step["step"] for step in record["steps_with_score"]]
      count = len(record["image"]) if isinstance(record["image"], list) else 1
      scale = np.exp(rng.normal(0, 0.25, (count, 2)))
      size = np.maximum(28, scale * [side * aspect, side]).astype(int)
      sizes = [tuple(map(int, pair)) for pair in size]
      rollouts.append(unlabelled(path.stem, record["question_orig"], steps, sizes, list))
  return rollouts


def main(argv: list[str]) -> None:
  """Prints the table."""
  del argv
  rollouts = read_rollouts(pathlib.Path(_ANNOTATIONS.value), _LIMIT.value)
  processor = make_processor(recipe.load(_CONFIG.value), _TOKENIZER.value)
  formatter, images = processor.prompt, processor.images
  start = time.perf_counter()
  measured = measure(rollouts, formatter, images, max_length=4096, progress=True)
  seconds = time.perf_counter() - start
  lengths = measured.costs[:, 0]
  print(f"{len(rollouts)} rollouts measured in {seconds:.0f} s, {lengths.sum():,} tokens")
  print(
    "tokens per rollout, percentiles 1 50 99:", *np.percentile(lengths, [1, 50, 99]).astype(int)
  )
  patches = UNIT_PATCHES * sum(
    images.cost(*size)[0] for rollout in rollouts for size in rollout.image_sizes
  )
  print("| row tokens | row patches | lookahead | rows | token padding | patch padding | CPU s |")
  print("|---|---|---|---|---|---|---|")
  for row_tokens in (4096, 8192):
    row_patches = balanced_row_patches(*measured.costs.T[:2], row_tokens)
    row_patches = -(-row_patches // images.slot_multiple) * images.slot_multiple
    for lookahead in (1, 64, 512):
      start = time.process_time()
      budgets = np.array([row_tokens, row_patches, 256])
      plan = pack.plan(measured.costs, budgets, lookahead=lookahead)
      seconds = time.process_time() - start
      empty = 1 - patches / (len(plan) * row_patches)
      print(
        f"| {row_tokens} | {row_patches} | {lookahead} | {len(plan)} "
        f"| {plan.padding[0]:.1%} | {empty:.1%} | {seconds:.1f} |",
        flush=True,
      )


if __name__ == "__main__":
  app.run(main)
