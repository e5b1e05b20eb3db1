"""What a training step of the recipes takes on TPU slices, asked of the TPU compiler; no TPU needed.

    python -m benchmarks.aot_table [--only=v5e:8x8] [--recipe=internvl_bis10]

The paper's recipe (frozen tower, bfloat16, float32 master and moments, about 512 rollouts a step in
rows of 4096 or 8192 tokens), with settings at which it fits. Needs `pip install -e '.[tpu]'`.

Asked: at least 10 % of memory spare on v5p 2x2x4, v5e 8x8 and v6e 4x4, compiled in at most 5 minutes
on 2 cores. Measured, each by the command `bis_jax.aot` with the settings below, on 2 cores with other
work beside it (whole command; the seconds of processor time are the steadier figure):

    | slice | row tokens | fsdp x tensor | micro-batches | rollouts | GB a device | spare | model-FLOPs bound | roofline | processor, wall |
    |---|---|---|---|---|---|---|---|---|---|
    | v4:2x2x4 | 4096 | 16 x 1 | 5 | 530 | 16.6 of 34 | 52% | 163 rollouts/s | 118 rollouts/s | not noted, 638 s |
    | v4:2x2x4 | 8192 | 16 x 1 | 2 | 424 | 20.7 of 34 | 40% | 163 rollouts/s | 111 rollouts/s | not noted, 579 s |
    | v5e:8x8 | 4096 | 16 x 4 | 5 | 530 | 5.7 of 16 | 65% | 468 rollouts/s | 261 rollouts/s | 118 s, 744 s |
    | v5e:8x8 | 8192 | 16 x 4 | 2 | 424 | 7.2 of 16 | 55% | 468 rollouts/s | 209 rollouts/s | 118 s, 144 s |
    | v5p:2x2x4 | 4096 | 16 x 1 | 1 | 530 | 25.6 of 95 | 73% | 273 rollouts/s | 197 rollouts/s | 117 s, 258 s |
    | v5p:2x2x4 | 8192 | 16 x 1 | 1 | 424 | 23.0 of 95 | 76% | 273 rollouts/s | 185 rollouts/s | not noted |
    | v6e:4x4 | 4096 | 16 x 1 | 5 | 530 | 16.6 of 32 | 48% | 545 rollouts/s | 170 rollouts/s | 168 s, 156 s |
    | v6e:4x4 | 8192 | 16 x 1 | 2 | 424 | 20.7 of 32 | 35% | 545 rollouts/s | 137 rollouts/s | 187 s, 421 s |

On 2 cores without other work the compilations at 4096 took 40 s (v5e), 45 s (v5p) and 67 s (v6e), and
v5p at 8192 43 s.

The same of InternVL, whose rollouts are longer (rows of 28 tiles); asked: fits a stated slice. 14B on
v5e:8x8 with these settings has less than 10 % to spare:

    | recipe | slice | row tokens | fsdp x tensor | micro-batches | rollouts | GB a device | spare | model-FLOPs bound | roofline | processor, wall |
    |---|---|---|---|---|---|---|---|---|---|---|
    | internvl_bis10 | v5e:8x8 | 8192 | 16 x 4 | 5 | 469 | 8.6 of 16 | 46% | 198 rollouts/s | 124 rollouts/s | 159 s, 370 s |
    | internvl_bis10 | v6e:4x4 | 8192 | 16 x 1 | 5 | 469 | 22.2 of 32 | 31% | 230 rollouts/s | 65 rollouts/s | 228 s, 301 s |
    | internvl3_14b_bis10 | v5e:8x8 | 8192 | 16 x 4 | 5 | 469 | 14.6 of 16 | 9% | 107 rollouts/s | 55 rollouts/s | 164 s, 367 s |
    | internvl3_14b_bis10 | v5p:2x2x4 | 8192 | 16 x 1 | 1 | 469 | 66.3 of 95 | 30% | 62 rollouts/s | 42 rollouts/s | 154 s, 424 s |
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
  """Prints the table, a line as soon as it is known."""
  del argv
  jax.config.update("jax_platforms", "cpu")  # no hardware is looked for
  print(
    "| slice | row tokens | fsdp x tensor | micro-batches | rollouts | GB a device | spare ", end=""
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
      f"| {step.spare:.0%} | {step.rollouts / step.model_seconds:.0f} rollouts/s "
      f"| {step.rollouts / step.seconds:.0f} rollouts/s "
      f"| {step.lower_seconds + step.compile_seconds:.0f} s |",
      flush=True,
    )


if __name__ == "__main__":
  app.run(main)
