"""HTTP/1.1 for the server that closes connections on which no request arrives."""

import asyncio
import collections
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle


class Protocol(H11Protocol):
  """Uvicorn's, but a silent client, or one that sends a head byte by byte, is closed.

  So is the oldest idle connection of the client with the most, once there are `most` connections.
  """

  head_seconds = 20.0
  most = 512  # below the usual limit of 1024 open files
  _open: ClassVar[dict["Protocol", None]] = {}  # the oldest first

  def connection_made(self, transport: asyncio.Transport) -> None:
    super().connection_made(transport)
    self._watch_later()
    if len(self._open) >= self.most:
      self._close_oldest()
    self._open[self] = None

  def connection_lost(self, exc: Exception | None) -> None:
    self._timer.cancel()
    self._open.pop(self, None)
    super().connection_lost(exc)

  def _close_oldest(self) -> None:
    idle = [one for one in self._open if one._is_idle()]
    [(most, _)] = collections.Counter(map(_address, idle)).most_common(1) or [(None, 0)]
    oldest = next((one for one in idle if _address(one) == most), self)
    self._open.pop(oldest, None)
    oldest.transport.close()

  def _is_idle(self) -> bool:
    return self.cycle is None or self.cycle.response_complete

  def _watch_later(self) -> None:
    self._timer = self.loop.call_later(self.head_seconds, self._watch, self.cycle)

  def _watch(self, last: RequestResponseCycle | None) -> None:
    # A request that is being read or answered has limits of its own.
    if self._is_idle() and self.cycle is last:
      self.transport.close()
    else:
      self._watch_later()


def _address(connection: Protocol) -> str | None:
  return connection.client[0] if connection.client else None
