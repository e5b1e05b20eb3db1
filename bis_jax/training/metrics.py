"""Metrics of a run: metrics.jsonl, TensorBoard events, throughput, MFU and goodput."""

import collections
import contextlib
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath
from tensorboardX.event_file_writer import EventsWriter

# pyrefly: ignore[missing-module-attribute]  # made by protobuf at run time
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from bis_jax import files
from bis_jax.models.model_flops import step_flops
from bis_jax.storage import is_url, upload
from bis_jax.training.trackers import Tracker

Line = dict[str, float]


class MetricWriter:
  """Writes one JSON object per logged step, and the same numbers as TensorBoard events and a tracker.

  `history` are the run's lines; `found` are those of earlier starts, including lines after the
  restored step, which are dropped from the file so that each step is in it once.
  """

  # Object stores cannot append: they get the whole files at every `flush`.

  def __init__(
    self, workdir: epath.Path, *, resume_step: int, write: bool, tracker: Tracker | None = None
  ):
    self._tracker = tracker if write else None
    self._path = workdir / "metrics.jsonl"
    files.changed_files(workdir, self._path.name)
    self.found = [line for line in files.read_log(self._path) if _is_line(line)]
    self.history = [line.copy() for line in self.found if line["step"] <= resume_step]
    self._write, self._local = write, not is_url(workdir)
    self._events = None
    if write:
      self._write_all()
      files.note_digests(self._path)
      self._events = _Events(workdir / "tensorboard", resume_step + 1)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Adds the line {"step": step, **values}; values for the step of the last line extend it."""
    values = {name: float(value) for name, value in values.items()}
    is_new = not self.history or self.history[-1]["step"] != step
    if is_new:
      self.history.append({"step": step})
    self.history[-1] |= values
    if not self._write:
      return
    if not self._local:
      pass  # until `flush`
    elif is_new:
      with files.naming_full_disk(self._path), self._path.open("a") as file:
        file.write(json.dumps(self.history[-1]) + "\n")
    else:
      self._write_all()
    if self._events:
      self._events.write(step, values)
    if self._tracker:
      self._tracker.log(step, values)

  def flush(self) -> None:
    if self._write:
      if not self._local:
        self._write_all()
      files.note_digests(self._path)
    if self._events:
      self._events.flush()

  def close(self) -> None:
    self.flush()
    if self._events:
      self._events.close()
    if self._tracker:
      self._tracker.close()

  def _write_all(self) -> None:
    files.write_text(self._path, "".join(json.dumps(line) + "\n" for line in self.history))


def _is_line(line: Line) -> bool:
  return "step" in line and all(isinstance(value, int | float) for value in line.values())


class _Events:
  """TensorBoard events. A full disk would block the thread of tensorboardX's own writer."""

  def __init__(self, folder: epath.Path, purge_step: int):
    """Readers forget what earlier starts wrote of `purge_step` and later steps."""
    self._folder = folder
    start = SessionLog(status=SessionLog.START)
    self._open = contextlib.ExitStack()
    with files.naming_full_disk(folder):
      self._local = pathlib.Path(folder)
      if is_url(folder):
        self._local = pathlib.Path(self._open.enter_context(tempfile.TemporaryDirectory()))
      self._local.mkdir(parents=True, exist_ok=True)
      self._writer = EventsWriter(str(self._local / "events"))
      self._writer.write_event(Event(wall_time=time.time(), step=purge_step, session_log=start))

  def write(self, step: int, values: dict[str, float]) -> None:
    with files.naming_full_disk(self._folder):
      for name, value in values.items():
        event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
        self._writer.write_event(event)
      self._writer.flush()

  def flush(self) -> None:
    if is_url(self._folder):
      for file in self._local.iterdir():
        upload(file, self._folder / file.name)

  def close(self) -> None:
    with self._open, files.naming_full_disk(self._folder):
      self._writer.close()
      self.flush()


