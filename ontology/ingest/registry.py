"""Descriptions in, graph out: what devices say of themselves becomes facts, once it is checked.

`Registry.take` takes MQTT topics and their payloads, as many as have arrived, and writes what they say in one
transaction; `Registry.put` takes a description that came in another way. Neither touches the network. A Thing
Description is read as JSON-LD with our own context, checked against the shapes, and written flat: facts about the
device on the device, facts about its kind of board once on the board, by whoever says them first (`tinyfleet firmware
boards --add-to-graph` says those that are known). The document itself is kept beside them (things.py). A thing
that is no device of the fleet, which only `put` takes, is written with what it says flatly of itself. A status is a few
flat facts. What cannot be right is refused, counted and logged with its reason, and leaves the graph as it was; what
comes twice, late or in another order ends in the same graph.
"""

import json
import logging
import math
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jsonschema_rs
import pyoxigraph as ox
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.errors import ProtocolError
from tinyfleet.edge.wire.messages import Status, decode_status
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology import vocabulary
from tinyfleet.ontology.ingest import lineage
from tinyfleet.ontology.ingest.describe import known_parts
from tinyfleet.ontology.ingest.things import Document, DocumentChanges, ThingStore, split
from tinyfleet.ontology.store.store import BASE, Binding, Store, StoreError, Value, each, printable, term, value
from tinyfleet.ontology.vocabulary import shapes
from tinyfleet.ontology.vocabulary.implied import with_entailments
from tinyfleet.ontology.vocabulary.namespaces import (
    BOARDS,
    RDF,
    S3N,
    SSN,
    TD,
    TF,
    Iri,
    device_iri,
    fleet_name,
    model_iri,
)

MAX_BYTES = 65_536
"""A Thing Description may be so long."""
MAX_DEPTH = 16
"""Objects and arrays may nest so deep in it."""

TD_CONTEXT = "https://www.w3.org/2022/wot/td/v1.1"
_CONTEXT_FILE = Path(vocabulary.__file__).with_name("context.jsonld")

_SCHEMA_FILE = Path(vocabulary.__file__).with_name("thing.schema.json")

# What is taken from a description. All else that it says (affordances, forms) stays in the document.
_DEVICE = (
    TD.title,
    TD.description,
    TF.fleet,
    TF.deviceId,
    TF.board,
    TF.engine,
    TF.engineVersion,
    TF.arenaBytes,
    TF.modelSlotBytes,
    TF.model,
)
_BOARD = (TD.title, TF.mcu, TF.clockHz, TF.ramBytes, TF.flashBytes, TF.sensor)
# A fleet may have a million devices: of what a device's type implies, this is what queries of S3N's kind ask for.
_TYPES = (TD.Thing, TF.Device, S3N.SmartSensor)
_STATE = (TF.online, TF.currentModel, TF.samples, TF.malformed, TF.stale, TF.battery, TF.drift)

# JSON-LD keywords with which a description could say things of other nodes, or change what its words mean.
_KEYWORDS = {"@context", "@id", "@type"}

log = logging.getLogger(__name__)


class RejectedMessage(Exception):
    """Why a message was not taken: `violations`, one line each."""

    def __init__(self, *violations: str) -> None:
        super().__init__("; ".join(violations))
        self.violations = violations


@dataclass(frozen=True, slots=True)
class IngestResult:
    """What became of a message: what it was, of which device, and why it was refused, if it was.

    online: what a status says; for a description, whether there is one (an empty one takes the device away).
    """

    kind: Literal["td", "status"]
    device: str
    online: bool = False
    refusal: str | None = None


@cache
def _context() -> dict[str, Any]:
    context: dict[str, Any] = json.loads(_CONTEXT_FILE.read_text(encoding="utf-8"))["@context"]
    return context


@cache
def _schema() -> jsonschema_rs.Validator:
    return jsonschema_rs.validator_for(json.loads(_SCHEMA_FILE.read_text(encoding="utf-8")))


