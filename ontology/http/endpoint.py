"""The graph over HTTP: SPARQL at /sparql, the query page at /, the Thing Description Directory at /things, and the
vocabulary at /vocabulary. Every route says which scope it needs; see `access`.
"""

import asyncio
import ipaddress
import logging
import re
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

import pyoxigraph as ox
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from tinyfleet.edge.errors import UserError, printable
from tinyfleet.edge.wire.broker_address import is_loopback
from tinyfleet.ontology.http import request_handling
from tinyfleet.ontology.http.access import Access, Boundary, Served, authorised, guarded, login_routes
from tinyfleet.ontology.http.connections import ConnectionLimits, Loop
from tinyfleet.ontology.http.directory import Directory
from tinyfleet.ontology.http.request_handling import HttpError, in_thread
from tinyfleet.ontology.http.sparql import Protocol
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.store import EmbeddedStore
from tinyfleet.ontology.vocabulary import page
from tinyfleet.ontology.vocabulary.entailment import VOCABULARY
from tinyfleet.ontology.vocabulary.namespaces import PREFIXES, RDF, Iri

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page") / "dist"
"""The query page, as tools/page.sh builds it."""
# The page runs its own scripts and talks to this server only. YASGUI sets styles in elements.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_NOT_BUILT = "The query page is not built; build it with `make page` (requires npm). The endpoint is at /sparql."
_LOG_IN = """<!doctype html><meta charset="utf-8"><title>TinyFleet: log in</title>
<h1>Log in</h1><p>On the machine of the server, run <code>tinyfleet server login</code> and open the address that it
prints.</p>"""
_SHUTDOWN = 5
"""Seconds that requests may still take when the server ends."""
_PURGE = 60.0
"""Seconds between removals of expired descriptions."""


def _page(registry: Registry | None, access: Access) -> list[Served]:
    """The query page and its data: the fleet's name, the library's queries, prefixes and terms for completion, and the
    session's CSRF token."""

    async def index(request: Request) -> Response:
        if not (PAGE / "index.html").exists():
            return PlainTextResponse(_NOT_BUILT, 404)
        try:
            authorised(access.identify(request), "read")
        except HttpError:
            return HTMLResponse(_LOG_IN, 401, headers={"Content-Security-Policy": _POLICY})
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": _POLICY})

    async def about(request: Request) -> Response:
        fleet = None if registry is None else registry.fleet
        said = {"fleet": fleet, "prefixes": PREFIXES, "queries": _library(), "csrf": access.csrf(request)}
        return JSONResponse({**said, **_vocabulary()})

    return [Served("GET", "/", None, index), Served("GET", "/page/about.json", "read", about)]


def _library() -> list[dict[str, Any]]:
    queries = [library.query(name) for name in library.names()]
    return [
        {
            "name": query.name,
            "about": query.about,
            "parameters": [{"name": name, "about": about} for name, about in query.parameters.items()],
            "text": query.sparql,
        }
        for query in queries
    ]


@cache
def _vocabulary() -> dict[str, list[str]]:
    """The vocabulary's classes and properties, for completion."""
    found: dict[str, list[str]] = {"classes": [], "properties": []}
    quads = ox.parse(path=str(VOCABULARY), format=ox.RdfFormat.TURTLE)
    for quad in quads:
        if quad.predicate.value == RDF.type and isinstance(quad.subject, ox.NamedNode):
            kind = re.sub(".*(Class|Property)$", r"\1", str(quad.object).strip("<>"))
            if kind in ("Class", "Property"):
                found["classes" if kind == "Class" else "properties"].append(quad.subject.value)
    return {kind: sorted(set(terms)) for kind, terms in found.items()}


async def _terms(request: Request) -> Response:
    """The vocabulary: a web page, or Turtle if the client prefers it."""
    try:
        media = request_handling.choose(request.headers.get("accept", "*/*"), ("text/html", "text/turtle"))
    except HttpError as error:
        return request_handling.problem(error)
    headers = {"Vary": "Accept", "Content-Security-Policy": _POLICY}
    if media == "text/turtle":
        return Response(VOCABULARY.read_bytes(), headers=headers, media_type=media)
    return Response(await in_thread(_vocabulary_page), headers=headers, media_type=media)


_vocabulary_page = cache(page.page)


async def _no_route(request: Request, error: Exception) -> Response:
    """A request without a route, as Problem Details."""
    assert isinstance(error, HTTPException)
    return request_handling.problem(
        HttpError(error.status_code, f"{request.url.path}: {HTTPStatus(error.status_code).phrase}")
    )


async def _failed(request: Request, error: Exception) -> Response:
    """An error of the server's own: logged with all there is, answered without any of it."""
    log.error("an error at %s", printable(request.url.path), exc_info=error)
    return request_handling.problem(HttpError(500, "an error in the server; see its log"))


