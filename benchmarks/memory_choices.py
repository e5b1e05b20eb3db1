"""What settings that save memory do to the loss: the toy corpus, the smallest model, 300 steps each.

  python -m benchmarks.memory_choices

All settings see the same batches from the same parameters. The bytes that each saves of a 7B model:
benchmarks/memory_plan.py. Results: benchmarks/RESULTS.md.
"""

import json
import pathlib
import tempfile

import numpy as np
from absl import app

from bis_jax.run import stages
from configs import qwen_bis10, qwen_bis10_lora

_STEPS, _LAST = 300, 100
_MOMENTS = {"optim.moment_dtype": "bfloat16", "optim.second_moment_dtype": "bfloat16"}
_TRAINED = {"model.trained_dtype": "bfloat16"}
CHOICES = {
  "full": (
    {},
    {"optim.moment_dtype": "bfloat16"},
    _MOMENTS,
    _TRAINED,
    _TRAINED | _MOMENTS,
    {"optim.on_host": True},
    {"train.accumulate": 4},
  ),
  "LoRA": tuple({"model.frozen_dtype": dtype} for dtype in ("float32", "bfloat16", "int8", "nf4")),
}


def main(argv: list[str]) -> None:
  """Prints a line per setting: the mean loss of the last steps, and its difference from the first's."""
  del argv
  with tempfile.TemporaryDirectory() as folder:
    for form, several in CHOICES.items():
      losses = []
      for number, changes in enumerate(several):
        losses.append(_losses(folder, f"{folder}/{form}{number}", form, changes))
        name = ", ".join(f"{key}={value}" for key, value in changes.items()) or "float32"
        difference = np.mean(losses[-1] - losses[0])
        print(f"| {form} | {name} | {losses[-1].mean():.4f} | {difference:+.4f} |", flush=True)


def _losses(cache: str, workdir: str, form: str, changes: dict[str, object]) -> np.ndarray:
  c = (qwen_bis10_lora if form == "LoRA" else qwen_bis10).get_config("toy")
  c.corpus.cache, c.model.size, c.inputs.row_multiple = f"{cache}/cache", "tiny", 8
  c.corpus.toy.rollouts, c.corpus.toy.images, c.corpus.toy.benchmark_items = 18_000, 4000, 24
  c.pretrain.steps, c.train.steps, c.train.checkpoint_every = 200, _STEPS, _STEPS
  c.train.log_every, c.evaluation.benchmark = 1, ""
  c.update_from_flattened_dict(changes)
  stages.run(c, workdir)
  lines = pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
  return np.array([json.loads(line)["loss"] for line in lines])[-_LAST:]


if __name__ == "__main__":
  app.run(main)