class Registry:
    """Keeps one fleet's devices in the graph. `accepted` and `refused` count messages; `last_refusal` says why."""

    def __init__(self, store: Store, fleet: str, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """clock: what time it is, for facts that say when."""
        self._store = store
        self._clock = clock
        self.fleet = fleet_name(fleet)
        self._topics = Topics(fleet)
        self.things = ThingStore(store)
        self.accepted = 0
        self.refused = 0
        self.last_refusal: str | None = None

    def handle(self, topic: str, payload: bytes) -> bool:
        """Takes one message, as `take` does. True if it went into the graph; False if it was refused or is none of the
        registry's."""
        (taken,) = self.take([(topic, payload)])
        return taken is not None and taken.refusal is None

    def take(self, messages: Sequence[tuple[str, bytes]]) -> list[IngestResult | None]:
        """Takes messages in the order of their arrival; for each what became of it, None if it is none of the
        registry's. When this returns they are in the graph.

        An empty description (a cleared retained message) takes the device out of the graph. Raises StoreError if the
        store fails: the messages can then be handed over again.
        """
        with self.things.lock:
            parse_thing_description = [self._read(topic, payload) for topic, payload in messages]
            histories = lineage.DeviceHistory(
                self._store,
                (
                    (device_iri(self.fleet, m.device), m.said)
                    for m in parse_thing_description
                    if m and isinstance(m.said, Status)
                ),
            )
            taken: list[IngestResult | None] = []
            facts, changes = PendingFacts(), DocumentChanges()
            for message in parse_thing_description:
                if message is None:
                    taken.append(None)
                    continue
                kind, device, iri, said = message
                try:
                    if isinstance(said, RejectedMessage):
                        raise said
                    if isinstance(said, Status):
                        self._state(iri, said, facts, histories)
                        online = said.online
                    elif said:
                        self._description(iri, said, facts, changes)
                        online = True
                    else:
                        self.things.write(facts, changes)
                        facts, changes = PendingFacts(), DocumentChanges()
                        self.things.remove(iri)
                        histories.removed(iri)
                        online = False
                except StoreError:
                    raise
                except (RejectedMessage, UserError) as reason:
                    what = "Thing Description" if kind == "td" else "status"
                    refusal = printable(f"{what} of {device!r} refused: {reason}")
                    log.warning("%s", refusal)
                    taken.append(IngestResult(kind, device, refusal=refusal))
                else:
                    taken.append(IngestResult(kind, device, online))
            self.things.write(facts, changes)
            for one in taken:
                if one is not None and one.refusal is None:
                    self.accepted += 1
                elif one is not None:
                    self.refused += 1
                    self.last_refusal = one.refusal
            return taken

    def mark_all_offline(self) -> None:
        """Takes it that every device is offline until it says otherwise. In many transactions, if they are many."""
        answer = self._store.evaluate(
            """PREFIX tf: <https://w3id.org/tinyfleet#>
            SELECT ?device WHERE { VALUES ?fleet { UNDEF } ?device tf:online true ; tf:fleet ?fleet }""",
            fleet=self.fleet,
        )
        assert isinstance(answer, ox.QuerySolutions)
        devices = (value(solution["device"]) for solution in answer)
        while some := list(islice(devices, 1000)):
            now: dict[Iri, Binding | None] = {TF.online: False, TF.offlineSince: self._clock()}
            self._store.write({Iri(str(device)): now for device in some})

    def _read(self, topic: str, payload: bytes) -> "_ParsedMessage | None":
        """What a message says, or why it is refused; None if it is none of the registry's."""
        match self._topics.parse(topic):
            case "td", (device,):
                return _ParsedMessage("td", device, device_iri(self.fleet, device), payload)
            case "status", (device,):
                return _ParsedMessage("status", device, device_iri(self.fleet, device), _status(payload))
        return None

    def _state(self, iri: Iri, status: Status, pending: "PendingFacts", histories: lineage.DeviceHistory) -> None:
        facts = pending.setdefault(iri, {})
        facts[TF.online] = status.online
        if status.online:  # a will was written before the device did anything: it knows nothing else
            facts[TF.currentModel] = model_iri(status.model)
            facts[TF.samples] = status.samples
            facts[TF.malformed] = status.malformed
            facts[TF.stale] = status.stale
            facts[TF.battery] = status.battery
            facts[TF.drift] = status.drift
        for subject, said in histories.changes(iri, status, self._clock()).items():
            pending.setdefault(subject, {}).update(said)

    def _description(self, iri: Iri, payload: bytes, pending: "PendingFacts", changes: DocumentChanges) -> None:
        document = parse_thing_description(payload)
        if document.get("id", document.get("@id")) != iri:
            raise RejectedMessage(f"its id must be {iri} on this topic, not {document.get('id')!r:.100}")
        self._describe(document, pending, changes)

    def name(self, document: Mapping[str, Any]) -> Iri:
        """An id for a description that has none: a device's own, or else a random one (UUID version 4)."""
        kinds, device = document.get("@type"), document.get("tf:deviceId")
        if isinstance(kinds, list) and "tf:Device" in kinds and isinstance(device, str):
            return device_iri(self.fleet, device)
        return Iri(uuid.uuid4().urn)

    def put(self, given: Mapping[str, Any]) -> bool:
        """Writes a description, in place of the one of the same id if there is one. True if there was none.

        Raises Refused, or UserError, for what cannot be right.
        """
        with self.things.lock:
            facts, changes = PendingFacts(), DocumentChanges()
            new = self._describe(given, facts, changes)
            self.things.write(facts, changes)
            return new

    def _describe(self, given: Mapping[str, Any], pending: "PendingFacts", changes: DocumentChanges) -> bool:
        """Adds to what is to be written. True if there is no description of that id."""
        try:
            document, expires = split(given)
        except ValueError as error:
            raise RejectedMessage(str(error)) from None
        id = Iri(document.get("id", document.get("@id", "")))
        try:
            term(id)
        except StoreError:
            raise RejectedMessage("id: one text, an IRI") from None
        if own := re.fullmatch(r"urn:tinyfleet:([^:]+):([^:]+)", id):
            self._device(own[2], id, document, pending)
        else:
            self._thing(id, document, pending)
        return self.things.change(id, document, expires, changes)

    def _device(self, device: str, iri: Iri, document: Document, pending: "PendingFacts") -> None:
        if iri != device_iri(self.fleet, device):
            raise RejectedMessage(f"id: {iri:.100} is not of the fleet {self.fleet!r}")
        triples = to_triples(document)
        thing = _facts(triples, iri)
        if TF.Device not in thing.get(RDF.type, ()) or TD.Thing not in thing.get(RDF.type, ()):
            raise RejectedMessage('its @type must be ["Thing", "tf:Device"]')
        for subject in _typed(triples, TF.Device):
            if subject != iri:
                raise RejectedMessage(f"it describes another device, {subject}")
        _conforms(triples, document)
        for predicate, expected in ((TF.fleet, self.fleet), (TF.deviceId, device)):
            if thing[predicate] != [expected]:
                raise RejectedMessage(
                    f"its {predicate.removeprefix(TF.iri)} must be {expected!r}, not {thing[predicate][0]!r}"
                )
        board = Iri(str(thing[TF.board][0]))
        said = {p: v for p, v in _facts(triples, board).items() if p in _BOARD}
        if said and board not in _typed(triples, TF.Board):
            raise RejectedMessage("what its tf:board points to must have the @type tf:Board")
        known = _listed(pending[board]) if board in pending else self._about(board)
        if not known and TF.ramBytes not in said:
            raise RejectedMessage(f"its board {board} is not known and it does not describe it")
        for predicate, stated in said.items():
            if known and set(stated) != set(known.get(predicate, ())):
                log.warning(
                    "%s says that %s of its board is %s; %s stays known with %s",
                    iri,
                    predicate.split("#")[-1],
                    _text(stated),
                    board,
                    _text(known.get(predicate, [])),
                )
        ram, arena = {**known, **said}.get(TF.ramBytes, [math.inf])[0], thing.get(TF.arenaBytes, [0])[0]
        if isinstance(arena, int) and isinstance(ram, (int, float)) and arena > ram:
            raise RejectedMessage(f"its arena of {arena} bytes is larger than the {ram} bytes of RAM of its board")
        facts = pending.setdefault(iri, {})
        facts.update((p, thing.get(p)) for p in _DEVICE)
        if not known:
            flat = {board: {RDF.type: TF.Board, TF.boardId: board.removeprefix(BOARDS), **said}}
            more = with_entailments(flat, known_parts(self._store, [str(name) for name in said.get(TF.sensor, ())]))
            for subject, about in more.items():
                pending.setdefault(subject, {}).update(about)
            known = _listed(more[board])
        facts[RDF.type] = _TYPES
        facts[SSN.hasSubSystem] = known.get(SSN.hasSubSystem)
        if facts[TD.description] is None:
            facts[TD.description] = known.get(TD.title)

    def _thing(self, iri: Iri, document: Document, pending: "PendingFacts") -> None:
        """What a thing that is no device says of itself flatly, in place of all that was said of it."""
        if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", iri) or iri.startswith(("urn:tinyfleet:", BASE)):
            raise RejectedMessage(f"id: {iri:.100} cannot be a thing's; take an IRI of your own")
        triples = to_triples(document)
        for triple in triples:
            if triple.predicate.value == RDF.type and str(triple.object).startswith(f"<{TF.iri}"):
                raise RejectedMessage(f"@type: {triple.object} is for what is named urn:tinyfleet:{self.fleet}:…")
        _conforms(triples, document)
        said: dict[Iri, list[Value]] = {RDF.type: [TD.Thing]}
        for triple in triples:
            if triple.subject == ox.NamedNode(iri) and isinstance(triple.object, (ox.NamedNode, ox.Literal)):
                said.setdefault(Iri(triple.predicate.value), []).append(value(triple.object))
        pending[iri] = {**dict.fromkeys(self._about(iri)), **said}

    def _about(self, subject: Iri) -> dict[Iri, list[Value]]:
        """What the graph says of a subject."""
        rows = self._store.query("SELECT ?p ?o WHERE { VALUES ?s { UNDEF } ?s ?p ?o }", s=subject)
        facts: dict[Iri, list[Value]] = {}
        for row in rows:
            facts.setdefault(Iri(str(row["p"])), []).append(row["o"])
        return facts


def _conforms(triples: list[ox.Triple], document: Mapping[str, Any]) -> None:
    """Raises Refused unless the description has the form of one and its triples conform to the shapes."""
    form = [
        f"{'.'.join(map(str, error.instance_path)) or '(root)'}: {error.message:.200}"
        for error in _schema().iter_errors(dict(document))
    ]
    wrong = [*shapes.violations(triples), *form]
    if wrong:
        raise RejectedMessage(*wrong[:20])


PendingFacts = dict[Iri, dict[Iri, Binding | None]]
"""What is to be written, of each subject."""


class _ParsedMessage(NamedTuple):
    """A message of a device: a description as it came, a status that is in order, or why it is not."""

    kind: Literal["td", "status"]
    device: str
    iri: Iri
    said: bytes | Status | RejectedMessage


def _status(payload: bytes) -> Status | RejectedMessage:
    if not payload:
        return RejectedMessage("it is empty")
    try:
        status = decode_status(payload)
    except ProtocolError as error:
        return RejectedMessage(str(error))
    if status.online and status.battery is not None and not 0 <= status.battery <= 1:
        return RejectedMessage(f"battery must be from 0 to 1, not {status.battery}")
    if status.online and status.drift is not None and not math.isfinite(status.drift):
        return RejectedMessage(f"drift must be a number, not {status.drift}")
    return status


def _listed(facts: Mapping[Iri, Binding | None]) -> dict[Iri, list[Value]]:
    return {p: list(each(given)) for p, given in facts.items()}


def _text(given: list[Value]) -> str:
    return ", ".join(sorted(printable(str(v)) for v in given)) or "nothing"


def _facts(triples: list[ox.Triple], subject: str) -> dict[Iri, list[Value]]:
    facts: dict[Iri, list[Value]] = {}
    for t in triples:
        if isinstance(t.subject, ox.NamedNode) and t.subject.value == subject:
            facts.setdefault(Iri(t.predicate.value), []).append(value(t.object))
    return facts


def _typed(triples: list[ox.Triple], kind: Iri) -> Iterator[str]:
    for t in triples:
        if t.predicate.value == RDF.type and isinstance(t.object, ox.NamedNode) and t.object.value == kind:
            yield t.subject.value if isinstance(t.subject, ox.NamedNode) else str(t.subject)


def parse_thing_description(payload: bytes) -> dict[str, Any]:
    """The JSON object of a Thing Description. Raises Refused if it is too long, too deep or not one JSON object."""
    if len(payload) > MAX_BYTES:
        raise RejectedMessage(f"{len(payload)} bytes are more than the {MAX_BYTES} that a description may have")
    try:
        document = json.loads(payload.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise RejectedMessage(f"it is not UTF-8 text: {error}") from None
    except RecursionError:
        raise RejectedMessage(f"it nests deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise RejectedMessage(f"it is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise RejectedMessage("it is not a JSON object")
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        level = [v for node in level for v in (node.values() if isinstance(node, dict) else node)]
        level = [v for v in level if isinstance(v, (dict, list))]
        if not level:
            return document
    raise RejectedMessage(f"it nests deeper than {MAX_DEPTH}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name comes twice in one object")
    return result


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def to_triples(document: Mapping[str, Any]) -> list[ox.Triple]:
    """A Thing Description's triples, read with our own context: nothing is fetched.

    Its @context must be that of TD 1.1, and may add prefixes of its own, as objects of names and IRIs. Raises Refused
    for any other context, for a context further in, and for keywords that speak of other nodes.
    """
    given = document.get("@context")
    entries = given if isinstance(given, list) else [given]
    if TD_CONTEXT not in entries:
        raise RejectedMessage(f"its @context must hold {TD_CONTEXT}")
    context = dict(_context())
    for entry in entries:
        if entry == TD_CONTEXT:
            continue
        if not isinstance(entry, dict):
            raise RejectedMessage(
                f"its @context names {entry!r:.100}; only {TD_CONTEXT} is known, and nothing is fetched"
            )
        for name, iri in entry.items():
            if name.startswith("@") or not isinstance(iri, str) or not iri.endswith(("#", "/", ":")):
                raise RejectedMessage(f"its @context may add prefixes only, such as tf; {name!r:.50} is none")
            if context.get(name, iri) != iri:
                raise RejectedMessage(f"its @context gives {name!r:.50} another meaning")
            context[name] = iri
    body = {name: v for name, v in document.items() if name != "@context"}
    _no_keywords(body)
    try:
        quads = ox.parse(json.dumps({"@context": context, **body}), ox.RdfFormat.JSON_LD, without_named_graphs=True)
        return [quad.triple for quad in quads]
    except (SyntaxError, ValueError) as error:
        raise RejectedMessage(f"it is not valid JSON-LD: {error}") from None


def _no_keywords(node: object) -> None:
    if isinstance(node, dict):
        for name, inner in node.items():
            if name.startswith("@") and (name not in _KEYWORDS or name == "@context"):
                raise RejectedMessage(f"it may not use {name!r:.50} inside")
            _no_keywords(inner)
    elif isinstance(node, list):
        for inner in node:
            _no_keywords(inner)