class Endpoint:
    """Serves a graph, from a thread of this process.

    Parameters
    ----------
    store
        The graph.
    access
        Who may do what.
    port
        TCP port; 0 picks a free one.
    listen
        IP address to listen on. Default: this machine only.
    certificate
        Files of the server's certificate and its key, for HTTPS; without them it is HTTP, on this machine only.
    host_names
        Names and addresses of this machine, beside localhost, under which clients find it. The first is in `address`.
    cors_origins
        Origins whose pages may use a token.
    registry
        If given, its Thing Descriptions are served as a directory.
    deleted
        Called with the ID of each thing that a client deletes.
    routes
        Others to serve.
    timeout
        Maximum seconds for a query.
    workers
        Maximum number of queries at the same time.
    limits
        What a connection may cost.

    Attributes
    ----------
    answers : Counter
        Answers so far, by status.
    url, address : str
        Address of SPARQL, and of everything else.
    local_address : str
        Address of everything for clients on this machine.
    port : int
        TCP port.
    routes : list
        All routes.

    Raises
    ------
    UserError
        If the port is in use, or the address is not this machine's.
    """

    def __init__(
        self,
        store: EmbeddedStore,
        access: Access,
        port: int = 0,
        *,
        listen: str = "127.0.0.1",
        certificate: tuple[Path, Path] | None = None,
        host_names: Sequence[str] = (),
        cors_origins: Iterable[str] = (),
        registry: Registry | None = None,
        deleted: Callable[[Iri], None] = lambda id: None,
        routes: Sequence[Served] = (),
        timeout: float = 30.0,
        workers: int = 4,
        limits: ConnectionLimits | None = None,
    ) -> None:
        if certificate is None and not is_loopback(listen):
            raise UserError(f"without a certificate the HTTP server must not listen on {listen}, only on 127.0.0.1")
        self.access = access
        self._certificate = certificate
        self.limits = limits or ConnectionLimits()
        self.answers: Counter[int] = Counter()
        self._socket = _listening(listen, port)
        self.port = int(self._socket.getsockname()[1])
        secure = certificate is not None
        local = "127.0.0.1" if ipaddress.ip_address(listen).is_unspecified else listen
        self.local_address, self.address = (
            f"{'https' if secure else 'http'}://{_bracketed(host)}:{self.port}"
            for host in (local, next(iter(host_names), local))
        )
        self.url = f"{self.address}/sparql"
        protocol = Protocol(store, registry, timeout, workers)
        self.queries = protocol.workers
        self._directory = None if registry is None else Directory(registry, protocol, deleted)
        served = [
            *routes,
            *(Served(method, "/sparql", "read", protocol.sparql) for method in ("GET", "POST")),
            *(Served(method, "/sparql/", "read", protocol.sparql) for method in ("GET", "POST")),
            Served("GET", "/vocabulary", None, _terms),
            *_page(registry, access),
            *([] if self._directory is None else self._directory.served),
        ]
        paths: list[BaseRoute] = [
            Route(path, handler if needed is None else guarded(access, needed, handler), methods=[method])
            for method, path, needed, handler in served
        ]
        paths += login_routes(access, secure=secure)
        if PAGE.is_dir():
            paths.append(Mount("/page", StaticFiles(directory=PAGE)))

        @asynccontextmanager
        async def purging(_app: Starlette) -> AsyncIterator[None]:
            async def purge(registry: Registry) -> None:
                while True:
                    await in_thread(registry.things.purge)
                    await asyncio.sleep(_PURGE)

            task = None if registry is None else asyncio.create_task(purge(registry))
            yield
            if task is not None:
                task.cancel()

        names = frozenset({"127.0.0.1", "::1", "localhost", *(name.lower() for name in host_names)})
        application = Starlette(
            routes=paths,
            middleware=[Middleware(Boundary, hosts=names, origins=frozenset(cors_origins), answers=self.answers)],
            exception_handlers={HTTPException: _no_route, Exception: _failed},
            lifespan=purging,
        )
        config = uvicorn.Config(
            application,
            log_level="critical",
            access_log=False,
            ws="none",
            http=self.limits.protocol(),
            loop=f"{Loop.__module__}:{Loop.__name__}",
            server_header=False,
            timeout_graceful_shutdown=_SHUTDOWN,
            ssl_certfile=None if certificate is None else str(certificate[0]),
            ssl_keyfile=None if certificate is None else str(certificate[1]),
        )
        self.routes = paths
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="endpoint", daemon=True
        )
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it serves; false after `close`, or if its thread has died."""
        return self._thread.is_alive()

    def read_certificate(self) -> None:
        """Show the certificate that is in its files now, to new connections."""
        if self._certificate is not None and self._server.config.ssl is not None:
            self._server.config.ssl.load_cert_chain(*self._certificate)

    def close(self) -> None:
        """Finish the current requests, then stop."""
        self._server.should_exit = True
        if self._directory is not None:
            self._directory.close()
        self._thread.join()
        self._socket.close()
        self.queries.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _listening(listen: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in listen else socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((listen, port))
        listening.listen(128)  # requests wait here until the thread runs
    except OSError as error:
        listening.close()
        raise UserError(
            f"cannot use port {port} on {listen} for the HTTP server ({error.strerror}); choose another with "
            "--http-port, or 0 for a free one"
        ) from None
    return listening


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
