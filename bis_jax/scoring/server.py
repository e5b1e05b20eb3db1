"""The ASGI application that scores over HTTP; `bis_jax.serve` runs it.

    POST /score       {"question": "...", "steps": ["...", ...], "images": ["BASE64", ...]}
                      -> {"scores": [0.98, 0.31]}, or {"error": "..."} with a status of 4xx or 503
    POST /pooling     as vLLM: messages with images -> [P(correct), P(not)] at every step marker
    POST /get_reward  as OpenRLHF's remote reward models
    GET  /            a page to try it, /healthz, /metrics, /v1/models, /openapi.json

`request_forms` reads and answers the bodies, `openapi.json` defines them. Images are sent inline: the
server opens no file and no address for a request. Requests that arrive while a batch is on the device
are packed into the next one.
"""

import asyncio
import base64
import binascii
import collections
import contextlib
import dataclasses
import functools
import pathlib
import re
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from bis_jax import files
from bis_jax.reports import page
from bis_jax.scoring import request_forms, solutions, step_scorer
from bis_jax.scoring.batcher import Batcher
from bis_jax.scoring.request_forms import Asked, Form, FormError
from bis_jax.scoring.server_metrics import ServerMetrics
from bis_jax.scoring.solutions import Record, Solution, SolutionError

_T = TypeVar("_T")
_FORMS: dict[str, Form] = {
  "/score": request_forms.score_form,
  "/pooling": request_forms.pooling_form,
  "/get_reward": request_forms.reward_form,
}
_SCHEMA = pathlib.Path(__file__).with_name("openapi.json")
# The page may load nothing and send to this server only.
_POLICY = (
  "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
  "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclasses.dataclass(frozen=True)
class Limits:
  """The largest request, and how much the server holds at once."""

  body_bytes: int = 32 << 20
  body_seconds: float = 20.0  # to receive the body, from the end of its head
  solutions: int = 64
  steps: int = 256  # of a solution
  # Of all solutions of a request together; what they share counts once.
  characters: int = 200_000
  images: int = 16
  pixels: int = 16 << 20
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
          503,
          f"{holder} has {held} {self._unit} waiting, of at most {limit}; try again later",
          {"retry-after": "1"},
        )
    self._held[client] += amount

  def give_back(self, client: str, amount: int = 1) -> None:
    self._held[client] -= amount
    if not self._held[client]:
      del self._held[client]


def create_app(scorer: step_scorer.Scorer, limits: Limits) -> ASGIApp:
  metrics = ServerMetrics(scorer.cache)
  batcher = Batcher(scorer, limits.batch, metrics)
  quick, slow = ThreadPoolExecutor(1), ThreadPoolExecutor(1)  # slow: large bodies and images
  # A client's slow requests are read one after the other, so that others get their turn.
  reading: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
  requests, sizes = _Shared(limits.waiting, "requests"), _Shared(limits.held_bytes, "bytes")
  metrics.held.set_function(requests.total)

  async def answer(form: Form, request: Request) -> JSONResponse:
    client = request.client.host if request.client else ""
    loop = asyncio.get_running_loop()
    aggregate = _aggregate(request)
    with contextlib.ExitStack() as held:
      requests.take(client)
      held.callback(requests.give_back, client)
      body = await _read_body(request, limits, sizes, held)
      turn = reading.setdefault(client, asyncio.Lock())
      large = len(body) > limits.small_bytes
      async with turn if large else contextlib.nullcontext():
        executor = slow if large else quick
        asked = await loop.run_in_executor(
          executor, parse, body, limits, form, aggregate, scorer.name
        )
      del body
      large = large or any(record.named_images for record in asked.records)
      async with turn if large else contextlib.nullcontext():
        executor = slow if large else quick
        found = await loop.run_in_executor(executor, read, asked.records, scorer, limits)
      for record in asked.records:  # frees their base64
        record.image = record.images = None
      scores = iter(await batcher.score(client, [s for s in found if isinstance(s, Solution)]))
      results = [s if isinstance(s, SolutionError) else next(scores) for s in found]
      return JSONResponse(asked.answer(results))

  async def answer_in_time(form: Form, request: Request) -> JSONResponse:
    try:
      return await answer(form, request)
    except asyncio.CancelledError as error:  # by Uvicorn, at the end of `stop_seconds`
      reason = "the server stops before it could answer; ask again"
      raise HTTPException(503, reason, {"retry-after": "1"}) from error

  async def healthz(_: Request) -> JSONResponse:
    found = {"status": "ok", "checkpoint": scorer.name, "waiting": requests.total()}
    return JSONResponse(found | ({"cache": scorer.cache.counts()} if scorer.cache else {}))

  async def models(_: Request) -> JSONResponse:
    return JSONResponse({"object": "list", "data": [{"id": scorer.name, "object": "model"}]})

  async def measured(_: Request) -> Response:
    return Response(metrics.text(), media_type="text/plain; version=0.0.4")

  async def schema(_: Request) -> Response:
    return Response(_SCHEMA.read_bytes(), media_type="application/json")

  async def try_it(_: Request) -> HTMLResponse:
    shown = page.render("score.html", title="Step scores", model=scorer.name)
    return HTMLResponse(shown, headers={"content-security-policy": _POLICY})

  @contextlib.asynccontextmanager
  async def lifespan(_: Starlette) -> AsyncIterator[None]:
    running = asyncio.create_task(batcher.run())
    yield
    running.cancel()

  pages = {
    "/": try_it,
    "/healthz": healthz,
    "/metrics": measured,
    "/v1/models": models,
    "/openapi.json": schema,
  }
  posts = {path: functools.partial(answer_in_time, form) for path, form in _FORMS.items()}
  app = Starlette(
    routes=[
      *(Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()),
      *(Route(path, endpoint, methods=["GET"]) for path, endpoint in pages.items()),
    ],
    lifespan=lifespan,
    exception_handlers=dict.fromkeys(
      (HTTPException, SolutionError, FormError, ClientDisconnect, Exception), _refuse
    ),
  )
  return metrics.watched(app, {*posts, *pages})


