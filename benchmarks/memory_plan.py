"""Memory of one device by the TPU compiler, beside the estimate of `aot --memory`; no TPU.

  python -m benchmarks.memory_plan [--only=lora|full|choices]

Qwen2.5-VL in rows of 4096 tokens. LoRA and QLoRA are data parallel over the chips of a slice, so that
each holds everything, as one GPU does; full training shards over them. "choices" are the settings that
save memory, one after the other, of full training. Needs the extra `tpu`. Results:
benchmarks/RESULTS.md.
"""

import time
from typing import Any, NamedTuple

import jax
from absl import app, flags

from bis_jax.compilation import memory
from bis_jax.compilation.compiled_step import plan_step
from configs import internvl_bis10_lora, qwen_3b_bis10, qwen_bis10, qwen_bis10_lora

_ONLY = flags.DEFINE_string("only", None, "one group of cases")


class Case(NamedTuple):
  recipe: Any
  slice: str
  rows: int  # per micro-batch and device
  remat: str = "full"
  changes: dict[str, Any] = {}

  @property
  def name(self) -> str:
    changes = ", ".join(f"{key} {value}" for key, value in self.changes.items())
    recipe = self.recipe.__name__.removeprefix("configs.")
    return f"{recipe} | {changes} | {self.slice} | {self.remat} | {self.rows}"


_V5P, _V6E = "v5p:2x2x1", "v6e:2x2"
_NF4, _INT8 = {"model.frozen_dtype": "nf4"}, {"model.frozen_dtype": "int8"}
_FIRST = {"optim.moment_dtype": "bfloat16"}
_MOMENTS = _FIRST | {"optim.second_moment_dtype": "bfloat16"}
CASES = {
  "lora": (
    Case(qwen_bis10_lora, _V5P, 1),
    Case(qwen_bis10_lora, _V6E, 1, changes=_NF4),
    Case(qwen_bis10_lora, _V5P, 5),
    Case(qwen_bis10_lora, _V5P, 1, "dots"),
    Case(internvl_bis10_lora, _V5P, 1),
    Case(qwen_bis10_lora, _V6E, 5, changes=_NF4),
    Case(qwen_bis10_lora, _V6E, 1, changes=_INT8),
  ),
  "full": (
    Case(qwen_bis10, _V5P, 1),
    Case(qwen_bis10, _V5P, 5),
    Case(qwen_bis10, _V5P, 1, "dots"),
    Case(qwen_3b_bis10, _V6E, 1),
    Case(qwen_bis10, "v5e:4x4", 1),
  ),
  "choices": tuple(
    Case(qwen_bis10, _V5P, 1, changes=changes)
    for changes in (
      {},
      {"model.frozen_dtype": "bfloat16"},
      _FIRST,
      _MOMENTS,
      {"model.trained_dtype": "bfloat16"},
      {"model.trained_dtype": "bfloat16"} | _MOMENTS,
      {"optim.on_host": True},
      {"optim.on_host": True} | _MOMENTS,
    )
  )
  + (Case(qwen_bis10, _V5P, 5), Case(qwen_bis10, _V5P, 20)),
}


def main(argv: list[str]) -> None:
  """Prints each line of a table once it is known."""
  del argv
  jax.config.update("jax_platforms", "cpu")
  for group, cases in CASES.items():
    for case in cases if _ONLY.value in (None, group) else ():
      print(f"| {case.name} | {_result(case, replicated=group == 'lora')} |", flush=True)


def _result(case: Case, replicated: bool) -> str:
  c = case.recipe.get_config()
  devices = 16 if case.slice.endswith("4x4") else 4
  c.inputs.row_patches = c.inputs.row_patches * 4096 // c.inputs.row_tokens
  c.inputs.row_tokens = c.inputs.max_length = 4096
  c.update_from_flattened_dict(case.changes | {"model.remat": case.remat})
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = (devices, 1, 1) if replicated else (1, devices, 1)
  c.inputs.row_multiple, c.train.accumulate = 80, 80 // devices // case.rows
  start = time.perf_counter()
  try:
    step = plan_step(c, case.slice)
  except Exception as error:
    return str(error).splitlines()[0][:300]
  if replicated:  # the same rows on one device, which holds everything
    c.train.global_batch //= devices
    c.inputs.row_multiple //= devices
  found = memory.estimate(c, 1 if replicated else devices)
  uses = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in step.memory.items())
  ours = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in found.uses.items())
  return (
    f"{step.rows} rows in {step.micro_batches} | {step.total / 1e9:.2f} GB | {uses} | "
    f"{found.total / 1e9:.2f} GB | {ours} | {found.total / step.total - 1:+.1%} | "
    f"{time.perf_counter() - start:.0f} s"
  )


if __name__ == "__main__":
  app.run(main)
