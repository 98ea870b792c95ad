"""The graph over HTTP, on loopback: SPARQL at /sparql, the query page at /, the Thing Description Directory at /things,
the vocabulary at /vocabulary.

Any process on this machine may read; writing requires the token.
"""

import asyncio
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
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
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from tinyfleet.edge.errors import UserError
from tinyfleet.ontology.http import request_handling
from tinyfleet.ontology.http.directory import Directory
from tinyfleet.ontology.http.request_handling import HttpError, in_thread
from tinyfleet.ontology.http.sparql import Protocol
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.store import Store
from tinyfleet.ontology.vocabulary import page
from tinyfleet.ontology.vocabulary.entailment import VOCABULARY
from tinyfleet.ontology.vocabulary.namespaces import PREFIXES, RDF, Iri

PAGE = Path(__file__).with_name("page") / "dist"
"""The query page, as tools/page.sh builds it."""
# The page runs its own scripts and talks to this server only. YASGUI sets styles in elements.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_NOT_BUILT = "The query page is not built; build it with `make page` (requires npm). The endpoint is at /sparql."
_PURGE = 60.0
"""Seconds between removals of expired descriptions."""


def _page(registry: Registry | None) -> list[BaseRoute]:
    """The query page and its data: the fleet's name, the library's queries, and prefixes and terms for completion."""

    async def index(request: Request) -> Response:
        if not (PAGE / "index.html").exists():
            return PlainTextResponse(_NOT_BUILT, 404)
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": _POLICY})

    async def about(request: Request) -> Response:
        fleet = None if registry is None else registry.fleet
        return JSONResponse({"fleet": fleet, "prefixes": PREFIXES, "queries": _library(), **_vocabulary()})

    return [
        Route("/", index, methods=["GET"]),
        Route("/page/about.json", about, methods=["GET"]),
        Mount("/page", StaticFiles(directory=PAGE, check_dir=False)),
    ]


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


class Endpoint:
    """Serves a graph on loopback, from a thread of this process.

    Parameters
    ----------
    store
        The graph.
    token
        Token for writing; without one, nothing can be written.
    port
        TCP port; 0 picks a free one.
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

    Attributes
    ----------
    url, address : str
        Address of SPARQL, and of everything else.

    Raises
    ------
    UserError
        If the port is in use.
    """

    def __init__(
        self,
        store: Store,
        token: str | None = None,
        port: int = 0,
        *,
        registry: Registry | None = None,
        deleted: Callable[[Iri], None] = lambda id: None,
        routes: Sequence[BaseRoute] = (),
        timeout: float = 30.0,
        workers: int = 4,
    ) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("127.0.0.1", port))
            self._socket.listen(128)  # requests wait here until the thread runs
        except OSError as error:
            self._socket.close()
            raise UserError(
                f"cannot use port {port} for the HTTP server ({error.strerror}); choose another, or 0 for a free one"
            ) from None
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.url = f"{self.address}/sparql"
        protocol = Protocol(store, token, registry, timeout, workers)
        self._directory = None if registry is None else Directory(registry, protocol, token, deleted)
        served = [*routes, *(Route(path, protocol.sparql, methods=["GET", "POST"]) for path in ("/sparql", "/sparql/"))]
        served += [Route("/vocabulary", _terms, methods=["GET"]), *_page(registry)]
        if self._directory is not None:
            served += self._directory.routes

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

        application = Starlette(
            routes=served,
            # A web page must not reach the endpoint by giving this machine another name.
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
            exception_handlers={HTTPException: _no_route},
            lifespan=purging,
        )
        self._server = uvicorn.Server(uvicorn.Config(application, log_level="warning", ws="none"))
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="endpoint", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Finish the current requests, then stop."""
        self._server.should_exit = True
        if self._directory is not None:
            self._directory.close()
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
