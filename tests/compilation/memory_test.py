"""Estimates of memory against counts by hand, and what they advise.

benchmarks/memory_plan.py compares them with the TPU compiler.
"""

import pytest

from bis_jax.compilation import memory
from bis_jax.errors import UserError
from configs import qwen_3b_bis10, qwen_bis10, qwen_bis10_lora
from tests.commands import run_command


def test_parameters_and_moments_are_counted():
  """7.07 billion decoder parameters and a merger train in full; the tower is frozen in float32."""
  found = dict(memory.forms(qwen_bis10.get_config()))
  full, lora, qlora = (memory.estimate(found[name], 1).uses for name in ("full", "LoRA", "QLoRA"))
  parameters = full["parameters"] / 4
  assert 7.7e9 < parameters < 7.8e9  # without the LM head
  assert full["optimizer state"] == pytest.approx(8 * 7.115e9, rel=0.001)
  assert full["gradients"] == full["optimizer state"] - 8  # and two counts of steps
  adapters = 28 * 16 * (4 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944)) + 3584
  merger = 5120 * (5120 + 1) + 3584 * (5120 + 1) + 1280
  trained = adapters + merger + 2 * 3584
  assert lora["optimizer state"] == pytest.approx(8 * trained, rel=1e-6)
  assert lora["parameters"] == pytest.approx(2 * parameters, rel=0.03)
  kernels = 28 * 233_046_016
  assert lora["parameters"] - qlora["parameters"] > kernels * (2 - 0.5 - 2 / 64) * 0.99


def test_devices_share_the_state_but_not_the_rows():
  c = qwen_bis10.get_config()
  one, eight = memory.estimate(c, 1).uses, memory.estimate(c, 8).uses
  for use in ("parameters", "optimizer state", "gradients"):
    assert eight[use] == pytest.approx(one[use] / 8, rel=0.01)
  assert eight["activations"] == one["activations"]
  assert eight["kernels in use"] == one["kernels in use"]


def test_the_report_says_what_fits_and_what_to_change():
  lines = [*memory.table(qwen_bis10_lora.get_config(), 24e9, 1)]
  assert "full" in lines[1] and lines[1].endswith("does not fit: needs 16 such devices")
  assert lines[3].startswith("  QLoRA") and lines[3].endswith("fits")
  [_, full, lora, _] = memory.table(qwen_bis10_lora.get_config(), 80e9, 1)
  assert lora.endswith("fits") and not full.endswith("fits")
  c = qwen_3b_bis10.get_config()
  c.model.remat, c.train.accumulate = "none", 1
  [_, full, *_] = memory.table(c, 80e9, 8)
  assert full.endswith("set config.model.remat to full and config.train.accumulate to 0")


def test_the_command_needs_a_slice_or_a_memory():
  assert memory.parse("141 GB") == 141e9 and memory.parse("16GiB") == 2**34
  with pytest.raises(UserError, match="write --memory=80GB"):
    memory.parse("80")
  named = "--config=configs/qwen_bis10_lora.py"
  assert "--memory=80GB to estimate" in run_command("aot", named)
  assert run_command("aot", named, "--memory=80GB") is None
