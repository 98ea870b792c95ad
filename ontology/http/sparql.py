"""The SPARQL 1.1 Protocol and Service Description, as handlers of HTTP requests.

GET and POST for queries, POST for updates with `Authorization: Bearer TOKEN`, on the graphs that the request names, if
any; results in the format that Accept prefers; GET without a query describes the service. Time and result size are
limited. SERVICE is not allowed: a query must not make this machine fetch from another.
"""

import asyncio
import threading
import time
from collections.abc import Mapping
from typing import IO, cast
from urllib.parse import parse_qs

import pyoxigraph as ox
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from tinyfleet.ontology.http import request_handling
from tinyfleet.ontology.http.access import require
from tinyfleet.ontology.http.request_handling import HttpError, in_thread
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.store.query_limits import FetchRefused, QueryTooLong, check_query, check_update
from tinyfleet.ontology.store.query_rewriting import is_library_query
from tinyfleet.ontology.store.query_workers import Busy, QueryStopped, QueryTimeout, QueryWorkers
from tinyfleet.ontology.store.sparql_update import with_graphs
from tinyfleet.ontology.store.store import RECORDS, Dataset, EmbeddedStore, StoreError, short_message
from tinyfleet.ontology.vocabulary.namespaces import Iri

MAX_RESULT = 64 * 1024 * 1024
"""Maximum bytes of a result."""

Formats = Mapping[str, ox.QueryResultsFormat | ox.RdfFormat]
_ROWS: Formats = {
    "application/sparql-results+json": ox.QueryResultsFormat.JSON,
    "application/json": ox.QueryResultsFormat.JSON,
    "application/sparql-results+xml": ox.QueryResultsFormat.XML,
    "application/xml": ox.QueryResultsFormat.XML,
    "text/csv": ox.QueryResultsFormat.CSV,
    "text/tab-separated-values": ox.QueryResultsFormat.TSV,
}
_GRAPH: Formats = {
    "text/turtle": ox.RdfFormat.TURTLE,
    "application/n-triples": ox.RdfFormat.N_TRIPLES,
    "application/rdf+xml": ox.RdfFormat.RDF_XML,
    "application/ld+json": ox.RdfFormat.JSON_LD,
}


class _Output:
    """Collects a result, and stops it when it becomes too long or takes too long."""

    def __init__(self, deadline: float) -> None:
        self.data = bytearray()
        self._deadline = deadline

    def write(self, part: bytes) -> int:
        self.data += part
        if len(self.data) > MAX_RESULT:
            raise HttpError(413, f"the result is longer than {MAX_RESULT} bytes; add a LIMIT")
        if time.monotonic() > self._deadline:
            raise HttpError(408, _TOO_LONG)
        return len(part)

    def flush(self) -> None:
        """Nothing is buffered."""


_TOO_LONG = "the query takes too long; make it more selective or add a LIMIT"


