"""Loads a 3B random checkpoint (7.5 GB, bfloat16) onto 8 fake devices, and with Transformers.

  python benchmarks/load_weights.py --folder=FOLDER

FOLDER gets the checkpoint (two files and an index) on the first call. Each load is a process of its
own; ours and Transformers' alternate. Prints seconds, peak resident memory of the process, and its
ratio to the size of the arrays. Results: benchmarks/RESULTS.md.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np
from absl import app, flags

_FOLDER = flags.DEFINE_string("folder", "", "of the checkpoint; written where it is empty")
_LOAD = flags.DEFINE_enum("load", "", ["", "bis_jax", "transformers"], "one load, in this process")

DEVICES, ROUNDS = 8, 2


def write_checkpoint(folder: pathlib.Path) -> None:
  """Writes random weights of Qwen2.5-VL-3B as the hub stores them: tied, two files, an index."""
  import ml_dtypes
  import safetensors.numpy

  config, shapes = _model()
  from bis_jax.models.qwen2_5_vl.hub_layout import layout

  normal = np.random.default_rng(0).normal(scale=0.02, size=2**26).astype(ml_dtypes.bfloat16)
  keys = {
    key: tensor.shape
    for tensor in layout(config, {}).tensors(shapes).values()
    for key in tensor.keys
  }
  names = sorted(keys)
  half = np.searchsorted(np.cumsum([np.prod(keys[name]) for name in names]), 2 * 10**9)
  weight_map = {}
  for number, part in enumerate((names[:half], names[half:]), start=1):
    file = f"model-{number:05}-of-00002.safetensors"
    content = {key: _repeated(normal[i:], keys[key]) for i, key in enumerate(part)}
    safetensors.numpy.save_file(content, folder / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(part, file)
  index = {"metadata": {}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  (folder / "config.json").write_text(json.dumps(config.to_hugging_face()))


def _repeated(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Returns the values repeated to `shape`; a view if there are enough."""
  size = int(np.prod(shape))
  if size > len(values):
    values = np.tile(values, -(-size // len(values)))
  return values[:size].reshape(shape)


def _model():
  """Returns the 3B config in bfloat16 and the shapes of its parameters, split over all devices."""
  import dataclasses

  from bis_jax.models import backbones
  from bis_jax.models.qwen2_5_vl.config import SIZES as QWEN_SIZES
  from bis_jax.parallel import sharding

  config = dataclasses.replace(QWEN_SIZES["3b"], param_dtype="bfloat16")
  _, shapes = backbones.structure(config, sharding.make_mesh(data=1, fsdp=-1, tensor=1))
  return config, shapes


def load_ours(folder: pathlib.Path) -> int:
  """Loads into the fake devices; returns the bytes of the arrays."""
  import jax

  from bis_jax.hub import weights

  config, shapes = _model()
  assert len(jax.devices()) == DEVICES
  params = weights.load(folder, config, shapes, yes_token=9454, no_token=2753, marker_token=151665)
  return sum(jax.block_until_ready(value).nbytes for value in params.values())


def load_theirs(folder: pathlib.Path) -> int:
  """Loads with Transformers onto the CPU; returns the bytes of the parameters.

  They are copied once: Transformers leaves them in the mapped file, unread until they are used.
  """
  import torch
  from transformers import Qwen2_5_VLForConditionalGeneration

  model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
  for p in model.parameters():
    p.data = p.data.clone()
  return sum(p.numel() * p.element_size() for p in model.parameters())


def main(argv: list[str]) -> None:
  """Writes the checkpoint if it is not there, then loads it in turns."""
  del argv
  folder = pathlib.Path(_FOLDER.value)
  if _LOAD.value:
    start = time.perf_counter()
    size = {"bis_jax": load_ours, "transformers": load_theirs}[_LOAD.value](folder)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
      f"{_LOAD.value:13} {seconds:6.1f} s with imports, arrays {size / 1e9:.2f} GB, "
      f"peak resident {peak / 1e9:.2f} GB, ratio {peak / size:.3f}"
    )
    return
  folder.mkdir(parents=True, exist_ok=True)
  if not any(folder.iterdir()):
    write_checkpoint(folder)
  flags_ = f"--xla_force_host_platform_device_count={DEVICES}"
  environment = os.environ | {"XLA_FLAGS": flags_, "JAX_PLATFORMS": "cpu"}
  for _ in range(ROUNDS):
    for name in ("bis_jax", "transformers"):
      command = [sys.executable, __file__, f"--folder={folder}", f"--load={name}"]
      subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
  app.run(main)
