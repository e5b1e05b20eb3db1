"""Compiles the training step of a config for a TPU slice, without TPUs, and reports its cost.

    python -m bis_jax.aot --config=configs/qwen_bis10.py --topology=v5p:2x2x4
    python -m bis_jax.aot --config=configs/qwen_bis10.py --topology=v5e:8x8 --search
    python -m bis_jax.aot --config=configs/qwen_bis10_lora.py --memory=80GB --devices=1

Every key of the config can be overridden (--config.mesh.tensor=2). --search tries mesh shapes,
rematerialization and micro-batches, and lists the settings that leave 10 % of memory free first, by
predicted rate. Both stop before the compiler generates machine code, unless --whole is given. Needs
`pip install -e '.[tpu]'`; no weights, tokenizer, data or TPU. --memory compiles nothing: it estimates
what full training, LoRA and QLoRA take of any device, and says what to change if that is too much;
--memory=all says so of GPUs of 24 to 141 GB and of TPU slices.
"""

import sys
from collections.abc import Iterator

import jax
from absl import app, flags
from ml_collections import ConfigDict

from bis_jax.compilation import memory, step_search
from bis_jax.compilation.compiled_step import CompiledStep, compile_step, plan_step
from bis_jax.console import command
from bis_jax.errors import UserError
from bis_jax.models import backbones
from bis_jax.settings import recipe
from bis_jax.settings.config_check import check

recipe.define_flags()
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "TPU slice, such as v5p:2x2x4, v5e:8x8 or v6e:4x4"
)
_MEMORY = flags.DEFINE_string(
  "memory",
  None,
  "of a device, such as 80GB, in place of --topology; all: of GPUs and TPU slices",
)
_DEVICES = flags.DEFINE_integer("devices", 1, "number of devices of --memory", lower_bound=1)
_ROLLOUT_TOKENS = flags.DEFINE_float(
  "rollout_tokens", None, "mean token slots per rollout; default: as measured for the backbone"
)
_GROUP = flags.DEFINE_integer(
  "rollouts_per_group",
  None,
  "rollouts with the same images and question; default: 3 if the config selects all, else 1",
  lower_bound=1,
)
_WHOLE = flags.DEFINE_bool(
  "whole", False, "generate machine code too: ten times as long, but no kernel is left uncompiled"
)
_SEARCH = flags.DEFINE_bool("search", False, "try mesh shapes, rematerialization, micro-batches")


def report(config: ConfigDict, topology: str, step: CompiledStep) -> Iterator[str]:
  mesh = " x ".join(f"{axis} {size}" for axis, size in step.mesh.items())
  yield (
    f"{topology}, mesh {mesh}, remat {step.remat}: {step.rows} rows of "
    f"{step.layout.budgets[0]} tokens and {step.layout.budgets[1]} patches per step in "
    f"{step.micro_batches} micro-batches, {step.rollouts:.0f} rollouts"
  )
  if step.layout.streams[0]:
    number, length = step.layout.streams
    yield f"a row: {step.layout.prefix_tokens} tokens of prefixes, {number} streams of {length}"
  yield f"traced in {step.lower_seconds:.0f} s, compiled in {step.compile_seconds:.0f} s"
  yield f"memory per device, of {step.chip.hbm_bytes / 1e9:.1f} GB:"
  total = "total" if "program" in step.memory else "total, without machine code"
  for name, size in {**step.memory, total: step.total}.items():
    yield f"  {name:32}{size / 1e9:8.2f} GB"
  yield f"  {'free':32}{step.free_memory:8.1%}"
  yield "FLOPs per step, all devices:"
  flops = {
    "model": sum(step.model_flops.values()),
    "with recomputed and masked": step.executed_flops,
  }
  for name, count in {**step.model_flops, **flops}.items():
    yield f"  {name:32}{count / 1e12:12.1f} TFLOP"
  yield f"HBM traffic per device, loops in full: about {step.hbm_bytes / 1e9:.0f} GB; the most by"
  for operation in step.operations[:5]:
    yield f"  {operation.bytes / 1e9:8.1f} GB in {operation.calls:6} calls: {operation.name}"
  yield "collectives per device, loops in full:"
  for kind, (count, size) in step.collectives.items():
    yield f"  {kind:20}{count:8} calls, {size / 1e9:10.2f} GB in total"
  seconds = ", ".join(f"{name} {seconds:.2f}" for name, seconds in step.bounds.items())
  yield f"seconds per step at the chip's peak rates: {seconds}"
  yield (
    f"model-FLOPs bound {step.model_seconds:.2f} s, {step.rollouts / step.model_seconds:.0f} "
    f"rollouts/s; roofline {step.seconds:.2f} s, {step.rollouts / step.seconds:.0f} rollouts/s"
  )


def main(argv: list[str]) -> None:
  jax.config.update("jax_platforms", "cpu")  # the process itself must not look for accelerators
  topology = _TOPOLOGY.value or ""
  with command("aot", argv, "--search"):
    config = recipe.from_flags()
    check(config)
    if bool(_MEMORY.value) == bool(topology):
      raise UserError("set --topology=SLICE to compile for it, or --memory=80GB to estimate")
    if _MEMORY.value:
      everywhere = _MEMORY.value == "all"
      size = 0.0 if everywhere else memory.parse(_MEMORY.value)
      lines = memory.places(config) if everywhere else memory.table(config, size, _DEVICES.value)
      print(*lines, sep="\n")
      return
    compile = compile_step if _WHOLE.value else plan_step
    tokens = _ROLLOUT_TOKENS.value or backbones.get(config.model.backbone).rollout_tokens
    if _SEARCH.value:
      trials = []
      for trial in step_search.search(config, topology, tokens, compile):
        trials.append(trial)
        print(step_search.row(trial), file=sys.stderr, flush=True)  # progress
      print(*step_search.table(trials), sep="\n")
    else:
      step = compile(config, topology, tokens, _GROUP.value)
      print(*report(config, topology, step), sep="\n")


if __name__ == "__main__":
  app.run(main)