class Protocol:
    """The SPARQL 1.1 Protocol on a store; a registry is told of updates, so that it discards cached values.

    The library's own queries are answered in this process, at most `workers` at a time; all others in processes of
    their own, which are stopped after `timeout` seconds. An update by a client that may write, but not operate, is
    tried on a copy of the graph first.
    """

    def __init__(self, store: EmbeddedStore, registry: Registry | None, timeout: float, workers: int) -> None:
        self._store = store
        self._registry = registry
        self._timeout = timeout
        self._free = threading.Semaphore(workers)
        self.workers = QueryWorkers(store, timeout)

    async def sparql(self, request: Request) -> Response:
        try:
            return await self._sparql(request)
        except HttpError as error:
            return PlainTextResponse(error.text, error.status, error.headers)
        except ClientDisconnect:
            return Response(status_code=400)

    async def _sparql(self, request: Request) -> Response:
        accept = request.headers.get("accept", "*/*")
        fields = _fields(request.url.query)
        if request.method in ("GET", "HEAD"):
            if "update" in fields:
                raise HttpError(400, "send updates by POST")
            if not request.url.query:
                return self._describe(request, accept)
            return await self._query(_one(fields, "query"), fields, accept)
        kind = request_handling.media_type(request)
        body = _text(await request_handling.body(request))
        if kind == "application/x-www-form-urlencoded":
            for name, values in _fields(body).items():
                fields.setdefault(name, []).extend(values)
            if "query" in fields and "update" in fields:
                raise HttpError(400, "send either a query or an update, not both")
            if "update" in fields:
                return await self._update(request, _one(fields, "update"), fields)
            return await self._query(_one(fields, "query"), fields, accept)
        if kind in ("application/sparql-query", "application/sparql-update"):
            if "query" in fields or "update" in fields:
                raise HttpError(400, "send one query or update, either in the address or in the content")
            if kind == "application/sparql-query":
                return await self._query(body, fields, accept)
            return await self._update(request, body, fields)
        raise HttpError(
            415,
            "the content must be application/x-www-form-urlencoded, application/sparql-query or "
            "application/sparql-update",
        )

    async def search(self, request: Request) -> Response:
        """The directory's SPARQL search (WoT Discovery, 7.3.4.3): queries only, with JSON as the default format."""
        fields = _fields(request.url.query)
        if request.method == "POST":
            kind, body = request_handling.media_type(request), _text(await request_handling.body(request))
            if kind == "application/x-www-form-urlencoded":
                fields |= _fields(body)
            else:
                fields["query"] = [body]
        json_first: Formats = {"application/json": ox.QueryResultsFormat.JSON, **_ROWS}
        linked_first: Formats = {"application/ld+json": ox.RdfFormat.JSON_LD, **_GRAPH}
        accept = request.headers.get("accept", "*/*")
        return await self._query(_one(fields, "query"), fields, accept, json_first, linked_first)

    async def _query(
        self,
        sparql: str,
        fields: Mapping[str, list[str]],
        accept: str,
        rows: Formats = _ROWS,
        graph: Formats = _GRAPH,
    ) -> Response:
        default, named = _graphs(fields, "default-graph-uri", "named-graph-uri")
        dataset = Dataset(default, named) if default or named else None
        try:
            check_query(sparql)
            if dataset is None and is_library_query(sparql):
                media, content = await self._own(sparql, accept, rows, graph)
            else:
                media, content = await self._anyones(sparql, dataset, accept, rows, graph)
        except StoreError as error:
            raise _http_error(error) from None
        return Response(content, media_type=media)

    async def _own(self, sparql: str, accept: str, rows: Formats, graph: Formats) -> tuple[str, bytes]:
        """The answer to a query of the library."""
        deadline = time.monotonic() + self._timeout

        def evaluate() -> tuple[str, bytes]:
            answer = self._store.evaluate(sparql)
            try:
                offered = graph if isinstance(answer, ox.QueryTriples) else rows
                media = request_handling.choose(accept, offered)
                output = _Output(deadline)
                answer.serialize(cast("IO[bytes]", output), offered[media])  # type: ignore[arg-type]
                return media, bytes(output.data)
            finally:
                # An error's traceback would carry it to another thread, where an Oxigraph answer must not go.
                del answer

        if not self._free.acquire(blocking=False):
            raise HttpError(503, "the server is busy with other queries; try again later")
        try:
            return await asyncio.wait_for(in_thread(evaluate, self._free.release), self._timeout)
        except TimeoutError:
            raise HttpError(408, _TOO_LONG) from None

    async def _anyones(
        self, sparql: str, dataset: Dataset | None, accept: str, rows: Formats, graph: Formats
    ) -> tuple[str, bytes]:
        """The answer to a query that anyone may have written."""
        text = self._store.for_graph_alone(sparql) if dataset is None else sparql
        wanted = _accepted(accept, rows), _accepted(accept, graph)
        answer = await in_thread(lambda: self.workers.evaluate(text, dataset, *wanted, MAX_RESULT))
        match answer.kind:
            case "done":
                return answer.media, answer.content
            case "rows" | "graph":
                offered = ", ".join(rows if answer.kind == "rows" else graph)
                raise HttpError(406, f"the result is available as {offered}")
            case "boolean":
                raise HttpError(406, "a boolean is available as JSON or XML")
            case "too long":
                raise HttpError(413, f"the result is longer than {MAX_RESULT} bytes; add a LIMIT")
            case "syntax":
                raise HttpError(400, f"the query is not valid SPARQL: {short_message(answer.content.decode())}")
            case _:
                raise HttpError(400, f"the query failed: {short_message(answer.content.decode())}")

    async def _update(self, request: Request, sparql: str, fields: Mapping[str, list[str]]) -> Response:
        require(request, "write")
        default, named = _graphs(fields, "using-graph-uri", "using-named-graph-uri")
        tried = not request.state.client.may("operate")

        def update() -> None:
            check_update(sparql)
            text = with_graphs(sparql, default, named)
            if tried and (answer := self.workers.try_update(text)).kind != "done":
                raise StoreError(f"the update is not valid SPARQL: {short_message(answer.content.decode())}")
            self._store.update(text)

        try:
            await in_thread(update)
        except StoreError as error:
            raise _http_error(error) from None
        if self._registry is not None:
            self._registry.things.reread()
        return Response(status_code=204)

    def _describe(self, request: Request, accept: str) -> Response:
        """The SPARQL 1.1 Service Description; for a browser, the query page."""
        media = request_handling.choose(accept, [*_GRAPH, "text/html"])
        if media == "text/html":
            return RedirectResponse("/", 303)
        languages = ["SPARQL11Query", *(["SPARQL11Update"] if request.state.client.may("write") else [])]
        formats = ("SPARQL_Results_JSON", "SPARQL_Results_XML", "SPARQL_Results_CSV", "SPARQL_Results_TSV")
        graphs = ("Turtle", "N-Triples", "RDF_XML", "JSON-LD")
        text = f"""
            @prefix sd: <http://www.w3.org/ns/sparql-service-description#> .
            @prefix formats: <http://www.w3.org/ns/formats/> .
            [] a sd:Service ;
              sd:endpoint <{request.url.replace(query="")}> ;
              sd:supportedLanguage {", ".join(f"sd:{language}" for language in languages)} ;
              sd:resultFormat {", ".join(f"formats:{form}" for form in (*formats, *graphs))} ;
              sd:defaultDataset [ a sd:Dataset ; sd:defaultGraph [ a sd:Graph ] {self._named()} ] ."""
        triples = [quad.triple for quad in ox.parse(text, ox.RdfFormat.TURTLE)]
        prefixes = {
            "sd": "http://www.w3.org/ns/sparql-service-description#",
            "formats": "http://www.w3.org/ns/formats/",
        }
        form = _GRAPH[media]
        assert isinstance(form, ox.RdfFormat)
        return Response(ox.serialize(triples, format=form, prefixes=prefixes), media_type=media)

    def _named(self) -> str:
        return "" if self._registry is None else f"; sd:namedGraph [ a sd:NamedGraph ; sd:name <{RECORDS}> ]"


