"""The fleet as a W3C Thing Description Directory (WoT Discovery, 7.3): create, retrieve, update, delete, list, events.

Descriptions that arrive here go through the registry, as those over MQTT do, and both are served here. Writing requires
the token. Errors are Problem Details (RFC 7807).
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tinyfleet.edge.errors import UserError
from tinyfleet.ontology.http import request_handling
from tinyfleet.ontology.http.access import Served
from tinyfleet.ontology.http.request_handling import HttpError, in_thread
from tinyfleet.ontology.http.sparql import Protocol
from tinyfleet.ontology.ingest.description_parser import (
    MAX_BYTES,
    TD_CONTEXT,
    RejectedMessage,
    parse_thing_description,
)
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.ingest.thing_store import CONTEXT, SORTED_BY, Thing, ThingEvent, merged
from tinyfleet.ontology.store.store import StoreError
from tinyfleet.ontology.vocabulary.namespaces import Iri

PAGE = 1000
"""Maximum number of descriptions in one response."""
_ALIVE = 15.0
"""Seconds without events after which a stream sends a sign of life."""
_BEHIND = 1000
"""Events that a client may lag behind; then its stream ends, and it can reconnect for the rest."""
MAX_STREAMS = 100
"""Streams of events at the same time."""

_EVENTS = ("thing_created", "thing_updated", "thing_deleted")
_JSON = ("", "application/td+json", "application/json", "application/ld+json")
_Handler = Callable[[Request], Awaitable[Response]]


class Directory:
    """The handlers of the directory's requests; `deleted` is called with the ID of each thing that a client deletes."""

    def __init__(
        self,
        registry: Registry,
        protocol: Protocol,
        deleted: Callable[[Iri], None] = lambda id: None,
    ) -> None:
        self._registry = registry
        self._things = registry.things
        self._deleted = deleted
        self._streams: set[Callable[[ThingEvent | None], None]] = set()
        self.served = [
            Served("GET", "/.well-known/wot", "read", _answering(self._self)),
            Served("GET", "/things", "read", _answering(self._list)),
            Served("POST", "/things", "write", _answering(self._create)),
            Served("GET", "/things/{id:path}", "read", _answering(self._retrieve)),
            Served("PUT", "/things/{id:path}", "write", _answering(self._replace)),
            Served("PATCH", "/things/{id:path}", "write", _answering(self._update)),
            Served("DELETE", "/things/{id:path}", "write", _answering(self._delete)),
            Served("GET", "/events", "read", _answering(self._events)),
            Served("GET", "/events/{kind}", "read", _answering(self._events)),
            Served("GET", "/search/sparql", "read", _answering(protocol.search)),
            Served("POST", "/search/sparql", "read", _answering(protocol.search)),
        ]

    def close(self) -> None:
        """End the streams of events, which would not end by themselves. Any thread may call this."""
        for put in list(self._streams):
            put(None)

    async def _create(self, request: Request) -> Response:
        given = await self._given(request, _JSON)
        if "id" in given or "@id" in given:
            raise HttpError(400, "to create a description with an id, PUT it to /things/{id}", violations=["id: none"])
        try:
            id = self._registry.name(given)
        except UserError as error:
            raise HttpError(400, str(error)) from None
        await self._writing(lambda: self._registry.put_description(given | {"id": str(id)}))
        return Response(status_code=201, headers={"Location": _path(id)})

    async def _replace(self, request: Request) -> Response:
        given = await self._given(request, _JSON)
        id = request.path_params["id"]
        if given.get("id", given.get("@id")) != id:
            what = f"the description's id must be the one in the address, {id}"
            raise HttpError(400, what, violations=[f"id: {id}"])
        created = await self._writing(lambda: self._registry.put_description(given))
        return Response(status_code=201 if created else 204, headers={"Location": _path(id)} if created else None)

    async def _update(self, request: Request) -> Response:
        patch = await self._given(request, ("application/merge-patch+json",))
        id = Iri(request.path_params["id"])

        def change() -> bool:
            with self._things.lock:  # held from reading to writing
                thing = self._known(id)
                changed = merged(thing.enriched(), patch)
                if changed.get("id", changed.get("@id")) != thing.id:
                    raise HttpError(400, "the id cannot be changed", violations=[f"id: {thing.id}"])
                return self._registry.put_description(changed)

        await self._writing(change)
        return Response(status_code=204)

    async def _delete(self, request: Request) -> Response:
        id = Iri(request.path_params["id"])

        def delete() -> None:
            with self._things.lock:
                self._known(id)
                self._things.remove(id)
            self._deleted(id)

        await in_thread(delete)
        return Response(status_code=204)

    async def _retrieve(self, request: Request) -> Response:
        thing = await in_thread(lambda: self._known(Iri(request.path_params["id"])))
        return _json(thing.enriched(datetime.now(UTC)), "application/td+json")

    async def _list(self, request: Request) -> Response:
        asked = request.query_params
        offset = _number(asked.get("offset", "0"), "offset", 0)
        limit = min(PAGE, _number(asked.get("limit", str(PAGE)), "limit", 1))
        form, sort_by, order = asked.get("format", "array"), asked.get("sort_by", "id"), asked.get("sort_order", "asc")
        if form not in ("array", "collection"):
            raise HttpError(400, "format must be array or collection")
        if sort_by not in SORTED_BY:
            raise HttpError(501, f"sort_by must be one of {', '.join(SORTED_BY)}")
        if order not in ("asc", "desc"):
            raise HttpError(400, "sort_order must be asc or desc")

        def read() -> tuple[list[Any], int]:
            now = datetime.now(UTC)
            page = self._things.page(offset, limit, sort_by, order == "desc")
            return [thing.enriched(now) for thing in page], self._things.count()

        page, total = await in_thread(read)

        def address(at: int) -> str:
            said: dict[str, str | int] = {"offset": at, "limit": limit}
            said |= {name: asked[name] for name in ("sort_by", "sort_order", "format") if name in asked}
            return f"/things?{urlencode(said)}"

        following = address(offset + limit) if offset + limit < total else None
        links = [f'<{following}>; rel="next"'] if following else []
        links.append(f'</things>; rel="canonical"; etag="{self._things.edition}"')
        content: Any = page
        if form == "collection":
            content = {"@context": CONTEXT, "@type": "ThingCollection", "@id": address(offset), "total": total}
            content |= {"next": following} if following else {}
            content["members"] = page
        return _json(content, "application/ld+json", {"Link": ", ".join(links)})

    async def _events(self, request: Request) -> Response:
        kind = request.path_params.get("kind")
        if kind is not None and kind not in _EVENTS:
            raise HttpError(404, f"the events are {', '.join(_EVENTS)}")
        whole = request.query_params.get("diff", "false")
        if whole not in ("true", "false"):
            raise HttpError(400, "diff must be true or false")
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        if len(self._streams) >= MAX_STREAMS:
            raise HttpError(503, f"there are {MAX_STREAMS} streams of events already", {"Retry-After": "60"})
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[ThingEvent | None] = asyncio.Queue()

        def add(event: ThingEvent | None) -> None:
            if queue.qsize() < _BEHIND:
                queue.put_nowait(event)
            elif queue.qsize() == _BEHIND:
                queue.put_nowait(None)

        def put(event: ThingEvent | None) -> None:
            loop.call_soon_threadsafe(add, event)

        self._streams.add(put)
        stream = self._stream(put, queue, kind, whole == "true", request.headers.get("last-event-id"))
        return _EventStream(stream, lambda: self._streams.discard(put))

    async def _stream(
        self,
        put: Callable[[ThingEvent | None], None],
        queue: asyncio.Queue[ThingEvent | None],
        kind: str | None,
        whole: bool,
        since: str | None,
    ) -> AsyncIterator[str]:
        end = await in_thread(lambda: self._things.listen(put, since))
        try:
            yield ": the directory's events\n\n"
            while True:
                try:
                    event = await asyncio.wait_for(queue.get(), _ALIVE)
                except TimeoutError:
                    yield ": still here\n\n"
                    continue
                if event is None:
                    return
                if kind in (None, event.kind):
                    data = event.change if whole and event.kind != "thing_deleted" else {"id": event.id}
                    yield f"event: {event.kind}\ndata: {json.dumps(data)}\nid: {self._things.era}.{event.number}\n\n"
        finally:
            end()

    async def _self(self, request: Request) -> Response:
        return _json(description(str(request.base_url), self._registry.fleet), "application/td+json")

    async def _given(self, request: Request, kinds: tuple[str, ...]) -> dict[str, Any]:
        """The JSON object sent by an authorised client."""
        if request_handling.media_type(request) not in kinds:
            raise HttpError(415, f"the content must be {' or '.join(kind for kind in kinds if kind)}")
        content = await request_handling.body(request, MAX_BYTES)
        try:
            return parse_thing_description(content)
        except RejectedMessage as reason:
            raise HttpError(400, str(reason), violations=reason.violations) from None

    async def _writing(self, write: Callable[[], bool]) -> bool:
        try:
            return await in_thread(write)
        except RejectedMessage as reason:
            raise HttpError(400, "the description is not valid", violations=reason.violations) from None
        except StoreError:
            raise
        except UserError as error:
            raise HttpError(400, "the description is not valid", violations=[str(error)]) from None

    def _known(self, id: Iri) -> Thing:
        """The description with this ID. 404 if there is none."""
        with suppress(StoreError):  # not an IRI, so not the ID of a thing
            thing = self._things.get(id)
            if thing is not None:
                return thing
        raise HttpError(404, f"there is no description of {id:.200}")


