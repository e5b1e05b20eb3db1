"""Compiles the training step of a config for a TPU slice, without TPUs, and says what it takes.

    python -m bis_jax.aot --config=configs/qwen_bis10.py --topology=v5p:2x2x4
    python -m bis_jax.aot --config=configs/qwen_bis10.py --topology=v5e:8x8 --search

Every key of the config can be overridden (--config.mesh.tensor=2). With --search, mesh shapes,
recomputation and micro-batches are tried, and what fits with 10 % to spare is listed, the highest
predicted rate first. Needs `pip install -e '.[tpu]'`; no weights, tokenizer, data or TPU.
"""

import sys
from collections.abc import Iterator

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from bis_jax.compilation import step_search
from bis_jax.compilation.compiled_step import ROLLOUT_TOKENS, CompiledStep, compile_step
from bis_jax.parallel.devices import TopologyError
from bis_jax.parallel.sharding import MeshError
from bis_jax.settings.config_check import ConfigError, check

_CONFIG = config_flags.DEFINE_config_file("config", None, "a file of configs/", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "slice, such as v5p:2x2x4, v5e:8x8, v6e:4x4")
_ROLLOUT_TOKENS = flags.DEFINE_float(
  "rollout_tokens",
  None,
  "token slots of a row that a rollout takes on average; default: as measured",
)
_SEARCH = flags.DEFINE_bool("search", False, "try mesh shapes, recomputation and micro-batches")


def report(config: ConfigDict, topology: str, step: CompiledStep) -> Iterator[str]:
  """Yields the lines that describe a compiled step."""
  gb = step.chip.hbm_bytes / 1e9
  yield (
    f"{topology}, mesh {_axes(step.mesh)}, remat {config.model.remat}: {step.rows} rows of "
    f"{config.inputs.row_tokens} tokens and {config.inputs.row_patches} patches a step in "
    f"{step.micro_batches} micro-batches, {step.rollouts:.0f} rollouts"
  )
  yield f"compiled in {step.lower_seconds:.0f} + {step.compile_seconds:.0f} s (trace, compiler)"
  yield f"memory of a device, of {gb:.1f} GB:"
  known = step.parameters + step.optimizer + step.batch + step.temporaries + step.code
  for name, size in (
    ("parameters", step.parameters),
    ("optimiser", step.optimizer),
    ("batch", step.batch),
    ("gradients, activations, buffers", step.temporaries),
    ("program", step.code),
    ("padding of layouts", step.total - known),
    ("total", step.total),
  ):
    yield f"  {name:32}{size / 1e9:8.2f} GB"
  yield f"  {'spare':32}{step.spare:8.1%}"
  yield "operations of a step, all devices:"
  for name, flops in step.model_flops.items():
    yield f"  {name:32}{flops / 1e12:12.1f} TFLOP"
  yield f"  {'model':32}{sum(step.model_flops.values()) / 1e12:12.1f} TFLOP"
  yield f"  {'with recomputed and masked':32}{step.executed_flops / 1e12:12.1f} TFLOP"
  yield (
    f"XLA's cost analysis, a device, every loop body once: {step.xla_flops / 1e12:.1f} TFLOP, "
    f"{step.xla_bytes / 1e9:.1f} GB"
  )
  yield f"moved through HBM by a device, loops in full: about {step.hbm_bytes / 1e9:.0f} GB"
  yield "collectives of a device, loops in full:"
  for kind, (count, size) in step.collectives.items():
    yield f"  {kind:20}{count:8} x {size / 1e9:10.2f} GB in all"
  yield "seconds of a step at the chip's peaks: " + ", ".join(
    f"{name} {seconds:.2f}" for name, seconds in step.parts.items()
  )
  yield (
    f"model-FLOPs bound {step.model_seconds:.2f} s, {step.rollouts / step.model_seconds:.0f} "
    f"rollouts/s; roofline {step.seconds:.2f} s, {step.rollouts / step.seconds:.0f} rollouts/s"
  )


def _axes(mesh) -> str:
  return " x ".join(f"{axis} {size}" for axis, size in mesh.items())


def main(argv: list[str]) -> None:
  """Prints the report, or the table of the search; input that cannot be used ends it with 1."""
  if len(argv) > 1:
    sys.exit(f"aot: what is {argv[1]!r}? Every argument is a flag, like --topology=v5p:2x2x4")
  jax.config.update("jax_platforms", "cpu")  # no hardware is looked for
  config, topology = _CONFIG.value, _TOPOLOGY.value
  try:
    check(config)
    tokens = _ROLLOUT_TOKENS.value or ROLLOUT_TOKENS[config.model.backbone]
    if _SEARCH.value:
      tried = []
      for one in step_search.search(config, topology, tokens):
        tried.append(one)
        print(step_search.row(one), file=sys.stderr, flush=True)  # what takes minutes shows itself
      print(*step_search.table(tried), sep="\n")
    else:
      print(*report(config, topology, compile_step(config, topology, tokens)), sep="\n")
  except (ConfigError, MeshError, TopologyError) as error:
    sys.exit(f"aot: {error}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "topology"])
  app.run(main)
