"""Batches of the solutions that wait, scored one after the other on a thread of their own."""

import asyncio
import collections
import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bis_jax.console import log
from bis_jax.scoring import solutions, step_scorer
from bis_jax.scoring.server_metrics import ServerMetrics
from bis_jax.scoring.solutions import Solution, SolutionError


@dataclasses.dataclass(frozen=True)
class _Waiting:
  client: str
  solution: Solution
  answer: asyncio.Future


class Batcher:
  """Scores what waits, at most `batch` solutions at a time, clients in turn."""

  def __init__(self, scorer: step_scorer.Scorer, batch: int, metrics: ServerMetrics):
    self._scorer, self._batch, self._metrics = scorer, batch, metrics
    self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
    self._waiting: list[_Waiting] = []
    self._device = ThreadPoolExecutor(1)
    metrics.queue.set_function(lambda: self._queue.qsize() + len(self._waiting))

  async def score(
    self, client: str, chosen: Sequence[Solution]
  ) -> list[np.ndarray | SolutionError]:
    """Returns the scores of each solution, or why it is too long."""
    loop = asyncio.get_running_loop()
    waiting = [_Waiting(client, solution, loop.create_future()) for solution in chosen]
    for one in waiting:
      self._queue.put_nowait(one)
    return await asyncio.gather(*(one.answer for one in waiting))

  async def run(self) -> None:
    """Scores all waiting solutions repeatedly until it is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
      if not self._waiting:
        self._waiting.append(await self._queue.get())
      while not self._queue.empty():
        self._waiting.append(self._queue.get_nowait())
      taken, self._waiting = self._next_batch(self._waiting)
      todo = [one.solution for one in taken]
      start = time.perf_counter()
      try:
        results = await loop.run_in_executor(self._device, solutions.score, self._scorer, todo)
      except Exception as error:  # the next batch may well be fine
        log.exception("a batch of %d solutions failed", len(todo))
        for one in taken:
          if not one.answer.done():
            one.answer.set_exception(error)
        continue
      self._metrics.batch_seconds.observe(time.perf_counter() - start)
      self._metrics.batch_fill.observe(len(todo) / self._batch)
      for one, result in zip(taken, results, strict=True):
        if not one.answer.done():  # else its client has disconnected
          one.answer.set_result(result)

  def _next_batch(self, waiting: list[_Waiting]) -> tuple[list[_Waiting], list[_Waiting]]:
    """Returns (next batch, rest): clients in turn, and each client's oldest first."""
    turns: collections.Counter[str] = collections.Counter()
    turn = []
    for one in waiting:
      turn.append(turns[one.client])
      turns[one.client] += 1
    order = sorted(range(len(waiting)), key=turn.__getitem__)
    taken, rest = order[: self._batch], sorted(order[self._batch :])
    return [waiting[i] for i in taken], [waiting[i] for i in rest]