class _EventStream(StreamingResponse):
    """Server-sent events; `ended` is called at their end, also if they have not begun."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


def _answering(handler: _Handler) -> _Handler:
    """Wrap a handler so that its errors become Problem Details."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except HttpError as error:
            return request_handling.problem(error)
        except StoreError as error:
            return request_handling.problem(HttpError(500, str(error)))
        except ClientDisconnect:
            return Response(status_code=400)

    return answer


def _json(content: object, media: str, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content, ensure_ascii=False), headers=headers, media_type=media)


def _path(id: str) -> str:
    return f"/things/{quote(id, safe=':')}"


def _number(text: str, name: str, least: int) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or int(text) < least:
        raise HttpError(400, f"{name} must be a whole number from {least}")
    return int(text)


def description(base: str, fleet: str) -> dict[str, Any]:
    """Return the directory's own Thing Description, which follows the Thing Model of WoT Discovery (7.3.5)."""
    problem = {"contentType": "application/problem+json", "success": False}

    def form(href: str, method: str, kind: str | None = None, op: str = "invokeaction") -> dict[str, Any]:
        said: dict[str, Any] = {"href": href, "htv:methodName": method, "op": op, "additionalResponses": [problem]}
        if method == "GET":
            return said | {"response": {"contentType": kind}}
        return said | {"security": "bearer_sc"} | ({} if kind is None else {"contentType": kind})

    def action(title: str, *forms: dict[str, Any], reads: bool = False, **variables: Any) -> dict[str, Any]:
        said: dict[str, Any] = {"title": title, "forms": list(forms)}
        if variables:
            said["uriVariables"] = variables
        if reads:
            return said | {"safe": True, "idempotent": True, "output": {"type": "object"}}
        return said | {"input": {"type": "object"}}

    def event(kind: str, title: str) -> dict[str, Any]:
        diff = "" if kind == "thing_deleted" else "{?diff}"
        return {
            "title": title,
            "data": {"type": "object", "contentMediaType": "application/json"},
            **({"uriVariables": {"diff": {"type": "boolean"}}} if diff else {}),
            "forms": [
                {
                    "href": f"events/{kind}{diff}",
                    "op": "subscribeevent",
                    "subprotocol": "sse",
                    "contentType": "text/event-stream",
                    "htv:headers": [{"htv:fieldName": "Last-Event-ID"}],
                }
            ],
        }

    td, text = "application/td+json", {"type": "string"}
    id = {"@type": "ThingID", "type": "string", "format": "iri-reference"}
    listing = form("things{?offset,limit,format,sort_by,sort_order}", "GET", "application/ld+json", "readproperty")
    query = form("search/sparql{?query}", "GET", "application/json")
    return {
        "@context": [TD_CONTEXT, CONTEXT, {"htv": "http://www.w3.org/2011/http#"}],
        "@type": ["Thing", "ThingDirectory"],
        "id": f"urn:tinyfleet:{fleet}",
        "title": f"The fleet {fleet!r}: its Thing Description Directory",
        "base": base,
        "securityDefinitions": {"nosec_sc": {"scheme": "nosec"}, "bearer_sc": {"scheme": "bearer", "in": "header"}},
        "security": "nosec_sc",
        "properties": {
            "things": {
                "title": "All Thing Descriptions, in pages",
                "readOnly": True,
                "uriVariables": {
                    "offset": {"type": "integer", "minimum": 0, "default": 0},
                    "limit": {"type": "integer", "minimum": 1, "maximum": PAGE},
                    "format": {"type": "string", "enum": ["array", "collection"], "default": "array"},
                    "sort_by": {"type": "string", "enum": list(SORTED_BY), "default": "id"},
                    "sort_order": {"type": "string", "enum": ["asc", "desc"], "default": "asc"},
                },
                "forms": [listing],
            }
        },
        "actions": {
            "createAnonymousThing": action("Create an anonymous description", form("things", "POST", td)),
            "createThing": action("Create a description", form("things/{id}", "PUT", td), id=id),
            "retrieveThing": action("Retrieve a description", form("things/{id}", "GET", td), reads=True, id=id),
            "updateThing": action("Replace a description", form("things/{id}", "PUT", td), id=id),
            "partiallyUpdateThing": action(
                "Change a description", form("things/{id}", "PATCH", "application/merge-patch+json"), id=id
            ),
            "deleteThing": action("Delete a description", form("things/{id}", "DELETE"), id=id),
            "searchSPARQL": action("Ask in SPARQL 1.1", query, reads=True, query=text),
        },
        "events": {
            "thingCreated": event("thing_created", "A description was created"),
            "thingUpdated": event("thing_updated", "A description was changed"),
            "thingDeleted": event("thing_deleted", "A description was deleted"),
        },
    }
