"""HTTP/1.1 for the server that closes connections on which no request arrives."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

HEAD_SECONDS = 20.0


class Protocol(H11Protocol):
  """Uvicorn's, but a silent client, or one that sends a head byte by byte, is closed."""

  head_seconds = HEAD_SECONDS

  def connection_made(self, transport: asyncio.Transport) -> None:
    super().connection_made(transport)
    self._watch_later()

  def connection_lost(self, exc: Exception | None) -> None:
    self._timer.cancel()
    super().connection_lost(exc)

  def _watch_later(self) -> None:
    self._timer = self.loop.call_later(self.head_seconds, self._watch, self.cycle)

  def _watch(self, last: RequestResponseCycle | None) -> None:
    # A request that is being read or answered has limits of its own.
    answered = self.cycle is None or self.cycle.response_complete
    if answered and self.cycle is last:
      self.transport.close()
    else:
      self._watch_later()
