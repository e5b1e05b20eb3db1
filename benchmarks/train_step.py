"""Our training step against torch with Transformers: rollouts per second and peak memory.

  python -m benchmarks.train_step                      # 50M parameters, for a CPU
  python -m benchmarks.train_step --size=7b-layers=8   # 7B width, bfloat16, for a GPU of 80 GB

Both sides train the same rollouts: the reward loss on two logits at the step markers, the vision
tower frozen but for its merger and everything else trained, the 152,064-row embedding included, as
in the recipes; float32 parameters and moments, clipping, AdamW. Each runs in a process of its own,
one after the other. torch takes Transformers' decoder without an LM head, two rows at the markers
instead, and fused AdamW; once with the rollouts side by side in a padded batch, once one by one
with accumulated gradients, both by sdpa; on a GPU first in our packed rows by torch's FlashAttention
over variable lengths, the model in bfloat16 beside its float32 parameters, and once more with every
layer compiled. Peak memory is the process's on a CPU, the allocator's on a GPU. Seconds are the
median of the steps after the first two, which compile. The torch sides start from the same weights,
ours from others, so losses are not compared with ours here; tests/models/ does that. Results:
benchmarks/RESULTS.md.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags

from bis_jax.models.qwen2_5_vl.config import SIZES as QWEN_SIZES
from bis_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig, TextConfig, VisionConfig
from bis_jax.training import train_state, train_step

_SIZE = flags.DEFINE_string("size", "50m", '"50m", or "7b-layers=N"')
_STEPS = flags.DEFINE_integer("steps", 4, "steps to time, after the first")
_SIDE = flags.DEFINE_string("side", "", "one side alone, on --data; for the processes of a run")
_SIDES = flags.DEFINE_list("sides", [], "sides to measure; all that the size has, if empty")
_REMAT = flags.DEFINE_string("remat", "", "ours instead of the size's; torch recomputes if 'full'")
_ATTENTION = flags.DEFINE_string("attention", "auto", "our attention backend")
_DATA = flags.DEFINE_string("data", "", "file of the rollouts; likewise")

SIDES = ("bis_jax", "torch packed", "torch compiled", "torch padded", "torch one by one")
GPU_SIDES = ("torch packed", "torch compiled")  # FlashAttention is for GPUs
IMAGE_PAD, VISION_START, VISION_END, MARKER = 151655, 151652, 151653, 151665


@dataclasses.dataclass(frozen=True)
class Size:
  """A model and the rows of one step."""

  model: Qwen2_5_VLConfig
  rows: int
  micro_batches: int  # of ours
  row_tokens: int
  image_side: int  # pixels, at most


def size_of(name: str) -> Size:
  """Returns the size that --size names; raises ValueError."""
  if name == "50m":
    text = TextConfig(152_064, 256, 1024, 8, 2, 1)  # heads of 128, as published
    vision = VisionConfig(
      depth=4, hidden_size=192, intermediate_size=512, num_heads=4, full_attention_period=4
    )
    return Size(
      Qwen2_5_VLConfig(text, vision, remat="dots"),
      rows=4,
      micro_batches=2,
      row_tokens=1024,
      image_side=336,
    )
  if match := re.fullmatch(r"7b-layers=(\d+)", name):
    model = QWEN_SIZES["7b"]
    text = dataclasses.replace(model.text, num_hidden_layers=int(match[1]))
    model = dataclasses.replace(model, text=text, remat="full")
    return Size(model, rows=2, micro_batches=2, row_tokens=8192, image_side=896)
  raise ValueError(f'--size={name}: write "50m" or "7b-layers=N"')


def draw(size: Size) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
  """Returns (packed rows, the same rollouts unpacked).

  Lengths are log-normal with the percentiles of the released corpus, 155, 501 and 1524 tokens (1,
  50, 99), but none exceeds a row; a third of a rollout, or so, is its image.
  """
  from PIL import Image

  from benchmarks.row_budget import balanced_row_patches
  from bis_jax.inputs import pack
  from bis_jax.inputs.prompt import Sample
  from bis_jax.inputs.rows import RowWriter, empty_batch
  from bis_jax.models.qwen2_5_vl.images import QwenImages

  rng, images = np.random.default_rng(0), QwenImages(28 * 28, size.image_side**2)
  drawn = []
  for length in np.exp(rng.normal(np.log(501), 0.48, 40 * size.rows)):
    length = int(np.clip(length, 155, size.row_tokens))
    side = int(28 * np.clip(round((length / 3) ** 0.5), 2, size.image_side // 28))
    patches = images.patches(Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)))
    count = len(patches.unit_slot)
    tokens = rng.integers(0, 151_000, length, dtype=np.int32)
    tokens[4:6], tokens[6 : 6 + count] = VISION_START, IMAGE_PAD
    tokens[6 + count] = VISION_END
    markers = np.linspace(8 + count, length - 1, 6).astype(np.int32)
    tokens[markers] = MARKER
    drawn.append((Sample(tokens, markers, np.array([[6, count]])), patches))
  costs = np.array([[len(s.tokens), len(p.window), len(s.markers)] for s, p in drawn])
  row_patches = balanced_row_patches(*costs.T[:2], size.row_tokens)
  budgets = np.array([size.row_tokens, row_patches, 128])
  plan = pack.plan(costs, budgets)
  batch, alone = empty_batch(images, size.rows, budgets), []
  for b in range(size.rows):
    row = RowWriter(images, {name: array[b] for name, array in batch.items()})
    for i in plan.row(b).tolist():
      sample, patches = drawn[i]
      labels = rng.integers(0, 2, len(sample.markers)).astype(np.float32)
      row.add(sample, [patches], labels, np.ones_like(labels), example_index=i)
      pixels = np.zeros((len(patches.window), 1176), np.float32)
      patches.write_values(pixels)
      pixels = pixels.reshape(-1, 4, 1176)[patches.unit_slot].reshape(-1, 1176)
      grid = np.array([1, 2 * patches.grid[0], 2 * patches.grid[1]])
      alone.append(
        {
          "row": np.array(b),
          "tokens": sample.tokens,
          "positions": images.positions(len(sample.tokens), sample.image_spans, [patches]),
          "markers": sample.markers,
          "labels": labels,
          "pixels": pixels,
          "grid": grid,
        }
      )
  return batch, alone


def our_step(size: Size) -> train_step.TrainStep:
  """Returns the step of a size; allocates no array."""
  import jax

  from bis_jax.parallel.sharding import make_mesh
  from configs import common

  mesh = make_mesh(1, 1, 1, jax.devices()[:1])
  return train_step.step_of(common.get_config(), size.model, mesh, 100)


def run_ours(size: Size, batch: dict[str, np.ndarray], steps: int) -> dict[str, Any]:
  """Trains on packed rows; returns what `_measure` does, and the share of the peak, if known."""
  sys.modules["torch"] = None  # our side needs none; Transformers' image sizes would load it
  import jax

  from bis_jax.inputs.rows import device_arrays
  from bis_jax.models.model_flops import trained_stages
  from bis_jax.parallel.devices import peak_flops
  from bis_jax.parallel.sharding import put_rows
  from bis_jax.training import metrics

  ours, device = our_step(size), jax.devices()[0]
  params = {}
  for path, shape in (ours.state.params | ours.frozen).items():  # one by one, as weights are read
    key = jax.random.key(len(params))
    params[path] = jax.jit(_drawn, static_argnums=(0, 1), out_shardings=shape.sharding)(
      shape.shape, shape.dtype, float(path.endswith("scale")), key
    )
  frozen = {path: params.pop(path) for path in ours.frozen}
  state = train_state.first_state(ours.optimizer, params, ours.state)
  del params

  def step() -> float:
    nonlocal state
    arrays = put_rows(device_arrays(batch), ours.step.mesh, size.micro_batches)
    state, values = ours.step(state, frozen, arrays)
    return float(values["loss"])

  measured = _measure(step, steps) | {"device": device.device_kind}
  if device.platform != "cpu":
    measured["peak_bytes"] = device.memory_stats()["peak_bytes_in_use"]
  if peak := peak_flops(device.device_kind):
    flops = metrics.batch_counts(batch, size.model, trained_stages(size.model, ours.factors))[
      "flops"
    ]
    measured["mfu"] = flops / measured["seconds"] / peak
  return measured


def _drawn(shape: tuple[int, ...], dtype: Any, scale: float, key: Any) -> Any:
  """Returns ones if `scale` is 1, small random numbers if it is 0."""
  import jax

  return (jax.random.normal(key, shape, "float32") * 0.02 * (1 - scale) + scale).astype(dtype)


def run_torch(
  size: Size, rollouts: list[dict[str, np.ndarray]], steps: int, side: str
) -> dict[str, Any]:
  """Trains the same with Transformers; returns what `_measure` does."""
  import torch
  from transformers import AttentionInterface, Qwen2_5_VLModel
  from transformers import Qwen2_5_VLConfig as TorchConfig

  device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
  torch.manual_seed(0)
  packed = side in GPU_SIDES
  AttentionInterface.register("flash_packed", _flash_attention)
  config = TorchConfig(
    **size.model.to_hugging_face(),
    image_token_id=IMAGE_PAD,
    vision_start_token_id=VISION_START,
    vision_end_token_id=VISION_END,
    attn_implementation="sdpa",
  )
  with device:
    model = Qwen2_5_VLModel(config).train()
    head = torch.nn.Linear(size.model.text.hidden_size, 2, bias=False)
  for name, parameter in model.visual.named_parameters():
    parameter.requires_grad_(name.startswith("merger"))
  if size.model.remat == "full":
    model.gradient_checkpointing_enable({"use_reentrant": False})
  trained = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
  exact = [p.detach().clone().requires_grad_() for p in trained] if packed else trained
  if packed:
    model.bfloat16(), head.bfloat16()
    # Set here, because at the start Transformers looks for a kernel of this name on the Hub.
    config._attn_implementation = "flash_packed"
  if side == "torch compiled":
    for layer in model.language_model.layers:
      layer.compile(dynamic=False)
    for layer in model.visual.blocks:  # the patches of rows differ in number
      layer.compile(dynamic=True)
  groups = [
    {"params": [p for p in exact if p.ndim > 1], "weight_decay": 0.05},
    {"params": [p for p in exact if p.ndim <= 1], "weight_decay": 0.0},
  ]
  optimizer = torch.optim.AdamW(groups, lr=1e-7, fused=True)
  if packed:
    rows = [[r for r in rollouts if r["row"] == row] for row in range(size.rows)]
    parts = [_collate_packed(row, size.row_tokens, device) for row in rows]
  elif side == "torch padded":
    parts = [_collate(rollouts, device)]
  else:
    parts = [_collate([rollout], device) for rollout in rollouts]
  markers = sum(len(rollout["markers"]) for rollout in rollouts)
  autocast = size.model.dtype == "bfloat16" and not packed
  bf16 = torch.autocast(device.type, torch.bfloat16, enabled=autocast)

  def step() -> float:
    total = 0.0
    for inputs, where, labels, starts in parts:
      _TEXT["starts"], _TEXT["longest"] = starts, size.row_tokens
      with bf16:
        states = model(**inputs, use_cache=False).last_hidden_state
        logits = head(states[where]).float()
      loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / markers
      loss.backward()
      total += loss.detach()
    if packed:
      for parameter, rounded in zip(exact, trained, strict=True):
        parameter.grad, rounded.grad = rounded.grad.float(), None
    torch.nn.utils.clip_grad_norm_(exact, 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if packed:
      torch._foreach_copy_([p.detach() for p in trained], [p.detach() for p in exact])
    return float(total)

  measured = _measure(step, steps) | {"attention": config._attn_implementation}
  if device.type == "cuda":
    measured["peak_bytes"] = torch.cuda.max_memory_allocated()
  return measured


_TEXT: dict[
  str, Any
] = {}  # where the samples of the row at hand start, and a bound of their length


def _flash_attention(
  module,
  query,
  key,
  value,
  attention_mask,
  scaling=None,
  cu_seq_lens_q=None,
  max_length_q=None,
  **unused,
):
  """FlashAttention of torch over samples of [1, heads, tokens, width], for Transformers."""
  import torch

  causal = cu_seq_lens_q is None  # the vision tower passes the starts of its images and windows
  starts, longest = (
    (_TEXT["starts"], _TEXT["longest"]) if causal else (cu_seq_lens_q.int(), max_length_q)
  )
  query, key, value = (x[0].transpose(0, 1).bfloat16() for x in (query, key, value))
  lengths = starts, starts, longest, longest
  out = torch.ops.aten._flash_attention_forward(
    query, key, value, *lengths, 0.0, causal, False, scale=scaling
  )
  return out[0][None], None


def _collate_packed(
  rollouts: list[dict[str, np.ndarray]], row_tokens: int, device: Any
) -> tuple[dict, Any, Any, Any]:
  """Returns what `_collate` does of one row; the padding at its end is a sample of its own."""
  import torch

  lengths = [len(rollout["tokens"]) for rollout in rollouts]
  rest = row_tokens - sum(lengths)
  tokens = np.concatenate([*(rollout["tokens"] for rollout in rollouts), np.zeros(rest, np.int32)])
  padding = np.tile(np.arange(rest), (3, 1))
  positions = np.concatenate([*(rollout["positions"] for rollout in rollouts), padding], axis=1)
  starts = np.cumsum([0, *lengths] + [rest] * (rest > 0))
  where = np.concatenate([r["markers"] + s for r, s in zip(rollouts, starts, strict=False)])
  inputs = {
    "input_ids": torch.tensor(tokens)[None].long(),
    "position_ids": torch.tensor(positions)[:, None].long(),
    "pixel_values": torch.tensor(np.concatenate([rollout["pixels"] for rollout in rollouts])),
    "image_grid_thw": torch.tensor(np.stack([rollout["grid"] for rollout in rollouts])),
  }
  inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
  index = torch.zeros(len(where), dtype=torch.long, device=device), torch.tensor(where).to(device)
  labels = torch.tensor(np.concatenate([1 - r["labels"] for r in rollouts])).long().to(device)
  starts = np.pad(starts, (0, 64 - len(starts)), mode="edge")  # of one shape, for the compiler
  return inputs, index, labels, torch.tensor(starts, dtype=torch.int32, device=device)


def _collate(rollouts: list[dict[str, np.ndarray]], device: Any) -> tuple[dict, Any, Any, Any]:
  """Returns (model inputs, padded on the right; marker positions; their classes; None)."""
  import torch

  length = max(len(rollout["tokens"]) for rollout in rollouts)
  tokens = torch.zeros((len(rollouts), length), dtype=torch.long)
  inside = torch.zeros_like(tokens)
  for row, rollout in enumerate(rollouts):
    tokens[row, : len(rollout["tokens"])] = torch.tensor(rollout["tokens"])
    inside[row, : len(rollout["tokens"])] = 1
  rows = np.repeat(np.arange(len(rollouts)), [len(rollout["markers"]) for rollout in rollouts])
  inputs = {
    "input_ids": tokens,
    "mm_token_type_ids": (tokens == IMAGE_PAD).int(),
    "pixel_values": torch.tensor(np.concatenate([rollout["pixels"] for rollout in rollouts])),
    "image_grid_thw": torch.tensor(np.stack([rollout["grid"] for rollout in rollouts])),
  }
  if len(rollouts) > 1:
    inputs["attention_mask"] = inside
  where = torch.tensor(rows), torch.tensor(np.concatenate([r["markers"] for r in rollouts]))
  labels = torch.tensor(np.concatenate([1 - r["labels"] for r in rollouts])).long()
  inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
  return inputs, tuple(index.to(device) for index in where), labels.to(device), None


def _measure(step: Callable[[], float], steps: int) -> dict[str, Any]:
  """Returns the median seconds of a step, CPU seconds of one, losses and the process's peak."""
  losses, seconds, cpu_seconds = [step(), step()], [], []
  for _ in range(steps):
    start, cpu_start = time.perf_counter(), time.process_time()
    losses.append(step())
    seconds.append(time.perf_counter() - start)
    cpu_seconds.append(time.process_time() - cpu_start)
  peak = re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())
  return {
    "seconds": float(np.median(seconds)),
    "cpu_seconds": float(np.median(cpu_seconds)),
    "losses": losses,
    "peak_bytes": int(peak[1]) * 1024,
  }


