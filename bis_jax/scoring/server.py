"""The ASGI application that scores over HTTP; `bis_jax.serve` runs it.

    POST /score     {"question": "...", "steps": ["...", ...], "images": ["BASE64", ...]}
                    -> {"scores": [0.98, 0.31]}, or {"error": "..."} with a status of 4xx or 503

`image` is another name of `images`, a single image needs no list, and an `id` comes back.

    GET  /healthz   -> {"status": "ok", "checkpoint": "WORKDIR step 110", "waiting": 0}

Images are sent inline: the server opens no file and no address for a request. Requests that arrive
while a batch is on the device are packed into the next one.
"""

import asyncio
import base64
import collections
import contextlib
import dataclasses
import weakref
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from bis_jax import files
from bis_jax.console import log
from bis_jax.scoring import solutions, step_scorer
from bis_jax.scoring.solutions import Record, Solution, SolutionError


@dataclasses.dataclass(frozen=True)
class Limits:
  """The largest request, and how much the server holds at once."""

  body_bytes: int = 32 << 20
  body_seconds: float = 20.0  # to receive the body, from the end of its head
  steps: int = 256
  characters: int = 200_000  # of question and steps together
  images: int = 16
  pixels: int = 16 << 20  # of a request's images together
  # More requests or bytes get a 503. One client, which is an address, may have half of each.
  waiting: int = 256  # requests being read, waiting or on the device
  held_bytes: int = 64 << 20  # of their bodies
  small_bytes: int = 64 << 10  # smaller bodies are not counted, and do not wait for larger ones
  batch: int = 64  # solutions handed to the model at a time


