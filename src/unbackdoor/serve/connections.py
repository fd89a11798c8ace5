"""Connections of clients that wait for nothing: they are closed, so that silence takes no place from anybody.

uvicorn has a limit for the time between two requests only. A client that sends half a request, or that does not read
the end of its answer, would keep its connection for ever.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

LONGEST = 15.0
"""Seconds for a request's headers, at most."""
_LOOK = 0.5


class Impatient(H11Protocol):
    """HTTP/1.1 that closes a connection on which nothing is asked, and drops one whose end is not read.

    Attributes:
        patience: Seconds until that.
    """

    patience: ClassVar[float] = LONGEST
    _state: tuple[object, ...] = ()
    _since: float = 0.0
    _next: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to look at it."""
        super().connection_made(transport)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Look no more."""
        self._next.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        closing = self.transport.is_closing()
        # Between two requests, uvicorn's own limit is at work until the first byte of the second.
        idle = self.timeout_keep_alive_task is None and (self.cycle is None or self.cycle.response_complete)
        # The same request or none, as the last time: bytes that do not end its headers are no sign of life.
        state = (closing, idle, self.cycle)
        if state != self._state:
            self._state, self._since = state, self.loop.time()
        elif self.loop.time() - self._since >= self.patience:
            if closing:
                self.transport.abort()
            elif idle:
                self.transport.close()
        self._next = self.loop.call_later(_LOOK, self._look)


def impatient(timeout: float) -> type[Impatient]:
    """Return the protocol of a server whose requests have so many seconds."""

    class Limited(Impatient):
        patience = min(LONGEST, timeout)

    return Limited