def _aggregate(request: Request) -> str:
  allowed = request_forms.AGGREGATES
  if unknown := request.query_params.keys() - {"aggregate"}:
    raise FormError(f"unknown query parameter {min(unknown)!r}; `aggregate` is the only one")
  found = request.query_params.getlist("aggregate")
  if len(found) > 1 or not set(found) <= set(allowed):
    raise FormError(f"`aggregate` is {', '.join(found)!r}; it must be one of {', '.join(allowed)}")
  return found[0] if found else ""


def parse(
  body: bytes,
  limits: Limits,
  form: Form = request_forms.score_form,
  aggregate: str = "",
  name: str = "",
) -> Asked:
  """Returns what a request's body asks, with counts checked; HTTPException or FormError."""
  # Every JSON value but the first follows one of these bytes; of base64, only the head of a data: URI
  # holds one. Many small values take far more memory than their bytes.
  values = sum(map(body.count, (b",", b"[", b"{")))
  most = limits.characters + limits.steps + limits.images
  if values > most:
    raise HTTPException(413, f"more than {most} JSON values or characters")
  try:
    value = files.parse_json(body)
  except ValueError as error:
    raise HTTPException(400, f"the body is not valid JSON: {error}") from error
  asked = form(value, aggregate, name)
  steps = [r.steps if isinstance(r.steps, list) else [] for r in asked.records]
  questions = {r.question for r in asked.records if isinstance(r.question, str)}
  texts = [*questions, *(step for own in steps for step in own if isinstance(step, str))]
  images = sum(map(len, {tuple(record.named_images) for record in asked.records}))
  for count, limit, unit in (
    (len(asked.records), limits.solutions, "solutions"),
    (max(map(len, steps)), limits.steps, "steps"),
    (sum(map(len, texts)), limits.characters, "characters"),
    (images, limits.images, "images"),
  ):
    if count > limit:
      raise HTTPException(413, f"{count} {unit}; at most {limit} are accepted")
  return asked


def read(
  records: Sequence[Record], scorer: step_scorer.Scorer, limits: Limits
) -> list[Solution | SolutionError]:
  """Returns the solutions of a request, or why one can't be scored; images are decoded last, once.

  Raises HTTPException or SolutionError if an image is unusable, or the only solution is.
  """
  keys = [tuple(record.named_images) for record in records]
  decode = functools.cache(_decode_base64)
  blank = {
    key: Solution.measured("", ["."], [*map(decode, key)], limits.pixels)
    for key in dict.fromkeys(keys)
  }
  pixels = sum(height * width for one in blank.values() for height, width in one.image_sizes)
  if pixels > limits.pixels:
    raise SolutionError(f"{pixels:,} pixels in all images; at most {limits.pixels:,} are accepted")
  found = [
    _attempt(functools.partial(blank[key].with_texts, record.question, record.steps))
    for key, record in zip(keys, records, strict=True)
  ]
  whole = {i: one for i, one in enumerate(found) if isinstance(one, Solution)}
  for i, reason in solutions.too_long(scorer, [*whole.values()]).items():
    found[[*whole][i]] = SolutionError(reason)
  ready = {
    key: blank[key].prepare_images(scorer).images
    for key in {key for key, one in zip(keys, found, strict=True) if isinstance(one, Solution)}
  }
  return [
    dataclasses.replace(one, images=ready[key]) if isinstance(one, Solution) else one
    for key, one in zip(keys, found, strict=True)
  ]


def _attempt(make: Callable[[], _T]) -> _T | SolutionError:
  try:
    return make()
  except SolutionError as error:
    return error


def _decode_base64(text: str) -> bytes:
  """Returns the bytes of base64, of any line length and perhaps as a data: URI."""
  encoded = re.sub(r"^data:[\w.+-]+/[\w.+-]+;base64,", "", text, flags=re.ASCII)
  try:
    return base64.b64decode(re.sub(r"[ \t\r\n]+", "", encoded), validate=True)
  except (ValueError, binascii.Error) as error:
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


async def _refuse(request: Request, error: Exception) -> JSONResponse:
  status, reason, headers = 500, "internal error; the server's log has more", {}
  if isinstance(error, HTTPException):
    status, reason, headers = error.status_code, error.detail, dict(error.headers or {})
  elif isinstance(error, SolutionError):
    status, reason = 422, str(error)
  elif isinstance(error, FormError):
    status = 404 if isinstance(error, request_forms.UnknownModelError) else 400
    reason = str(error)
  elif isinstance(error, ClientDisconnect):
    status, reason = 400, "the client disconnected"
  shown: str | dict = reason
  if request.url.path == "/pooling":  # as vLLM
    shown = {"message": reason, "type": "BadRequestError", "param": None, "code": status}
  # The unread rest of a body would be parsed as the next request.
  return JSONResponse({"error": shown}, status, headers=headers | {"connection": "close"})
