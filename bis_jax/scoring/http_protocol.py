"""HTTP/1.1 for the server: silent connections are closed, and at the end all others are answered."""

import asyncio
import collections
import contextlib
import signal
import socket
from typing import ClassVar

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle


def serve(app: ASGIApp, listener: socket.socket, stop_seconds: int) -> None:
  """Serves until SIGTERM, then answers what has connected, in at most about `stop_seconds`."""
  # Uvicorn stops on SIGTERM and then raises it once more, which would look like a crash.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  Server(app, stop_seconds, Protocol).run(sockets=[listener])


class Server(uvicorn.Server):
  """Uvicorn's, which stops without a reset of connections that the kernel has accepted."""

  accept_seconds = 1.0  # limit for accepting them while clients keep connecting

  def __init__(self, app: ASGIApp, stop_seconds: int, protocol: type["Protocol"]):
    self._make_protocol = protocol
    config = uvicorn.Config(
      app,
      http=protocol,
      loop="asyncio",  # `shutdown` takes its listeners over
      access_log=False,
      timeout_graceful_shutdown=stop_seconds,
    )
    super().__init__(config)

  async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
    loop = asyncio.get_running_loop()
    self.server_state.default_headers.append((b"connection", b"close"))
    for listener in sockets or []:
      loop.remove_reader(listener)
    for _ in range(3):  # what the loop has accepted gets its protocol
      await asyncio.sleep(0)
    end = loop.time() + self.accept_seconds
    for listener in sockets or []:
      with contextlib.suppress(BlockingIOError):
        while loop.time() < end:
          connection, _ = listener.accept()
          await loop.connect_accepted_socket(self._protocol, connection)
    await super().shutdown(sockets)

  def _protocol(self) -> asyncio.Protocol:
    return self._make_protocol(self.config, self.server_state, self.lifespan.state)


class Protocol(H11Protocol):
  """Uvicorn's, but a silent client, or one that sends a head byte by byte, is closed.

  So is the oldest idle connection of the client with the most, once there are `most` connections.
  """

  head_seconds = 20.0
  last_seconds = 2.0  # for a request that is on its way when the server stops
  most = 512  # below the usual limit of 1024 open files
  _open: ClassVar[dict["Protocol", None]] = {}  # the oldest first

  def connection_made(self, transport: asyncio.Transport) -> None:
    super().connection_made(transport)
    self._watch_later(self.head_seconds)
    if len(self._open) >= self.most:
      self._close_oldest()
    self._open[self] = None

  def connection_lost(self, exc: Exception | None) -> None:
    self._timer.cancel()
    self._open.pop(self, None)
    super().connection_lost(exc)

  def shutdown(self) -> None:
    """The next answer, or the one in progress, is the last of the connection."""
    if self._is_idle():
      self._timer.cancel()
      self._watch_later(self.last_seconds)
    else:
      self.cycle.default_headers = self.server_state.default_headers  # Connection: close
      super().shutdown()

  def _close_oldest(self) -> None:
    idle = [one for one in self._open if one._is_idle()]
    [(most, _)] = collections.Counter(map(_address, idle)).most_common(1) or [(None, 0)]
    oldest = next((one for one in idle if _address(one) == most), self)
    self._open.pop(oldest, None)
    oldest.transport.close()

  def _is_idle(self) -> bool:
    return self.cycle is None or self.cycle.response_complete

  def _watch_later(self, seconds: float) -> None:
    self._timer = self.loop.call_later(seconds, self._watch, self.cycle)

  def _watch(self, last: RequestResponseCycle | None) -> None:
    # A request that is being read or answered has limits of its own.
    if self._is_idle() and self.cycle is last:
      self.transport.close()
    else:
      self._watch_later(self.head_seconds)


def _address(connection: Protocol) -> str | None:
  return connection.client[0] if connection.client else None
