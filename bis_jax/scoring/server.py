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
import contextlib
import dataclasses
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
  pixels: int = 16 << 20  # of a request's images together, and of a batch with several requests
  waiting: int = 256  # requests being read, waiting or on the device; more get a 503
  batch: int = 64  # solutions handed to the model at a time


_Waiting = tuple[Solution, asyncio.Future]


class Batcher:
  """Scores solutions, one batch after the other, on its own thread."""

  def __init__(self, scorer: step_scorer.Scorer, limits: Limits):
    self._scorer, self._limits = scorer, limits
    self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
    self._device = ThreadPoolExecutor(1)

  async def score(self, solution: Solution) -> np.ndarray:
    """Returns a solution's scores; raises SolutionError if it is too long."""
    answer = asyncio.get_running_loop().create_future()
    self._queue.put_nowait((solution, answer))
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
      todo = [solution for solution, _ in taken]
      try:
        results = await loop.run_in_executor(self._device, solutions.score, self._scorer, todo)
      except Exception as error:  # the next batch may well be fine
        log.exception("a batch of %d solutions failed", len(todo))
        results = [error] * len(todo)
      for (_, answer), result in zip(taken, results, strict=True):
        if answer.done():  # its client has disconnected
          continue
        if isinstance(result, Exception):
          answer.set_exception(result)
        else:
          answer.set_result(result)

  def _next_batch(self, waiting: list[_Waiting]) -> tuple[list[_Waiting], list[_Waiting]]:
    """Returns (next batch, rest): the oldest first, but text never waits for others' images."""
    taken, rest, pixels = [], [], 0
    for solution, answer in waiting:
      fits = not taken or not solution.pixels or pixels + solution.pixels <= self._limits.pixels
      if fits and len(taken) < self._limits.batch:
        taken.append((solution, answer))
        pixels += solution.pixels
      else:
        rest.append((solution, answer))
    return taken, rest


def create_app(scorer: step_scorer.Scorer, limits: Limits) -> Starlette:
  batcher = Batcher(scorer, limits)
  readers = ThreadPoolExecutor(2)  # of JSON
  decoders = ThreadPoolExecutor(1)  # of images: one request at a time, beside requests of text
  held = 0

  async def score(request: Request) -> JSONResponse:
    nonlocal held
    if held >= limits.waiting:
      raise HTTPException(503, f"{limits.waiting} requests are waiting already; try again later")
    held += 1
    try:
      body = await _read_body(request, limits)
      loop = asyncio.get_running_loop()
      record = await loop.run_in_executor(readers, parse, body, limits)
      del body
      pool = decoders if record.named_images else readers
      solution = await loop.run_in_executor(pool, decode, record, limits)
      identity = record.id
      del record
      scores = await batcher.score(solution)
      answer = {} if identity is None else {"id": identity}
      return JSONResponse(answer | {"scores": [float(value) for value in scores]})
    finally:
      held -= 1

  async def healthz(_: Request) -> JSONResponse:
    return JSONResponse({"status": "ok", "checkpoint": scorer.name, "waiting": held})

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
    exception_handlers=dict.fromkeys((HTTPException, SolutionError, ClientDisconnect), _refuse),
  )


def parse(body: bytes, limits: Limits) -> Record:
  """Returns the record of a request's body, whose counts are checked; raises HTTPException or SolutionError."""
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


def decode(record: Record, limits: Limits) -> Solution:
  """Returns the solution of a request; raises HTTPException or SolutionError."""
  return record.solution(_decode_base64, limits.pixels)


def _decode_base64(text: str) -> bytes:
  try:
    return base64.b64decode(text, validate=True)
  except ValueError as error:
    shown = text if len(text) <= 40 else text[:37] + "..."
    raise HTTPException(400, f"an image is not base64: {shown!r}: {error}") from error


async def _read_body(request: Request, limits: Limits) -> bytes:
  too_large = HTTPException(413, f"a body of more than {limits.body_bytes} bytes")
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
  except TimeoutError as error:
    raise HTTPException(408, f"the body did not arrive within {limits.body_seconds:g} s") from error
  return bytes(body)


def _refuse(_: Request, error: Exception) -> JSONResponse:
  status, reason = 422, str(error)  # a SolutionError
  if isinstance(error, HTTPException):
    status, reason = error.status_code, error.detail
  elif isinstance(error, ClientDisconnect):
    status, reason = 400, "the client disconnected"
  # The unread rest of a body would be parsed as the next request.
  return JSONResponse({"error": reason}, status, headers={"connection": "close"})
