"""HTTP helpers of the SPARQL endpoint and the Thing Description Directory: errors, content, tokens, threads."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import TypeVar, cast

from starlette.requests import Request
from starlette.responses import Response

MAX_REQUEST = 16 * 1024 * 1024
"""Maximum bytes of a query or an update."""

_T = TypeVar("_T")
# A thread of its own for each request would cost the event loop a turn of the interpreter's lock to start it.
_THREADS = ThreadPoolExecutor(128, "http")


class HttpError(Exception):
    """An error response: its HTTP status and text; `violations` say what is wrong with the content."""

    def __init__(
        self, status: int, text: str, headers: dict[str, str] | None = None, violations: Sequence[str] = ()
    ) -> None:
        super().__init__(text)
        self.status, self.text, self.headers, self.violations = status, text, headers, violations


def problem(error: HttpError) -> Response:
    """Return the error as Problem Details (RFC 7807). A violation may begin with its field's name and a colon."""
    said: dict[str, object] = {
        "title": HTTPStatus(error.status).phrase,
        "status": error.status,
        "detail": error.text,
    }
    if error.violations:
        said["validationErrors"] = [
            {"field": field if found else "(root)", "description": text if found else violation}
            for violation in error.violations
            for field, found, text in [violation.partition(": ")]
        ]
    return Response(json.dumps(said), error.status, error.headers, "application/problem+json")


class RefusalDelay:
    """Lets a client that sends one invalid request after the other wait for the answers, not the others for it.

    Parameters
    ----------
    burst
        Refusals that an address gets at once.
    per_second
        More of them that it gets each second; every further one comes a second late.
    clock
        Seconds that only go forwards.
    """

    def __init__(
        self, burst: float = 40.0, per_second: float = 4.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst, self._per_second, self._clock = burst, per_second, clock
        self._left: dict[str, tuple[float, float]] = {}  # of each address, at a time

    def seconds(self, address: str) -> float:
        """How long the answer to an invalid request of this address should wait."""
        now = self._clock()
        if len(self._left) > 1000:
            self._left = {each: at for each, at in self._left.items() if now - at[1] < self._burst / self._per_second}
        left, then = self._left.get(address, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._per_second)
        self._left[address] = max(0.0, left - 1), now
        return 0.0 if left >= 1 else 1.0


def media_type(request: Request) -> str:
    """Return the media type of the content, without parameters; empty if it has none. 415 if it is not UTF-8."""
    media, *params = (part.strip().lower() for part in request.headers.get("content-type", "").split(";"))
    for param in params:
        name, _, value = param.partition("=")
        if name == "charset" and value.strip('"') not in ("utf-8", "utf8", "us-ascii"):
            raise HttpError(415, f"the content must be UTF-8, not {value}")
    return media


async def body(request: Request, longest: int | None = None) -> bytes:
    """Return the content of the request. 413 if it is longer than `longest`."""
    limit = MAX_REQUEST if longest is None else longest
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > limit:
            raise HttpError(413, f"the request is longer than {limit} bytes")
    return bytes(data)


def choose(accept: str, offered: Iterable[str]) -> str:
    """Return the media type that Accept prefers (RFC 9110, 12.5.1), the first of equals. 406 if it accepts none."""
    wanted: dict[str, float] = {}
    for entry in accept.split(","):
        kind, *params = (part.strip().lower() for part in entry.split(";"))
        quality = 1.0
        for param in params:
            if param.startswith("q="):
                try:
                    quality = float(param[2:])
                except ValueError:
                    quality = 0.0
        wanted[kind] = quality

    def quality_of(media: str) -> float:
        return wanted.get(media, wanted.get(media.split("/")[0] + "/*", wanted.get("*/*", 0.0)))

    media = list(offered)
    best = max(media, key=quality_of)
    if quality_of(best) <= 0:
        raise HttpError(406, f"the result is available as {', '.join(media)}")
    return best


def in_thread(call: Callable[[], _T], ended: Callable[[], None] = lambda: None) -> asyncio.Future[_T]:
    """Run `call` in another thread; return a future of its result or exception. `ended` is called last."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.done():  # the request has been cancelled
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast("_T", result))

    def run() -> None:
        result, failure = None, None
        try:
            result = call()
        except Exception as error:
            failure = error
        finally:
            ended()
        with contextlib.suppress(RuntimeError):  # the endpoint has been closed meanwhile
            loop.call_soon_threadsafe(settle, result, failure)

    _THREADS.submit(run)
    return future
