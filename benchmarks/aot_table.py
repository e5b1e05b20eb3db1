"""Memory and roofline of the recipes' training steps on TPU slices, from the TPU compiler; no TPU.

  python -m benchmarks.aot_table [--only=v5e:8x8] [--recipe=internvl_bis10]

The paper's recipe (frozen tower, bfloat16, float32 parameters and moments, about 512 rollouts per
step in rows of 4096 or 8192 tokens), with settings at which it fits. Needs the extra `tpu`.
Results: benchmarks/RESULTS.md.
"""

import jax
from absl import app, flags

from bis_jax.compilation.compiled_step import compile_step
from configs import internvl3_14b_bis10, internvl_bis10, qwen_bis10

_ONLY = flags.DEFINE_string("only", None, "one slice of the table")
_RECIPE = flags.DEFINE_string("recipe", "qwen_bis10", "a recipe of the table")

# (recipe, slice, row tokens, tensor axis, micro-batches); the fsdp axis takes the other devices
CASES = (
  (qwen_bis10, "v4:2x2x4", 4096, 1, 5),
  (qwen_bis10, "v4:2x2x4", 8192, 1, 2),
  (qwen_bis10, "v5e:8x8", 4096, 4, 5),
  (qwen_bis10, "v5e:8x8", 8192, 4, 2),
  (qwen_bis10, "v5p:2x2x4", 4096, 1, 1),
  (qwen_bis10, "v5p:2x2x4", 8192, 1, 1),
  (qwen_bis10, "v6e:4x4", 4096, 1, 5),
  (qwen_bis10, "v6e:4x4", 8192, 1, 2),
  (internvl_bis10, "v5e:8x8", 8192, 4, 5),
  (internvl_bis10, "v6e:4x4", 8192, 1, 5),
  (internvl3_14b_bis10, "v5e:8x8", 8192, 4, 5),
  (internvl3_14b_bis10, "v5p:2x2x4", 8192, 1, 1),
)


def main(argv: list[str]) -> None:
  """Prints each line of the table once it is known."""
  del argv
  jax.config.update("jax_platforms", "cpu")  # no hardware is looked for
  print(
    "| slice | row tokens | fsdp x tensor | micro-batches | rollouts | GB per device | free ",
    end="",
  )
  print("| model-FLOPs bound | roofline | compile |")
  print("|---|---|---|---|---|---|---|---|---|---|")
  for recipe, topology, tokens, tensor, accumulate in CASES:
    if _ONLY.value not in (None, topology) or recipe.__name__ != f"configs.{_RECIPE.value}":
      continue
    c = recipe.get_config()
    c.inputs.row_patches = c.inputs.row_patches * tokens // c.inputs.row_tokens
    c.inputs.row_tokens = c.inputs.max_length = tokens
    c.mesh.tensor, c.train.accumulate = tensor, accumulate
    step = compile_step(c, topology)
    print(
      f"| {topology} | {tokens} | {step.mesh['fsdp']} x {tensor} | {accumulate} "
      f"| {step.rollouts:.0f} | {step.total / 1e9:.1f} of {step.chip.hbm_bytes / 1e9:.0f} "
      f"| {step.free_memory:.0%} | {step.rollouts / step.model_seconds:.0f} rollouts/s "
      f"| {step.rollouts / step.seconds:.0f} rollouts/s "
      f"| {step.lower_seconds + step.compile_seconds:.0f} s |",
      flush=True,
    )


if __name__ == "__main__":
  app.run(main)
