"""Rates, goodput and FLOPs against sums by hand, with a clock that the test advances."""

import json
import resource

import numpy as np
import pytest
from etils import epath

from bis_jax.errors import UserError
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
    ("TPU v6 lite", 920e12),
    ("TPU7x", 1155e12),
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


def test_a_batch_with_streams_counts_a_prefix_once():
  """A prefix of 3 tokens with continuations of 2 and 1, and one of 1 token with 2."""
  segments = np.array([[1, 1, 1, 2, 0, 1, 1, 2, 2, 1, 0, 0, 0]], np.int32)
  batch = {
    "segment_ids": segments,
    "stream_ids": segments[:, 5:].reshape(1, 2, 4),
    "patch_segment": np.array([[1, 1, 1, 1]], np.int32),
    "example_index": np.array([[7, 7, 3]], np.int32),
  }
  model, trained = QWEN_SIZES["tiny"].with_vocabulary(512), {"language_model"}
  flops = step_flops(model, trained, [3, 1, 2, 2, 1], [4], [0, 0, 3, 1, 3])
  text = model.text
  pairs = (9 + 1 + 4 + 4 + 1) / 2 + 2 * 3 + 2 * 1 + 1 * 3
  assert flops["text attention"] == 3 * 4 * text.hidden_size * text.num_hidden_layers * pairs
  counts = batch_counts(batch, model, trained)
  assert counts["tokens"] == 9 and counts["rollouts"] == 2
  assert counts["flops"] == pytest.approx(sum(flops.values()), rel=1e-12)


@pytest.mark.parametrize(
  "tail", [b'{"step": 3, "lo', b'{"step": 3, "loss": "x"}\n', b"\xff\n", b"7"]
)
def test_a_damaged_line_is_dropped_and_the_run_resumes(tmp_path, caplog, tail):
  """As a kill or a full disk leaves it; on f92436b no start got past it."""
  folder, path = epath.Path(tmp_path), tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n' + tail)
  writer = MetricWriter(folder, resume_step=2, write=True)
  assert [line["step"] for line in writer.found] == [1, 2]
  Goodput(writer.found, 2)
  writer.write(3, {"loss": 0.5})
  writer.close()
  assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
  assert b'"x"' in tail or f"{path} line 3 is damaged and left out" in caplog.text


@pytest.mark.parametrize("step", [1, 2])  # a new line; one that an evaluation extends
def test_a_full_disk_is_named_and_loses_no_line(tmp_path, monkeypatch, step):
  folder, path = epath.Path(tmp_path), tmp_path / "metrics.jsonl"
  writer = MetricWriter(folder, resume_step=0, write=True)
  writer.write(1, {"loss": 2.0})
  with monkeypatch.context() as patch:
    patch.setattr(json, "dumps", lambda line: "x" * 2**20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
      with pytest.raises(UserError, match=f"no space left to write {path}: .* bytes are free"):
        writer.write(step, {"loss": 1.0})
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
  again = MetricWriter(folder, resume_step=2, write=True)
  assert again.found == [{"step": 1, "loss": 2.0}]
  assert not list(tmp_path.glob("*.part"))


def test_changed_lines_are_told(tmp_path, caplog):
  folder, path = epath.Path(tmp_path), tmp_path / "metrics.jsonl"
  writer = MetricWriter(folder, resume_step=0, write=True)
  writer.write(1, {"loss": 2.0})
  writer.flush()
  writer.write(2, {"loss": 1.0})  # killed here
  MetricWriter(folder, resume_step=2, write=True).close()
  assert not caplog.text
  path.write_text(path.read_text().replace("2.0", "3.0"))
  MetricWriter(folder, resume_step=2, write=True).close()
  assert f"{path} is not as the run wrote it" in caplog.text
