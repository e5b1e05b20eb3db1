"""Memory of one device for training with LoRA and QLoRA, from the TPU compiler; no TPU.

  python -m benchmarks.memory_plan [--only=nf4]

Qwen2.5-VL-7B in rows of 4096, one row per micro-batch and device, every layer rematerialized; data
parallel over four chips, so that each holds everything, as one GPU does. Needs the extra `tpu`.
Results: benchmarks/RESULTS.md.
"""

import time

import jax
from absl import app, flags

from bis_jax.compilation.compiled_step import plan_step
from configs import internvl_bis10_lora, qwen_bis10_lora

_ONLY = flags.DEFINE_string("only", None, "one frozen dtype")

# (recipe, frozen dtype, slice, rematerialization, rows per micro-batch)
CASES = (
  (qwen_bis10_lora, "bfloat16", "v5p:2x2x1", "full", 1),
  (qwen_bis10_lora, "nf4", "v6e:2x2", "full", 1),
  (qwen_bis10_lora, "bfloat16", "v5p:2x2x1", "full", 5),
  (qwen_bis10_lora, "bfloat16", "v5p:2x2x1", "dots", 1),
  (internvl_bis10_lora, "bfloat16", "v5p:2x2x1", "full", 1),
  (qwen_bis10_lora, "nf4", "v6e:2x2", "full", 5),
  (qwen_bis10_lora, "int8", "v6e:2x2", "full", 1),
)


def main(argv: list[str]) -> None:
  """Prints each line of the table once it is known."""
  del argv
  jax.config.update("jax_platforms", "cpu")
  for recipe, dtype, topology, remat, rows in CASES:
    if _ONLY.value not in (None, dtype):
      continue
    c, name = recipe.get_config(), recipe.__name__.removeprefix("configs.")
    c.model.frozen_dtype, c.model.remat = dtype, remat
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 4, 1, 1
    c.train.accumulate, c.inputs.row_multiple = 20 // rows, 80
    start = time.perf_counter()
    try:
      step = plan_step(c, topology)
    except Exception as error:
      print(f"| {name} | {dtype} | {topology} | {str(error).splitlines()[0][:300]} |", flush=True)
      continue
    uses = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in step.memory.items())
    print(
      f"| {name} | {dtype} | {topology} | {remat} | {step.rows} rows in {step.micro_batches} | {step.total / 1e9:.2f} GB "
      f"| {uses} | {time.perf_counter() - start:.0f} s |",
      flush=True,
    )


if __name__ == "__main__":
  app.run(main)
