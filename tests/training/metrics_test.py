"""Rates, goodput and FLOPs against sums by hand, with a clock that the test advances."""

import json

import numpy as np
import pytest
from etils import epath

from bis_jax.models.model_flops import step_flops
from bis_jax.models.qwen2_5_vl.config import SIZES as QWEN_SIZES
from bis_jax.parallel.devices import peak_flops
from bis_jax.training.metrics import Goodput, MetricWriter, Rates, batch_counts

COUNTS = dict(
  tokens=600, token_slots=800, patches=64, patch_slots=128, rollouts=4, flops=3e12
)  # of a step


class Clock:
  """A clock that stops until `passes`."""

  def __init__(self, now: float):
    self.now = now

  def __call__(self) -> float:
    return self.now

  def passes(self, seconds: float) -> None:
    self.now += seconds


def test_rates_of_two_steps_of_ten_seconds_one_of_them_waiting():
  clock = Clock(50.0)
  rates = Rates(peak_flops=4e12, clock=clock)
  for _ in range(2):
    with rates.waiting():
      clock.passes(1)
    clock.passes(9)
    with rates.paused():
      clock.passes(100)
    rates.count(**COUNTS)
  assert rates.take() == {
    "step_seconds": 10,
    "data_wait_seconds": 1,
    "data_wait": 0.1,
    "tokens_per_second": 60,
    "rollouts_per_second": 0.4,
    "model_flops_per_second": 3e11,
    "mfu": 0.075,
    "token_padding": 0.25,
    "patch_padding": 0.5,
    "productive_seconds": 18,
  }
  clock.passes(5)
  rates.count(**COUNTS)
  after = rates.take()
  assert (after["step_seconds"], after["data_wait"]) == (5, 0)


def test_a_device_of_unknown_peak_has_no_mfu():
  rates = Rates(peak_flops("cpu"), Clock(0.0))
  rates.count(**COUNTS)
  rates._clock.passes(1)
  taken = rates.take()
  assert "mfu" not in taken and taken["model_flops_per_second"] == 3e12


@pytest.mark.parametrize(
  ("kind", "flops"),
  [
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA GeForce RTX 2080", None),
    ("cpu", None),
  ],
)
def test_peaks_by_the_names_that_jax_gives(kind, flops):
  assert peak_flops(kind) == flops


def test_a_killed_run_resumes_its_goodput(tmp_path):
  """Steps 1 to 3 take 10 s each, 1 s of it waiting; only step 2 was saved; 70 s until the restart.

  Then step 3 is done again: 27 productive seconds of the 30 + 70 + 10 since the first start.
  """
  folder, clock = epath.Path(tmp_path), Clock(1000.0)

  def start(resume_step: int, last: int) -> MetricWriter:
    writer = MetricWriter(folder, resume_step=resume_step, write=True)
    rates, goodput = Rates(clock=clock), Goodput(writer.found, resume_step, clock)
    for step in range(resume_step + 1, last + 1):
      with rates.waiting():
        clock.passes(1)
      clock.passes(9)
      rates.count(**COUNTS)
      writer.write(step, goodput.add(rates.take()["productive_seconds"]))
    return writer

  start(0, 3)  # never closed, as if killed
  clock.passes(70)
  start(2, 3).close()
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["goodput"] for line in lines] == pytest.approx([9 / 10, 18 / 20, 27 / 110])
  assert {line["run_started"] for line in lines} == {1000.0}


def test_a_run_that_died_before_its_first_checkpoint_lost_that_time(tmp_path):
  clock = Clock(1000.0)
  first = Goodput([], 0, clock)
  clock.passes(10)
  lines = [{"step": 1} | first.add(8.0)]
  clock.passes(10)
  second = Goodput(lines, 0, clock)
  clock.passes(20)
  assert second.add(10.0)["goodput"] == pytest.approx(10 / 40)


def test_a_batch_counts_its_segments_and_images_separately():
  """Row 0 holds rollouts of 3 and 2 tokens and an image of 4 patches, row 1 one of 4 and two."""
  batch = {
    "segment_ids": np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]], np.int32),
    "patch_segment": np.array([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 2, 2, 2, 2]], np.int32),
    "example_index": np.array([[7, 7, 3], [5, -1, -1]], np.int32),
  }
  model, trained = QWEN_SIZES["tiny"].with_vocabulary(512), {"language_model"}
  flops = sum(step_flops(model, trained, [3, 2, 4], [4, 4, 4]).values())
  assert batch_counts(batch, model, trained, shares=2) == {
    "tokens": 18,
    "token_slots": 24,
    "patches": 24,
    "patch_slots": 32,
    "rollouts": 6,
    "flops": pytest.approx(2 * flops, rel=1e-12),
  }
