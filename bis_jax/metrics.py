"""What a run reports as it goes: metrics.jsonl, TensorBoard events, and rates."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter

from bis_jax.workdir import write_text


class MetricWriter:
  """Writes one JSON object a logged step, and the same numbers as TensorBoard events.

  On a resumed run the lines after the restored step are dropped first, so that every step stands
  in the file once. A remote workdir gets the file anew at every `flush`, as object stores cannot
  append; TensorBoard events are written to local workdirs only. Where `write` is False (all
  processes but the first) lines are only remembered.
  """

  def __init__(self, workdir: epath.Path, *, resume_step: int, write: bool):
    self._path = workdir / "metrics.jsonl"
    lines = self._path.read_text().splitlines() if self._path.exists() else []
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
  """Counts work and waiting between two log lines and returns them as rates."""

  def __init__(self):
    self._start, self._waited, self._counts, self._steps = time.perf_counter(), 0.0, {}, 0

  @contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time inside the block as time waiting for data."""
    start = time.perf_counter()
    yield
    self._waited += time.perf_counter() - start

  def count(self, **amounts: float) -> None:
    """Adds the amounts of one step."""
    self._steps += 1
    for name, amount in amounts.items():
      self._counts[name] = self._counts.get(name, 0) + amount

  def take(self) -> dict[str, float]:
    """Returns the rates since the last call, and starts anew.

    Keys: step_seconds, data_wait_seconds (both a step), and of `count`'s amounts tokens and
    rollouts a second, and the unused share of token and patch slots.
    """
    seconds, counts = time.perf_counter() - self._start, self._counts
    rates = {
      "step_seconds": seconds / self._steps,
      "data_wait_seconds": self._waited / self._steps,
      "tokens_per_second": counts["tokens"] / seconds,
      "rollouts_per_second": counts["rollouts"] / seconds,
      "token_padding": 1 - counts["tokens"] / counts["token_slots"],
      "patch_padding": 1 - counts["patches"] / counts["patch_slots"],
    }
    self.__init__()
    return rates


def batch_counts(batch: dict[str, np.ndarray]) -> dict[str, int]:
  """Returns how much work one host batch [..., T] and [..., P] holds, for `Rates.count`."""
  index = batch["example_index"]
  return {
    "tokens": int(np.count_nonzero(batch["segment_ids"])),
    "token_slots": batch["segment_ids"].size,
    "patches": int(np.count_nonzero(batch["patch_segment"])),
    "patch_slots": batch["patch_segment"].size,
    "rollouts": len(np.unique(index[index >= 0])),
  }
