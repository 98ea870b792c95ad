"""What one HTTP connection may cost: time to send a request's head, time to read a response, and their number."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


@dataclass
class ConnectionLimits:
    """The limits of a server's connections.

    Parameters
    ----------
    head_seconds
        Time for the head of a request, from its first byte, or from the connection's beginning.
    body_seconds
        Time for the rest of the request.
    stalled_seconds
        Time that a client may take no bytes of a response.
    head_bytes
        Length of a request's line and headers.
    total, per_address
        Connections at the same time, of all clients and of one address.

    Attributes
    ----------
    refused : int
        Connections that were ended for one of these.
    """

    head_seconds: float = 10.0
    body_seconds: float = 60.0
    stalled_seconds: float = 30.0
    head_bytes: int = 65_536
    total: int = 512
    per_address: int = 256
    refused: int = 0
    _open: Counter[str] = field(default_factory=Counter)

    def protocol(self) -> type[asyncio.Protocol]:
        """uvicorn's protocol with these limits: uvicorn itself keeps a request that never ends."""
        limits = self

        class Limited(HttpToolsProtocol):
            _timer: asyncio.TimerHandle | None = None  # of what is awaited now
            _stalled: asyncio.TimerHandle | None = None
            _in_request = False  # its head has come, its end has not
            _head = 0

            def connection_made(self, transport: Any) -> None:
                super().connection_made(transport)
                self._address = str((transport.get_extra_info("peername") or ("",))[0])
                limits._open[self._address] += 1
                if limits._open.total() > limits.total or limits._open[self._address] > limits.per_address:
                    self._refuse()
                else:
                    self._await(limits.head_seconds)

            def connection_lost(self, exc: Exception | None) -> None:
                self._cancel_timers()
                limits._open[self._address] -= 1
                if not limits._open[self._address]:
                    del limits._open[self._address]
                super().connection_lost(exc)

            def data_received(self, data: bytes) -> None:
                if not self._in_request:
                    if self._timer is None:
                        self._await(limits.head_seconds)
                    self._head += len(data)
                super().data_received(data)
                if not self._in_request and self._head > limits.head_bytes:
                    self._refuse()

            def on_headers_complete(self) -> None:
                self._in_request = True
                self._await(limits.body_seconds)
                super().on_headers_complete()

            def on_message_complete(self) -> None:
                self._in_request, self._head = False, 0
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
                super().on_message_complete()

            def pause_writing(self) -> None:
                self._stalled = self.loop.call_later(limits.stalled_seconds, self._refuse)
                super().pause_writing()

            def resume_writing(self) -> None:
                if self._stalled is not None:
                    self._stalled.cancel()
                super().resume_writing()

            def _await(self, seconds: float) -> None:
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self.loop.call_later(seconds, self._refuse)

            def _cancel_timers(self) -> None:
                for timer in (self._timer, self._stalled):
                    if timer is not None:
                        timer.cancel()
                self._timer = None

            def _refuse(self) -> None:
                limits.refused += 1
                self._cancel_timers()
                self.transport.abort()

        return cast("type[asyncio.Protocol]", Limited)
