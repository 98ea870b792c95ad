"""The Thing Descriptions as documents, which the fleet's directory serves.

Their facts are in the default graph (registry.py). The documents are in a named graph beside it, each as one text with
the times of its registration (W3C WoT Discovery, 7.2.2.1). One store holds both, one change writes both, and queries
for facts do not see documents.
"""

import json
import secrets
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, cast

from tinyfleet.ontology.store.store import RECORDS, Facts, Store
from tinyfleet.ontology.vocabulary.namespaces import SCHEMA, TD, TF, Iri

CONTEXT = "https://www.w3.org/2022/wot/discovery"
"""The @context of a description with registration times."""
REMEMBERED = 1000
"""Past events that a client can still get after it reconnects."""

Document = dict[str, Any]
_KEYS = {
    "id": f"GRAPH <{RECORDS}> {{ ?id <{TF.document}> ?document }}",
    "title": f"?id a <{TD.Thing}> ; <{TD.title}> ?key",
    "created": f"GRAPH <{RECORDS}> {{ ?id <{SCHEMA.dateCreated}> ?key }}",
    "modified": f"GRAPH <{RECORDS}> {{ ?id <{SCHEMA.dateModified}> ?key }}",
}
SORTED_BY = tuple(_KEYS)


@dataclass(frozen=True)
class Thing:
    """A description in the directory. `document` is the received one, without what the directory adds."""

    id: Iri
    document: Document
    created: datetime
    modified: datetime
    expires: datetime | None

    def enriched(self, retrieved: datetime | None = None) -> Document:
        """Return the description with its registration times, as the directory serves it (an Enriched TD)."""
        document = dict(self.document)
        given = document["@context"]
        document["@context"] = [*(given if isinstance(given, list) else [given]), CONTEXT]
        times = {"created": self.created, "modified": self.modified, "expires": self.expires, "retrieved": retrieved}
        document["registration"] = document.get("registration", {}) | {
            name: at.isoformat(timespec="milliseconds").replace("+00:00", "Z") for name, at in times.items() if at
        }
        return document


@dataclass(frozen=True)
class ThingEvent:
    """An event of a description: thing_created, thing_updated or thing_deleted.

    `change` is the whole new description, or its changes as a JSON merge patch. A client can ask for the events after
    this one.
    """

    number: int
    kind: str
    id: Iri
    change: Document


class DocumentChange(NamedTuple):
    """A description to be written, and the one that it replaces."""

    before: Thing | None
    after: Thing


DocumentChanges = dict[Iri, DocumentChange]


