"""The graph over HTTP: SPARQL 1.1 Protocol on loopback, read-only without a token.

GET and POST queries, POST updates with `Authorization: Bearer TOKEN`; results in the form that Accept asks for. A query
has a limit of time and of bytes. SERVICE is refused: a query must not make this machine fetch from another.
"""

import asyncio
import contextlib
import hmac
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import IO, Self, TypeVar, cast
from urllib.parse import parse_qs

import pyoxigraph as ox
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from edge.errors import UserError
from ontology.store import Store, StoreError

MAX_REQUEST = 16 * 1024 * 1024
"""Bytes of a query or an update."""
MAX_RESULT = 64 * 1024 * 1024
"""Bytes of a result."""

_Format = ox.QueryResultsFormat | ox.RdfFormat
_ROWS: dict[str, _Format] = {
    "application/sparql-results+json": ox.QueryResultsFormat.JSON,
    "application/json": ox.QueryResultsFormat.JSON,
    "application/sparql-results+xml": ox.QueryResultsFormat.XML,
    "application/xml": ox.QueryResultsFormat.XML,
    "text/csv": ox.QueryResultsFormat.CSV,
    "text/tab-separated-values": ox.QueryResultsFormat.TSV,
}
_GRAPH: dict[str, _Format] = {
    "text/turtle": ox.RdfFormat.TURTLE,
    "application/n-triples": ox.RdfFormat.N_TRIPLES,
    "application/rdf+xml": ox.RdfFormat.RDF_XML,
    "application/ld+json": ox.RdfFormat.JSON_LD,
}

# SERVICE where a pattern may begin, which no variable, name or IRI is. Comments and texts are not left out: what reads
# a query otherwise than Oxigraph does could be led past it.
_SERVICE = re.compile(r"(?:(?<![?$:/#_-])(?<![a-z])|(?<=true)|(?<=false))service(?![\w:-])", re.IGNORECASE)


_T = TypeVar("_T")


class _Refused(Exception):
    """A request that gets an error: its HTTP status and text."""

    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, headers


class _Output:
    """Collects a result, and stops it where it gets too long or takes too long."""

    def __init__(self, deadline: float) -> None:
        self.data = bytearray()
        self._deadline = deadline

    def write(self, part: bytes) -> int:
        self.data += part
        if len(self.data) > MAX_RESULT:
            raise _Refused(413, f"the result is longer than {MAX_RESULT} bytes; add a LIMIT")
        if time.monotonic() > self._deadline:
            raise _Refused(503, _TOO_LONG)
        return len(part)

    def flush(self) -> None:
        """Nothing is held back."""


_TOO_LONG = "the query takes too long; make it narrower or add a LIMIT"


def application(store: Store, token: str | None = None, *, timeout: float = 30.0, workers: int = 4) -> Starlette:
    """The endpoint as an ASGI application, at /sparql. Without a token nobody may update.

    A query may take `timeout` seconds, and `workers` may run at once. Oxigraph cannot be stopped before it gives a
    first row: such a query goes on unheard, and while `workers` of them do, others are turned away.
    """
    free = threading.Semaphore(workers)

    def evaluate(sparql: str, accept: str, deadline: float) -> tuple[str, bytes]:
        answer = store.evaluate(sparql)
        try:
            media, form = _choose(accept, _GRAPH if isinstance(answer, ox.QueryTriples) else _ROWS)
            if isinstance(answer, ox.QueryBoolean) and form in (ox.QueryResultsFormat.CSV, ox.QueryResultsFormat.TSV):
                raise _Refused(406, "a boolean comes as JSON or XML")
            output = _Output(deadline)
            answer.serialize(cast("IO[bytes]", output), form)  # type: ignore[arg-type]
            return media, bytes(output.data)
        finally:
            del answer  # an error's traceback would take it to another thread, and Oxigraph's answers may not go there

    async def query(sparql: str, accept: str) -> Response:
        if _SERVICE.search(sparql):
            raise _Refused(403, "SERVICE is not allowed here, nor its name in comments and texts")
        if not free.acquire(blocking=False):
            raise _Refused(503, "the server is busy with other queries; try again later")
        try:
            media, body = await asyncio.wait_for(
                _in_thread(lambda: evaluate(sparql, accept, time.monotonic() + timeout), free.release), timeout
            )
        except TimeoutError:
            raise _Refused(503, _TOO_LONG) from None
        except StoreError as error:
            raise _Refused(400, str(error)) from None
        return Response(body, media_type=media)

    def authorise(request: Request) -> None:
        if token is None:
            raise _Refused(403, "this endpoint takes no updates")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
            raise _Refused(401, "updates need the server's token", {"WWW-Authenticate": "Bearer"})

    async def update(request: Request, sparql: str) -> Response:
        authorise(request)
        try:
            await _in_thread(lambda: store.update(sparql))
        except StoreError as error:
            raise _Refused(400, str(error)) from None
        return Response(status_code=204)

    async def sparql(request: Request) -> Response:
        try:
            accept = request.headers.get("accept", "*/*")
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            fields = _fields(request.url.query)
            if request.method == "GET":
                if "update" in fields:
                    raise _Refused(400, "an update comes by POST")
                return await query(_one(fields, "query"), accept)
            body = await _body(request)
            if kind == "application/x-www-form-urlencoded":
                fields |= _fields(body)
                if "query" in fields and "update" in fields:
                    raise _Refused(400, "a request holds a query or an update, not both")
                if "update" in fields:
                    return await update(request, _one(fields, "update"))
                return await query(_one(fields, "query"), accept)
            if kind == "application/sparql-query":
                return await query(body, accept)
            if kind == "application/sparql-update":
                return await update(request, body)
            raise _Refused(
                415,
                "the content must be application/x-www-form-urlencoded, application/sparql-query or "
                "application/sparql-update",
            )
        except _Refused as error:
            return PlainTextResponse(error.text, error.status, error.headers)
        except ClientDisconnect:
            return Response(status_code=400)

    return Starlette(
        routes=[Route("/sparql", sparql, methods=["GET", "POST"])],
        # So that no web page can reach the endpoint by giving this machine another name.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
    )


