"""The Thing Descriptions themselves, as they were given: what the fleet's directory hands out.

Their facts are in the default graph (registry.py). The documents lie beside them in a named graph, each as one
text with the times of its registration (W3C WoT Discovery, 7.2.2.1): one store owns both, one change writes both, and
no query for facts comes across a document.
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
"""The @context of a description that says when it was registered."""
REMEMBERED = 1000
"""Events that a client that was away can still get."""

Document = dict[str, Any]
_RECORD = (TF.document, SCHEMA.dateCreated, SCHEMA.dateModified, SCHEMA.expires)
_KEYS = {
    "id": f"GRAPH <{RECORDS}> {{ ?id <{TF.document}> ?document }}",
    "title": f"?id a <{TD.Thing}> ; <{TD.title}> ?key",
    "created": f"GRAPH <{RECORDS}> {{ ?id <{SCHEMA.dateCreated}> ?key }}",
    "modified": f"GRAPH <{RECORDS}> {{ ?id <{SCHEMA.dateModified}> ?key }}",
}
SORTED_BY = tuple(_KEYS)


@dataclass(frozen=True)
class Thing:
    """A description in the directory. `document` is what was given, but for what the directory says itself."""

    id: Iri
    document: Document
    created: datetime
    modified: datetime
    expires: datetime | None

    def enriched(self, retrieved: datetime | None = None) -> Document:
        """The description with its registration, as the directory hands it out (an Enriched TD)."""
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
    """What happened to a description: thing_created, thing_updated or thing_deleted. `change` is all of the new one, or
    what is new in it as a JSON merge patch; events after this one's id can be asked for."""

    number: int
    kind: str
    id: Iri
    change: Document


class DocumentChange(NamedTuple):
    """A description that is to be written, and the one before it."""

    before: Thing | None
    after: Thing


DocumentChanges = dict[Iri, DocumentChange]


class ThingStore:
    """The documents in a store, and what happens to them. Safe to share between threads.

    `edition` names the present set of documents: it changes when one comes or goes.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.lock = threading.RLock()
        """To be held by who reads in order to write."""
        self._ids: list[Iri] | None = None  # in order; read when the first list is asked for, then kept up
        self._order: tuple[str, int, list[Iri]] | None = None  # another order, as it was after that event
        self._events: deque[ThingEvent] = deque(maxlen=REMEMBERED)
        self._number = 0
        self._coming_and_going = 0
        self._listeners: list[Callable[[ThingEvent], None]] = []
        self.era = secrets.token_hex(4)
        """Names this process: an event's number means something in it only."""

    @property
    def edition(self) -> str:
        return f"{self.era}-{self._coming_and_going}"

    def change(self, id: Iri, document: Document, expires: datetime | None, changes: DocumentChanges) -> bool:
        """Adds a description to what is to be written; what changes nothing is not. True if there is none of that id.
        To be called, and what it adds written, with the lock held."""
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
        """Writes descriptions and facts in one transaction, and tells what has happened."""
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
        """Takes away a description and everything that is said of its thing. False if there was no description."""
        with self.lock:
            known = self.get(id) is not None
            self._store.remove(id)
            if known:
                self._tell("thing_deleted", id, {"id": id})
            return known

    def purge(self) -> None:
        """Takes away what has expired."""
        rows = self._store.query(
            f"SELECT ?id WHERE {{ GRAPH <{RECORDS}> {{ ?id <{SCHEMA.expires}> ?at }} FILTER(?at <= NOW()) }}"
        )
        for id in rows.column("id"):
            self.remove(Iri(str(id)))

    def get(self, id: Iri) -> Thing | None:
        """The description of that id, or None."""
        return next(iter(self._read([id])), None)

    def count(self) -> int:
        """How many descriptions there are."""
        with self.lock:
            if self._ids is not None:
                return len(self._ids)
        (row,) = self._store.query(f"SELECT (COUNT(*) AS ?count) WHERE {{ {_KEYS['id']} }}")
        return cast("int", row["count"])

    def page(self, offset: int, limit: int, sort_by: str = "id", descending: bool = False) -> list[Thing]:
        """Descriptions in the order of their ids by Unicode code points, or of another one of SORTED_BY and then the
        id; so many of them, after the first `offset`. The first page in an order takes a read of all ids."""
        ids = self._sorted() if sort_by == "id" else self._sorted_by(sort_by)
        with self.lock:
            end = len(ids) - offset
            wanted = ids[max(0, end - limit) : max(0, end)][::-1] if descending else ids[offset : offset + limit]
        return self._read(wanted)

    def reread(self) -> None:
        """The store was changed by others: whatever was kept of it is read again."""
        with self.lock:
            self._ids = None
            self._number += 1
            self._coming_and_going += 1

    def listen(self, listener: Callable[[ThingEvent], None], since: str | None = None) -> Callable[[], None]:
        """Calls the listener with every event from now on, in whichever thread it comes; first with those remembered
        after the event `since` (all, if that is of an era before this one). Returns what ends it."""
        with self.lock:
            if since is not None:
                era, _, number = since.partition(".")
                after = int(number) if era == self.era and number.isdecimal() else 0
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
        """The ids in order. They are read without the lock: whoever writes need not wait for a million of them."""
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
    """Makes sorted ids what they are after the event."""
    place = bisect_left(ids, event.id)
    there = place < len(ids) and ids[place] == event.id
    if event.kind == "thing_created" and not there:
        ids.insert(place, event.id)
    elif event.kind == "thing_deleted" and there:
        del ids[place]


def split(given: Mapping[str, Any]) -> tuple[Document, datetime | None]:
    """What a client gave without what the directory adds by itself, and when it is to expire, if the client says so.

    Raises ValueError if its registration is not one (WoT Discovery, 7.2.2.1). Of that, the document keeps `ttl`.
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
    """The target changed by a JSON merge patch (RFC 7396)."""
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
    """The JSON merge patch (RFC 7396) that makes the one into the other."""
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
