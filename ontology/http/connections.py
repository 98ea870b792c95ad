"""What one HTTP connection may cost: time to send a request's head, time to read a response, and their number."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HANDSHAKE_SECONDS = 10.0
"""Time for a TLS handshake. Until it is done, a connection counts in none of the limits."""


class Loop(asyncio.SelectorEventLoop):
    """The server's event loop. uvicorn leaves asyncio's minute for a handshake."""

    async def create_server(self, *args: Any, **options: Any) -> asyncio.Server:
        """Limit the time of handshakes."""
        if options.get("ssl") is not None:
            options["ssl_handshake_timeout"] = HANDSHAKE_SECONDS
        return await super().create_server(*args, **options)


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
        Length of a request's line and headers; as much again of trailers, or of what is between two parts of a body.
    pipelined
        Requests that a client may send before the answer to an earlier one.
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
    pipelined: int = 16
    total: int = 512
    per_address: int = 256
    refused: int = 0
    _open: Counter[str] = field(default_factory=Counter)

    @property
    def open(self) -> int:
        """Connections now."""
        return self._open.total()

    def protocol(self) -> type[asyncio.Protocol]:
        """uvicorn's protocol with these limits: uvicorn itself keeps a request that never ends."""
        limits = self

        class Limited(HttpToolsProtocol):
            _timer: asyncio.TimerHandle | None = None  # of what is awaited now
            _stalled: asyncio.TimerHandle | None = None
            _unread: asyncio.TimerHandle | None = None  # since the last response
            _in_request = False  # its head has come, its end has not
            _refused = False
            _head = 0  # bytes since the last that were of a body, or ended a request

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
                if not self._in_request and self._timer is None:
                    self._await(limits.head_seconds)
                self._head += len(data)
                super().data_received(data)
                if self._head > limits.head_bytes:
                    self._refuse()

            def on_headers_complete(self) -> None:
                length = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
                if length > limits.head_bytes or len(self.pipeline) >= limits.pipelined:
                    self._refuse()
                    raise ConnectionAbortedError  # ends the parser, which may have thousands of requests left
                self._in_request = True
                self._await(limits.body_seconds)
                super().on_headers_complete()

            def on_body(self, body: bytes) -> None:
                self._head = 0
                super().on_body(body)

            def on_message_complete(self) -> None:
                self._in_request, self._head = False, 0
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
                super().on_message_complete()

            def on_response_complete(self) -> None:
                self._await_reading()
                super().on_response_complete()

            def send_400_response(self, msg: str) -> None:
                super().send_400_response(msg)
                self._await_reading()

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
                for timer in (self._timer, self._stalled, self._unread):
                    if timer is not None:
                        timer.cancel()
                self._timer = None

            def _await_reading(self) -> None:
                """A closed connection lives until its last bytes are taken; few bytes do not call `pause_writing`."""
                if self._unread is not None:
                    self._unread.cancel()
                self._unread = self.loop.call_later(limits.stalled_seconds, self._refuse_unread)

            def _refuse_unread(self) -> None:
                at_end = self.transport.is_closing() or self.cycle.response_complete
                if at_end and self.transport.get_write_buffer_size():
                    self._refuse()

            def _refuse(self) -> None:
                limits.refused += not self._refused
                self._refused = True
                self._cancel_timers()
                self.transport.abort()

        return cast("type[asyncio.Protocol]", Limited)
