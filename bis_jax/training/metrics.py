"""What a run reports as it goes: metrics.jsonl, TensorBoard events, and rates."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter

from bis_jax.files import write_text
from bis_jax.models.model_flops import step_flops


class MetricWriter:
  """Writes one JSON object a logged step, and the same numbers as TensorBoard events.

  On a resumed run the lines after the restored step are dropped first, so that every step stands
  in the file once. A remote workdir gets the file anew at every `flush`, as object stores cannot
  append; TensorBoard events are written to local workdirs only. Where `write` is False (all
  processes but the first) lines are only remembered.

  Attributes:
    found: every line that was there before, those after the restored step included.
  """

  def __init__(self, workdir: epath.Path, *, resume_step: int, write: bool):
    self._path = workdir / "metrics.jsonl"
    lines = self._path.read_text().splitlines() if self._path.exists() else []
    self.found = [json.loads(line) for line in lines]
    self._lines = [line for line in lines if json.loads(line)["step"] <= resume_step]
    self._written = len(self._lines)
    self._write = write
    self._local = "://" not in str(workdir)
    self._events = None
    if write:
      write_text(self._path, "".join(line + "\n" for line in self._lines))
    if write and self._local:
      self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Adds the line {"step": step, **values}, or the values to the last line if it is this step's."""
    line = {"step": step} | {k: float(v) for k, v in values.items()}
    if self._lines and json.loads(self._lines[-1])["step"] == step:
      line = json.loads(self._lines.pop()) | line
      if self._write and self._written > len(self._lines):  # it stands in the file already
        self._written = len(self._lines)
        write_text(self._path, "".join(line + "\n" for line in self._lines))
    self._lines.append(json.dumps(line))
    if self._events:
      for name, value in values.items():
        self._events.add_scalar(name, float(value), step)
    if self._local:
      self.flush()

  def flush(self) -> None:
    """Brings everything written so far onto disk."""
    if not self._write:
      return
    if self._local:
      with open(self._path, "a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in self._lines[self._written :])
      self._events.flush()
    else:
      write_text(self._path, "".join(line + "\n" for line in self._lines))
    self._written = len(self._lines)

  def history(self) -> list[dict[str, float]]:
    """Returns every line as a dict, oldest first."""
    return [json.loads(line) for line in self._lines]

  def close(self) -> None:
    """Flushes and lets go of the files."""
    self.flush()
    if self._events:
      self._events.close()


class Rates:
  """Counts work and waiting between two log lines and returns them as rates.

  Args:
    peak_flops: operations a second of all the run's devices together; None: not known, no `mfu`.
    clock: returns seconds.
  """

  def __init__(
    self, peak_flops: float | None = None, clock: Callable[[], float] = time.perf_counter
  ):
    self._peak_flops, self._clock = peak_flops, clock
    self._start_anew()

  def _start_anew(self) -> None:
    self._start, self._spent = self._clock(), {"data": 0.0, "pause": 0.0}
    self._counts, self._steps = {}, 0

  @contextmanager
  def _spending(self, on: str) -> Iterator[None]:
    start = self._clock()
    yield
    self._spent[on] += self._clock() - start

  def waiting(self) -> AbstractContextManager[None]:
    """Counts the time inside the block as time waiting for data."""
    return self._spending("data")

  def paused(self) -> AbstractContextManager[None]:
    """Leaves the time inside the block out of all rates: compiling, saving, evaluating."""
    return self._spending("pause")

  def count(self, **amounts: float) -> None:
    """Adds the amounts of one step."""
    self._steps += 1
    for name, amount in amounts.items():
      self._counts[name] = self._counts.get(name, 0) + amount

  def take(self) -> dict[str, float]:
    """Returns the rates since the last call, and starts anew.

    Keys: step_seconds and data_wait_seconds (both a step); data_wait, the share of the time spent
    waiting for data; tokens, rollouts and model operations a second; mfu, the latter as a share of
    the peak; the unused share of token and patch slots; productive_seconds, spent in all the steps,
    without waiting and pauses.
    """
    seconds = self._clock() - self._start - self._spent["pause"]
    waited, counts = self._spent["data"], self._counts
    rates = {
      "step_seconds": seconds / self._steps,
      "data_wait_seconds": waited / self._steps,
      "data_wait": waited / seconds,
      "tokens_per_second": counts["tokens"] / seconds,
      "rollouts_per_second": counts["rollouts"] / seconds,
      "model_flops_per_second": counts["flops"] / seconds,
      "token_padding": 1 - counts["tokens"] / counts["token_slots"],
      "patch_padding": 1 - counts["patches"] / counts["patch_slots"],
      "productive_seconds": seconds - waited,
    }
    if self._peak_flops:
      rates["mfu"] = rates["model_flops_per_second"] / self._peak_flops
    self._start_anew()
    return rates


class Goodput:
  """The share of a run's time, since it was first started, spent in steps whose result was kept.

  Time to start and to compile, to read data, to save and evaluate is no step's; neither are steps
  after the last checkpoint of a run that died, nor the time until it was started again. Log lines
  carry what is needed to go on: `run_started`, in seconds since 1970, and `productive_seconds`.

  Args:
    lines: every log line that earlier starts of the run left, oldest first.
    resume_step: the step from which this start goes on; what later lines say is lost.
    clock: returns seconds since 1970.
  """

  def __init__(
    self,
    lines: list[dict[str, float]],
    resume_step: int,
    clock: Callable[[], float] = time.time,
  ):
    kept = [line for line in lines if line["step"] <= resume_step]
    self._clock = clock
    self._started = lines[0]["run_started"] if lines else clock()
    self._productive = kept[-1]["productive_seconds"] if kept else 0.0

  def add(self, productive_seconds: float) -> dict[str, float]:
    """Returns {goodput, productive_seconds, run_started}, with seconds more spent in kept steps."""
    self._productive += productive_seconds
    return {
      "goodput": self._productive / (self._clock() - self._started),
      "productive_seconds": self._productive,
      "run_started": self._started,
    }


def batch_counts(
  batch: dict[str, np.ndarray], model_config: Any, trained: set[str], shares: int = 1
) -> dict[str, float]:
  """Returns how much work a global batch holds, for `Rates.count`.

  Args:
    batch: this process's share, arrays [..., T] and [..., P].
    model_config: the backbone's.
    trained: stages with trained kernels; see `model_flops.step_flops`.
    shares: of the global batch, of which this one stands for all: rows are packed about equally
      full.
  """
  index = batch["example_index"]
  flops = step_flops(
    model_config, trained, _lengths(batch["segment_ids"]), _lengths(batch["patch_segment"])
  )
  return {
    "tokens": shares * int(np.count_nonzero(batch["segment_ids"])),
    "token_slots": shares * batch["segment_ids"].size,
    "patches": shares * int(np.count_nonzero(batch["patch_segment"])),
    "patch_slots": shares * batch["patch_segment"].size,
    "rollouts": shares * len(np.unique(index[index >= 0])),
    "flops": shares * sum(flops.values()),
  }


def _lengths(segment_BT: np.ndarray) -> np.ndarray:
  """Returns how many tokens every segment of every row has: [[1, 1, 2, 0]] -> [2, 1]."""
  rows, segments = np.nonzero(segment_BT)[0], segment_BT[segment_BT > 0]
  return np.unique(np.stack([rows, segments]), axis=1, return_counts=True)[1]