def _http_error(error: StoreError) -> HttpError:
    if isinstance(error, QueryTimeout):
        return HttpError(408, str(error))
    if isinstance(error, QueryStopped):
        return HttpError(413, str(error))
    statuses = {Busy: 503, FetchRefused: 403, QueryTooLong: 413}
    return HttpError(statuses.get(type(error), 400), str(error))


def _accepted(accept: str, offered: Formats) -> str | None:
    try:
        return request_handling.choose(accept, offered)
    except HttpError:
        return None


def _fields(text: str) -> dict[str, list[str]]:
    try:
        return parse_qs(text, keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError as error:
        raise HttpError(400, f"the parameters cannot be read: {error}") from None


def _one(fields: Mapping[str, list[str]], name: str) -> str:
    values = fields.get(name, [])
    if len(values) != 1:
        raise HttpError(400, f"the request must have one {name!r}, not {len(values)}")
    return values[0]


def _graphs(fields: Mapping[str, list[str]], default: str, named: str) -> tuple[list[Iri], list[Iri]]:
    """The default graphs and the named graphs of the request."""
    for name in fields:
        if name.endswith("graph-uri") and name not in (default, named):
            raise HttpError(400, f"{name} does not apply here; use {default} and {named}")

    def listed(name: str) -> list[Iri]:
        # W3C's test query_multiple_dataset encodes the & between two of these as %26; no graph has such a name.
        return [Iri(graph) for given in fields.get(name, []) for graph in given.split(f"&{name}=")]

    return listed(default), listed(named)


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise HttpError(400, "the request is not UTF-8") from None