class ThingStore:
    """The documents in a store, and their events. Threads may share it.

    `edition` identifies the current set of documents: it changes when one is added or removed.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.lock = threading.RLock()
        """Hold it from reading a document to writing it back."""
        self._ids: list[Iri] | None = None  # sorted; read for the first list, then kept up to date
        self._order: tuple[str, int, list[Iri]] | None = None  # another order, as of that event
        self._events: deque[ThingEvent] = deque(maxlen=REMEMBERED)
        self._number = 0
        self._coming_and_going = 0
        self._listeners: list[Callable[[ThingEvent], None]] = []
        self.era = secrets.token_hex(4)
        """Identifies this process: event numbers are only meaningful within it."""

    @property
    def edition(self) -> str:
        return f"{self.era}-{self._coming_and_going}"

    def change(self, id: Iri, document: Document, expires: datetime | None, changes: DocumentChanges) -> bool:
        """Add a description to the changes, unless it changes nothing. True if there is none with its ID yet.

        Hold the lock from this call until the changes are written.
        """
        now = datetime.now(UTC)
        ttl = document.get("registration", {}).get("ttl")
        if ttl is not None:
            expires = now + timedelta(seconds=ttl)
        earlier = changes.get(id)
        before = self.get(id) if earlier is None else earlier.after
        if before is None or (before.document, before.expires) != (document, expires):
            after = Thing(id, document, now if before is None else before.created, now, expires)
            changes[id] = DocumentChange(before if earlier is None else earlier.before, after)
        return before is None

    def write(self, facts: Facts, changes: DocumentChanges) -> None:
        """Write descriptions and facts in one transaction, then notify the listeners."""
        self._store.write(
            facts,
            {
                id: {
                    TF.document: json.dumps(thing.document, ensure_ascii=False, separators=(",", ":")),
                    SCHEMA.dateCreated: thing.created,
                    SCHEMA.dateModified: thing.modified,
                    SCHEMA.expires: thing.expires,
                }
                for id, (_, thing) in changes.items()
            },
        )
        for id, (before, thing) in changes.items():
            if before is None:
                self._tell("thing_created", id, thing.enriched())
            else:
                self._tell("thing_updated", id, {**difference(before.enriched(), thing.enriched()), "id": id})

    def remove(self, id: Iri) -> bool:
        """Remove a description and all facts about its thing. False if there was no description."""
        with self.lock:
            known = self.get(id) is not None
            self._store.remove(id)
            if known:
                self._tell("thing_deleted", id, {"id": id})
            return known

    def purge(self) -> None:
        """Remove expired descriptions."""
        rows = self._store.query(
            f"SELECT ?id WHERE {{ GRAPH <{RECORDS}> {{ ?id <{SCHEMA.expires}> ?at }} FILTER(?at <= NOW()) }}"
        )
        for id in rows.column("id"):
            self.remove(Iri(str(id)))

    def get(self, id: Iri) -> Thing | None:
        """Return the description with this ID, or None."""
        return next(iter(self._read([id])), None)

    def count(self) -> int:
        """Return the number of descriptions."""
        with self.lock:
            if self._ids is not None:
                return len(self._ids)
        (row,) = self._store.query(f"SELECT (COUNT(*) AS ?count) WHERE {{ {_KEYS['id']} }}")
        return cast("int", row["count"])

    def page(self, offset: int, limit: int, sort_by: str = "id", descending: bool = False) -> list[Thing]:
        """Return at most `limit` descriptions, after the first `offset`.

        They are ordered by ID (by Unicode code points), or by another key in SORTED_BY and then by ID. The first page
        in an order requires reading all IDs.
        """
        ids = self._sorted() if sort_by == "id" else self._sorted_by(sort_by)
        with self.lock:
            end = len(ids) - offset
            wanted = ids[max(0, end - limit) : max(0, end)][::-1] if descending else ids[offset : offset + limit]
        return self._read(wanted)

    def reread(self) -> None:
        """Discard cached values, because the store was changed by other means."""
        with self.lock:
            self._ids = None
            self._number += 1
            self._coming_and_going += 1

    def listen(self, listener: Callable[[ThingEvent], None], since: str | None = None) -> Callable[[], None]:
        """Call the listener with every event from now on, in the thread where the event occurs.

        It is called first with the remembered events after the event `since`, or with all of them if `since` is from an
        earlier process. Call the returned function to stop.
        """
        with self.lock:
            if since is not None:
                era, _, number = since.partition(".")
                after = int(number) if era == self.era and number.isdecimal() and len(number) < 20 else 0
                for event in self._events:
                    if event.number > after:
                        listener(event)
            self._listeners.append(listener)

        def end() -> None:
            with self.lock:
                self._listeners.remove(listener)

        return end

    def _tell(self, kind: str, id: Iri, change: Document) -> None:
        self._number += 1
        event = ThingEvent(self._number, kind, id, change)
        self._events.append(event)
        self._coming_and_going += kind != "thing_updated"
        if self._ids is not None:
            _follow(self._ids, event)
        for listener in self._listeners:
            listener(event)

    def _sorted(self) -> list[Iri]:
        """The sorted IDs. They are read without the lock, so that writers need not wait for a million of them."""
        while True:
            with self.lock:
                if self._ids is not None:
                    return self._ids
                before = self._number
            ids = sorted(cast("list[Iri]", self._store.query(f"SELECT ?id WHERE {{ {_KEYS['id']} }}").column("id")))
            with self.lock:
                missed = [event for event in self._events if event.number > before]
                if len(missed) == self._number - before:
                    for event in missed:
                        _follow(ids, event)
                    self._ids = ids

    def _sorted_by(self, sort_by: str) -> list[Iri]:
        with self.lock:
            number, known = self._number, self._order
        if known is None or known[:2] != (sort_by, number):
            rows = self._store.query(f"SELECT ?id ?key WHERE {{ {_KEYS[sort_by]} }}")
            ids = [cast("Iri", row["id"]) for row in sorted(rows, key=lambda row: (row["key"], row["id"]))]
            self._order = known = sort_by, number, ids
        return known[2]

    def _read(self, ids: Sequence[Iri]) -> list[Thing]:
        return [
            Thing(
                id,
                json.loads(str(said[TF.document])),
                cast("datetime", said[SCHEMA.dateCreated]),
                cast("datetime", said[SCHEMA.dateModified]),
                cast("datetime | None", said.get(SCHEMA.expires)),
            )
            for id, said in zip(ids, self._store.records(ids), strict=True)
            if TF.document in said
        ]


def _follow(ids: list[Iri], event: ThingEvent) -> None:
    """Update the sorted IDs after an event."""
    place = bisect_left(ids, event.id)
    there = place < len(ids) and ids[place] == event.id
    if event.kind == "thing_created" and not there:
        ids.insert(place, event.id)
    elif event.kind == "thing_deleted" and there:
        del ids[place]


def split(given: Mapping[str, Any]) -> tuple[Document, datetime | None]:
    """Return a client's description without what the directory adds, and its expiry time if the client gives one.

    Raises ValueError if its registration is not valid (WoT Discovery, 7.2.2.1). The document keeps the `ttl` of it.
    """
    document = dict(given)
    context = document.get("@context")
    if isinstance(context, list):
        rest = [entry for entry in context if entry != CONTEXT]
        document["@context"] = rest[0] if len(rest) == 1 else rest
    registration = document.pop("registration", None)
    if registration is None:
        return document, None
    if not isinstance(registration, dict):
        raise ValueError("registration: an object")
    ttl, expires = registration.get("ttl"), registration.get("expires")
    if ttl is not None:
        if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not 0 < ttl < 10**9:
            raise ValueError("registration.ttl: a number of seconds, above 0")
        document["registration"] = {"ttl": ttl}
        return document, None
    if expires is None:
        return document, None
    try:
        at = datetime.fromisoformat(expires)
    except (TypeError, ValueError):
        raise ValueError("registration.expires: a date and time as in RFC 3339") from None
    if at.tzinfo is None:
        raise ValueError("registration.expires: with its offset from UTC, or Z")
    return document, at.astimezone(UTC)


def merged(target: object, patch: object) -> Any:
    """Return the target with a JSON merge patch applied (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> Document:
    """Return the JSON merge patch (RFC 7396) from one document to the other."""
    patch: Document = {name: None for name in before if name not in after}
    for name, value in after.items():
        old = before.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            inner = difference(old, value)
            if inner:
                patch[name] = inner
        elif old != value or name not in before:
            patch[name] = value
    return patch