class Rates:
  """Work and waiting time between two log lines; `clock` returns seconds.

  `peak_flops` is FLOP/s of all devices of the run; None: unknown, no `mfu`.
  """

  def __init__(
    self, peak_flops: float | None = None, clock: Callable[[], float] = time.perf_counter
  ):
    self._peak_flops, self._clock = peak_flops, clock
    self._reset()

  def _reset(self) -> None:
    self._start, self._waited, self._paused = self._clock(), 0.0, 0.0
    self._counts: collections.Counter[str] = collections.Counter()

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    start = self._clock()
    yield
    self._waited += self._clock() - start

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Excludes the time inside the block from all rates: compilation, checkpoints, evaluation."""
    start = self._clock()
    yield
    self._paused += self._clock() - start

  def count(self, **amounts: float) -> None:
    self._counts.update(amounts, steps=1)

  def take(self) -> dict[str, float]:
    """Returns the rates since the last call and starts over.

    Keys: step_seconds and data_wait_seconds, per step; data_wait, the share of the time spent
    waiting for data; tokens, rollouts and model FLOPs per second; mfu; the unused share of token
    and patch slots; productive_seconds, the time in steps without data wait and pauses.
    """
    seconds, counts = self._clock() - self._start - self._paused, self._counts
    rates = {
      "step_seconds": seconds / counts["steps"],
      "data_wait_seconds": self._waited / counts["steps"],
      "data_wait": self._waited / seconds,
      "tokens_per_second": counts["tokens"] / seconds,
      "rollouts_per_second": counts["rollouts"] / seconds,
      "model_flops_per_second": counts["flops"] / seconds,
      "token_padding": 1 - counts["tokens"] / counts["token_slots"],
      "patch_padding": 1 - counts["patches"] / counts["patch_slots"]
      if counts["patch_slots"]
      else 0.0,
      "productive_seconds": seconds - self._waited,
    }
    if self._peak_flops:
      rates["mfu"] = rates["model_flops_per_second"] / self._peak_flops
    self._reset()
    return rates


class Goodput:
  """Goodput = productive step time / wall time since the run was first launched.

  Start-up, compilation, data wait, checkpointing, evaluation and steps lost to a crash are not
  productive. A resumed run reads `run_started` (seconds since 1970) and `productive_seconds` from
  the `lines` that earlier starts logged; the work of lines after `resume_step` is lost.
  """

  def __init__(self, lines: list[Line], resume_step: int, clock: Callable[[], float] = time.time):
    lines = [line for line in lines if "run_started" in line and "productive_seconds" in line]
    kept = [line["productive_seconds"] for line in lines if line["step"] <= resume_step]
    self._clock = clock
    self._started = lines[0]["run_started"] if lines else clock()
    self._productive = kept[-1] if kept else 0.0

  def add(self, productive_seconds: float) -> dict[str, float]:
    """Returns {goodput, productive_seconds, run_started} after this many more seconds."""
    self._productive += productive_seconds
    return {
      "goodput": self._productive / (self._clock() - self._started),
      "productive_seconds": self._productive,
      "run_started": self._started,
    }


def batch_counts(
  batch: dict[str, np.ndarray], model_config: Any, trained: set[str], shares: int = 1
) -> dict[str, float]:
  """Returns the work in a global batch of `shares` equally full shares, for `Rates.count`.

  `batch` is this process's share, arrays [..., T] and [..., P]; `trained` as in `step_flops`.
  """
  index = batch["example_index"]
  tokens, shared = text_segments(batch)
  flops = step_flops(model_config, trained, tokens, _lengths(batch["patch_segment"]), shared)
  return {
    "tokens": shares * int(np.count_nonzero(batch["segment_ids"])),
    "token_slots": shares * batch["segment_ids"].size,
    "patches": shares * int(np.count_nonzero(batch["patch_segment"])),
    "patch_slots": shares * batch["patch_segment"].size,
    "rollouts": shares * len(np.unique(index[index >= 0])),
    "flops": shares * sum(flops.values()),
  }


def text_segments(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the tokens of all prefixes and continuations, and of the prefix behind which each is."""
  segment_BT = batch["segment_ids"]
  (b, t), (number, length) = segment_BT.shape, (0, 1)
  if "stream_ids" in batch:
    _, number, length = batch["stream_ids"].shape
  part_T = np.maximum(np.arange(t) - (t - number * length), -1) // length + 1
  count_BPG = np.zeros((b, number + 1, segment_BT.max(initial=0) + 1))
  np.add.at(count_BPG, (np.arange(b)[:, None], part_T[None], segment_BT), 1)
  count_BPG[..., 0] = 0  # padding
  before_BPG = np.repeat(count_BPG[:, :1], number + 1, axis=1)
  before_BPG[:, 0] = 0
  return count_BPG[count_BPG > 0], before_BPG[count_BPG > 0]


def _lengths(segment_BT: np.ndarray) -> np.ndarray:
  """Returns the length of each segment of each row: [[1, 1, 2, 0]] -> [2, 1]."""
  rows, segments = np.nonzero(segment_BT)[0], segment_BT[segment_BT > 0]
  return np.unique(np.stack([rows, segments]), axis=1, return_counts=True)[1]