def _in_thread(call: Callable[[], _T], ended: Callable[[], None] = lambda: None) -> asyncio.Future[_T]:
    """What `call` returns or raises, from a thread that does not keep the process from ending. `ended` comes last."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.done():  # nobody waits for it any more
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

    threading.Thread(target=run, name="sparql", daemon=True).start()
    return future


def _fields(text: str) -> dict[str, list[str]]:
    try:
        fields = parse_qs(text, keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError as error:
        raise _Refused(400, f"the parameters cannot be read: {error}") from None
    if any(name.endswith("graph-uri") for name in fields):
        raise _Refused(400, "the graph is one: default-graph-uri and its like are not taken")
    return fields


def _one(fields: dict[str, list[str]], name: str) -> str:
    values = fields.get(name, [])
    if len(values) != 1:
        raise _Refused(400, f"a request needs one {name!r}, not {len(values)}")
    return values[0]


async def _body(request: Request) -> str:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_REQUEST:
            raise _Refused(413, f"the request is longer than {MAX_REQUEST} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise _Refused(400, "the request is not UTF-8") from None


def _choose(accept: str, offered: dict[str, _Format]) -> tuple[str, _Format]:
    """The form that Accept likes best (RFC 9110, 12.5.1), of equals the first offered."""
    wanted: dict[str, float] = {}
    for entry in accept.split(","):
        media, *params = (part.strip().lower() for part in entry.split(";"))
        quality = 1.0
        for param in params:
            if param.startswith("q="):
                try:
                    quality = float(param[2:])
                except ValueError:
                    quality = 0.0
        wanted[media] = quality

    def liked(media: str) -> float:
        return wanted.get(media, wanted.get(media.split("/")[0] + "/*", wanted.get("*/*", 0.0)))

    best = max(offered, key=liked)
    if liked(best) <= 0:
        raise _Refused(406, f"the result comes as {', '.join(offered)}")
    return best, offered[best]


class Endpoint:
    """The endpoint, served from a thread of this process on loopback.

    `url` is its address; port 0 takes a free one. Raises UserError if the port is taken.
    """

    def __init__(
        self, store: Store, token: str | None = None, port: int = 0, *, timeout: float = 30.0, workers: int = 4
    ) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("127.0.0.1", port))
            self._socket.listen(128)  # requests wait here until the thread is up
        except OSError as error:
            self._socket.close()
            raise UserError(
                f"port {port} for the SPARQL endpoint cannot be had ({error.strerror}); choose another, or 0 for any"
            ) from None
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/sparql"
        self._server = uvicorn.Server(
            uvicorn.Config(
                application(store, token, timeout=timeout, workers=workers),
                log_level="warning",
                lifespan="off",
                ws="none",
            )
        )
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="endpoint", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Answers what is under way, then stops."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