def _run_side(size: Size, side: str, data: str, steps: int) -> dict[str, Any]:
  """Reads the rollouts and measures one side in this process."""
  with np.load(data) as arrays:
    if side == "bis_jax":
      return run_ours(
        size, {n[5:]: arrays[n] for n in arrays.files if n.startswith("rows.")}, steps
      )
    rollouts = [{} for _ in range(int(arrays["rollouts"]))]
    for name in arrays.files:
      number, _, key = name.partition(".")
      if number.isdigit():
        rollouts[int(number)][key] = arrays[name]
  return run_torch(size, rollouts, steps, side)


def main(argv: list[str]) -> None:
  """Measures every side and prints the table."""
  del argv
  size = size_of(_SIZE.value)
  changes = {"attention": _ATTENTION.value} | ({"remat": _REMAT.value} if _REMAT.value else {})
  size = dataclasses.replace(size, model=dataclasses.replace(size.model, **changes))
  if _SIDE.value:
    print(json.dumps(_run_side(size, _SIDE.value, _DATA.value, _STEPS.value)))
    return
  sides = _SIDES.value or [s for s in SIDES if s not in GPU_SIDES or "7b" in _SIZE.value]
  batch, rollouts = draw(size)
  tokens = sum(len(rollout["tokens"]) for rollout in rollouts)
  print(
    f"{len(rollouts)} rollouts per step, {tokens} tokens in {size.rows} rows of {size.row_tokens}, "
    f"{len(os.sched_getaffinity(0))} CPU cores"
  )
  results = {}
  with tempfile.TemporaryDirectory() as folder:
    data = os.path.join(folder, "rollouts.npz")
    arrays = {f"{i}.{name}": a for i, r in enumerate(rollouts) for name, a in r.items()}
    arrays |= {f"rows.{name}": array for name, array in batch.items()}
    np.savez(data, rollouts=len(rollouts), **arrays)
    for side in sides:
      command = [sys.executable, "-m", "benchmarks.train_step", f"--size={_SIZE.value}"]
      command += [f"--steps={_STEPS.value}", f"--side={side}", f"--data={data}"]
      command += [f"--remat={_REMAT.value}", f"--attention={_ATTENTION.value}"]
      output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
      results[side] = one = json.loads(output.splitlines()[-1])
      print(
        f"{side:18} {len(rollouts) / one['seconds']:7.2f} rollouts/s "
        f"({len(rollouts) / one['cpu_seconds']:.2f} a CPU second), peak "
        f"{one['peak_bytes'] / 1e9:.2f} GB, losses {one['losses'][0]:.3f} {one['losses'][-1]:.3f}, "
        + ", ".join(f"{n} {one[n]}" for n in ("device", "attention", "mfu") if n in one),
        flush=True,
      )
  ours = results.pop("bis_jax", None)
  for side, other in results.items() if ours else ():
    print(
      f"against {side}: {other['seconds'] / ours['seconds']:.2f} x the rollouts/s "
      f"({other['cpu_seconds'] / ours['cpu_seconds']:.2f} by CPU seconds), "
      f"{ours['peak_bytes'] / other['peak_bytes']:.2f} x the peak memory"
    )


if __name__ == "__main__":
  app.run(main)