class _Shared:
  """What all clients together hold of something, of which one client may have half."""

  def __init__(self, limit: int, unit: str):
    self._limit, self._unit = limit, unit
    self._held: collections.Counter[str] = collections.Counter()

  def total(self) -> int:
    return self._held.total()

  def take(self, client: str, amount: int = 1) -> None:
    """Raises HTTPException if it is too much."""
    for holder, held, limit in (
      ("the server", self.total(), self._limit),
      (f"your address {client}", self._held[client], -(-self._limit // 2)),
    ):
      if held + amount > limit:
        raise HTTPException(
          503, f"{holder} has {held} {self._unit} waiting, of at most {limit}; try again later"
        )
    self._held[client] += amount

  def give_back(self, client: str, amount: int = 1) -> None:
    self._held[client] -= amount
    if not self._held[client]:
      del self._held[client]


@dataclasses.dataclass(frozen=True)
class _Waiting:
  client: str
  solution: Solution
  answer: asyncio.Future


class Batcher:
  """Scores solutions, one batch after the other, on its own thread."""

  def __init__(self, scorer: step_scorer.Scorer, limits: Limits):
    self._scorer, self._limits = scorer, limits
    self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
    self._device = ThreadPoolExecutor(1)

  async def score(self, client: str, solution: Solution) -> np.ndarray:
    """Returns a solution's scores; raises SolutionError if it is too long."""
    answer = asyncio.get_running_loop().create_future()
    self._queue.put_nowait(_Waiting(client, solution, answer))
    return await answer

  async def run(self) -> None:
    """Scores all waiting solutions repeatedly until it is cancelled."""
    loop = asyncio.get_running_loop()
    waiting = []
    while True:
      if not waiting:
        waiting.append(await self._queue.get())
      while not self._queue.empty():
        waiting.append(self._queue.get_nowait())
      taken, waiting = self._next_batch(waiting)
      todo = [one.solution for one in taken]
      try:
        results = await loop.run_in_executor(self._device, solutions.score, self._scorer, todo)
      except Exception as error:  # the next batch may well be fine
        log.exception("a batch of %d solutions failed", len(todo))
        results = [error] * len(todo)
      for one, result in zip(taken, results, strict=True):
        if one.answer.done():  # its client has disconnected
          continue
        if isinstance(result, Exception):
          one.answer.set_exception(result)
        else:
          one.answer.set_result(result)

  def _next_batch(self, waiting: list[_Waiting]) -> tuple[list[_Waiting], list[_Waiting]]:
    """Returns (next batch, rest): clients in turn, and each client's oldest first."""
    turns: collections.Counter[str] = collections.Counter()
    turn = []
    for one in waiting:
      turn.append(turns[one.client])
      turns[one.client] += 1
    order = sorted(range(len(waiting)), key=turn.__getitem__)
    taken, rest = order[: self._limits.batch], sorted(order[self._limits.batch :])
    return [waiting[i] for i in taken], [waiting[i] for i in rest]


def create_app(scorer: step_scorer.Scorer, limits: Limits) -> Starlette:
  batcher = Batcher(scorer, limits)
  quick, slow = ThreadPoolExecutor(1), ThreadPoolExecutor(1)  # slow: large bodies and images
  # A client's slow requests are read one after the other, so that others get their turn.
  reading: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
  requests, sizes = _Shared(limits.waiting, "requests"), _Shared(limits.held_bytes, "bytes")

  async def score(request: Request) -> JSONResponse:
    client = request.client.host if request.client else ""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as held:
      requests.take(client)
      held.callback(requests.give_back, client)
      body = await _read_body(request, limits, sizes, held)
      turn = reading.setdefault(client, asyncio.Lock())
      large = len(body) > limits.small_bytes
      async with turn if large else contextlib.nullcontext():
        record = await loop.run_in_executor(slow if large else quick, parse, body, limits)
      del body
      large = large or bool(record.named_images)
      async with turn if large else contextlib.nullcontext():
        solution = await loop.run_in_executor(
          slow if large else quick, read, record, scorer, limits
        )
      answer = {} if record.id is None else {"id": record.id}
      del record
      scores = await batcher.score(client, solution)
      return JSONResponse(answer | {"scores": [float(value) for value in scores]})

  async def healthz(_: Request) -> JSONResponse:
    return JSONResponse({"status": "ok", "checkpoint": scorer.name, "waiting": requests.total()})

  @contextlib.asynccontextmanager
  async def lifespan(_: Starlette) -> AsyncIterator[None]:
    running = asyncio.create_task(batcher.run())
    yield
    running.cancel()

  return Starlette(
    routes=[
      Route("/score", score, methods=["POST"]),
      Route("/healthz", healthz, methods=["GET"]),
    ],
    lifespan=lifespan,
    exception_handlers=dict.fromkeys(
      (HTTPException, SolutionError, ClientDisconnect, Exception), _refuse
    ),
  )


def parse(body: bytes, limits: Limits) -> Record:
  """Returns the record of a request's body, whose counts are checked; raises HTTPException."""
  # Every JSON value but the first follows one of these bytes, and no base64 holds any. Many small
  # values take far more memory than their bytes.
  values = sum(map(body.count, (b",", b"[", b"{")))
  most = limits.characters + limits.steps + limits.images
  if values > most:
    raise HTTPException(413, f"more than {most} JSON values or characters")
  try:
    record = Record.of(files.parse_json(body))
  except SolutionError as error:
    raise HTTPException(400, f"the body is not a request: {error}") from error
  except ValueError as error:
    raise HTTPException(400, f"the body is not valid JSON: {error}") from error
  images = record.named_images
  steps = record.steps if isinstance(record.steps, list) else []
  texts = [text for text in (record.question, *steps) if isinstance(text, str)]
  for count, limit, unit in (
    (len(steps), limits.steps, "steps"),
    (sum(map(len, texts)), limits.characters, "characters"),
    (len(images), limits.images, "images"),
  ):
    if count > limit:
      raise HTTPException(413, f"{count} {unit}; at most {limit} are accepted")
  return record


def read(record: Record, scorer: step_scorer.Scorer, limits: Limits) -> Solution:
  """Returns the solution of a request, whose images are decoded last; HTTPException, SolutionError."""
  solution = record.solution(_decode_base64, limits.pixels)
  solutions.check_length(scorer, solution)
  return solution.prepare_images(scorer)


def _decode_base64(text: str) -> bytes:
  try:
    return base64.b64decode(text, validate=True)
  except ValueError as error:
    shown = text if len(text) <= 40 else text[:37] + "..."
    raise HTTPException(400, f"an image is not base64: {shown!r}: {error}") from error


async def _read_body(
  request: Request, limits: Limits, sizes: _Shared, held: contextlib.ExitStack
) -> bytes:
  too_large = HTTPException(413, f"a body of more than {limits.body_bytes} bytes")
  client = request.client.host if request.client else ""
  announced = request.headers.get("content-length", "0")
  if announced.isdigit() and int(announced) > limits.body_bytes:
    raise too_large
  body = bytearray()
  try:
    async with asyncio.timeout(limits.body_seconds):
      async for part in request.stream():
        body += part
        if len(body) > limits.body_bytes:
          raise too_large
        if len(body) > limits.small_bytes:
          sizes.take(client, len(part))
          held.callback(sizes.give_back, client, len(part))
  except TimeoutError as error:
    raise HTTPException(408, f"the body did not arrive within {limits.body_seconds:g} s") from error
  return bytes(body)


def _refuse(_: Request, error: Exception) -> JSONResponse:
  status, reason, headers = 500, "internal error; the server's log has more", {}
  if isinstance(error, HTTPException):
    status, reason, headers = error.status_code, error.detail, dict(error.headers or {})
  elif isinstance(error, SolutionError):
    status, reason = 422, str(error)
  elif isinstance(error, ClientDisconnect):
    status, reason = 400, "the client disconnected"
  # The unread rest of a body would be parsed as the next request.
  return JSONResponse({"error": reason}, status, headers=headers | {"connection": "close"})
