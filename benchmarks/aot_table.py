"""Memory and roofline of the recipes' training steps on TPU slices, from the TPU compiler; no TPU.

  python -m benchmarks.aot_table [--only=v5e:8x8] [--recipe=internvl_bis10] [--rollouts_per_group=1]

The paper's recipe (frozen tower, bfloat16, float32 parameters and moments, about 512 rollouts per
step in rows of 4096 or 8192 tokens), with the settings that a run takes by itself. Needs the extra
`tpu`.
Results: benchmarks/RESULTS.md.
"""

import resource
import time

import jax
from absl import app, flags

from bis_jax.compilation.compiled_step import compile_step, plan_step
from configs import (
  internvl3_14b_bis10,
  internvl_bis10,
  internvl_full,
  qwen3vl_bis10,
  qwen_bis10,
  qwen_full,
)

_ONLY = flags.DEFINE_string("only", None, "one slice of the table")
_RECIPE = flags.DEFINE_string("recipe", None, "a recipe of the table")
_GROUP = flags.DEFINE_integer(
  "rollouts_per_group", None, "with the same images and question; default: 3 if all are selected"
)
_WHOLE = flags.DEFINE_bool(
  "whole", False, "generate machine code too, which takes ten times as long"
)

# (recipe, slice, row tokens); the rest is what the chip's settings make of the recipe
CASES = (
  (qwen_bis10, "v4:2x2x4", 4096),
  (qwen_bis10, "v5e:8x8", 4096),
  (qwen_bis10, "v5e:8x8", 8192),
  (qwen_bis10, "v5p:2x2x4", 4096),
  (qwen_bis10, "v5p:2x2x4", 8192),
  (qwen_bis10, "v6e:4x4", 4096),
  (qwen_bis10, "v6e:4x4", 8192),
  (qwen_bis10, "tpu7x:2x2x1", 4096),
  (internvl_bis10, "v5e:8x8", 8192),
  (internvl_bis10, "v6e:4x4", 8192),
  (internvl3_14b_bis10, "v5e:8x8", 8192),
  (internvl3_14b_bis10, "v5p:2x2x4", 8192),
  (qwen3vl_bis10, "v5e:8x8", 4096),
  (qwen3vl_bis10, "v6e:4x4", 4096),
  # With shared prefixes: three rollouts per question.
  (qwen_full, "v5e:8x8", 8192),
  (qwen_full, "v6e:4x4", 8192),
  (internvl_full, "v5e:8x8", 8192),
  (internvl_full, "v6e:4x4", 8192),
)


def _seconds() -> float:
  """Processor seconds of this process and its ended children."""
  children = resource.getrusage(resource.RUSAGE_CHILDREN)
  return time.process_time() + children.ru_utime + children.ru_stime


def main(argv: list[str]) -> None:
  """Prints each line of the table once it is known."""
  del argv
  jax.config.update("jax_platforms", "cpu")  # no hardware is looked for
  print("| recipe | slice | row tokens | fsdp x tensor | micro-batches | rollouts ", end="")
  print("| GB per device | free | model-FLOPs bound | roofline | of the bound | limit | compile |")
  print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
  for recipe, topology, tokens in CASES:
    name = recipe.__name__.removeprefix("configs.")
    if _ONLY.value not in (None, topology) or _RECIPE.value not in (None, name):
      continue
    c = recipe.get_config()
    c.inputs.row_patches = c.inputs.row_patches * tokens // c.inputs.row_tokens
    c.inputs.row_tokens = c.inputs.max_length = tokens
    start = _seconds()
    step = (compile_step if _WHOLE.value else plan_step)(c, topology, None, _GROUP.value)
    print(
      f"| {name} | {topology} | {tokens} | {step.mesh['fsdp']} x {step.mesh['tensor']} "
      f"| {step.micro_batches} | {step.rollouts:.0f} "
      f"| {step.total / 1e9:.1f} of {step.chip.hbm_bytes / 1e9:.0f} | {step.free_memory:.0%} "
      f"| {step.rollouts / step.model_seconds:.0f} rollouts/s "
      f"| {step.rollouts / step.seconds:.0f} rollouts/s | {step.model_seconds / step.seconds:.0%} "
      f"| {max(step.bounds, key=step.bounds.__getitem__)} "
      f"| {_seconds() - start:.0f} s of processor time |",
      flush=True,
    )


if __name__ == "__main__":
  app.run(main)
