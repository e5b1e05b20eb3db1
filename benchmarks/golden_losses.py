"""Fifty toy training steps per backbone, compared with the losses stored in tests/golden.

  python -m benchmarks.golden_losses            # compares; exit code 1 if a loss differs
  python -m benchmarks.golden_losses --write    # stores what this checkout computes

A refactoring must leave the losses and the SHA-256 of the final parameters equal to the bit on the
machine where they were stored. Another processor or jax release rounds differently, so the exit
code depends on a relative tolerance of 1e-3 only, and bit equality is printed.
"""

import hashlib
import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPES = ("qwen_bis10", "internvl_bis10", "qwen3vl_bis10")
TOLERANCE = 1e-3


def measure(recipe: str) -> dict[str, object]:
  """Returns {"losses": [50 floats], "parameters": SHA-256, "jax": version} of a short toy run."""
  import importlib

  from bis_jax.run import stages

  config = importlib.import_module(f"configs.{recipe}").get_config("toy")
  config.corpus.toy.rollouts, config.corpus.toy.images = 3000, 1000
  config.corpus.toy.benchmark_items = 24
  config.pretrain.steps, config.train.steps, config.train.checkpoint_every = 20, 50, 50
  config.train.log_every, config.train.compile_cache = 1, ""
  config.evaluation.benchmark = ""
  with tempfile.TemporaryDirectory() as folder:
    config.corpus.cache = f"{folder}/cache"
    stages.run(config, f"{folder}/run")
    lines = (pathlib.Path(folder) / "run/metrics.jsonl").read_text().splitlines()
    with ocp.StandardCheckpointer() as checkpointer:
      state = checkpointer.restore(pathlib.Path(folder) / "run/checkpoints/50/state")
  digest = hashlib.sha256()
  for path, leaf in sorted(state["params"].items()):
    digest.update(path.encode() + np.asarray(leaf).tobytes())
  losses = [json.loads(line)["loss"] for line in lines]
  return {"losses": losses, "parameters": digest.hexdigest(), "jax": jax.__version__}


def main(arguments: list[str]) -> int:
  """Compares or stores the recipes and returns the exit code."""
  code = 0
  for recipe in RECIPES:
    path, found = ROOT / "tests" / "golden" / f"{recipe}.json", measure(recipe)
    if arguments == ["--write"]:
      path.write_text(json.dumps(found, indent=1) + "\n")
      continue
    stored = json.loads(path.read_text())
    exact = all(stored[key] == found[key] for key in ("losses", "parameters"))
    close = np.allclose(stored["losses"], found["losses"], rtol=TOLERANCE)
    worst = np.max(np.abs(np.divide(found["losses"], stored["losses"]) - 1))
    print(f"{recipe}: {'bit-equal' if exact else f'largest relative difference {worst:.1e}'}")
    code |= not close
  return int(code)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
