"""A time limit for a request's arrival: a connection that never sends its request whole must not keep its place."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, for its setting `http`, that closes a connection whose request is not whole after
    `seconds`.
    """

    class TimedProtocol(H11Protocol):
        _limit: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
                self._limit = self._limit or self.loop.call_later(seconds, self.transport.close)
            else:
                self._stop()

        def _stop(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
            self._limit = None

    return TimedProtocol
