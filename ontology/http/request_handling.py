"""HTTP helpers of the SPARQL endpoint and the Thing Description Directory: errors, content, tokens, threads."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from typing import TypeVar, cast

from starlette.requests import Request
from starlette.responses import Response

MAX_REQUEST = 16 * 1024 * 1024
"""Maximum bytes of a query or an update."""

_T = TypeVar("_T")


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
    """Run `call` in a daemon thread; return a future of its result or exception. `ended` is called last."""
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

    threading.Thread(target=run, name="http", daemon=True).start()
    return future
