"""Thing Descriptions and statuses in, facts out.

`Registry.ingest` takes the MQTT messages that have arrived, and writes their facts in one transaction;
`Registry.put_description` takes a description that came another way. Neither touches the network.

A Thing Description is read as JSON-LD with our own context, checked against the shapes, and written flat: facts about
the device on the device, facts about its board once on the board, from whichever source describes the board first. The
document itself is stored beside the facts (thing_store.py). A thing that is not a device of the fleet, which only
`put_description` accepts, is stored with its own flat facts. A status is a few flat facts.

A message that cannot be right is rejected, counted and logged with the reason, and changes nothing. Messages that are
repeated, late or reordered lead to the same graph. A device of another wire version, or with an unsupported program
format, is marked as incompatible, so that no run and no deployment selects it.
"""

import logging
import math
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Literal, NamedTuple

import pyoxigraph as ox

from tinyfleet.edge.errors import UserError, printable
from tinyfleet.edge.versions import PROGRAM_FORMAT, WIRE_VERSION
from tinyfleet.edge.wire.errors import ProtocolError, WireVersionError
from tinyfleet.edge.wire.log_limit import LogLimit
from tinyfleet.edge.wire.messages import Status, Trial, decode_status
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.ingest import lineage
from tinyfleet.ontology.ingest.describe import known_parts
from tinyfleet.ontology.ingest.description_parser import (
    DescribedTriples,
    RejectedMessage,
    parse_thing_description,
    to_triples,
)
from tinyfleet.ontology.ingest.thing_store import Document, DocumentChanges, ThingStore, split
from tinyfleet.ontology.store.store import BASE, Binding, Store, StoreError, Value, each, term, value
from tinyfleet.ontology.vocabulary.entailment import with_entailments
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

# The facts taken from a description. Everything else in it (affordances, forms) stays in the document.
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
# A fleet may have a million devices: of the types that tf:Device entails, these are the ones that S3N's queries need.
_TYPES = (TD.Thing, TF.Device, S3N.SmartSensor)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IngestResult:
    """What the registry did with a message.

    Attributes
    ----------
    kind, device
        What the message was, and the ID of its device.
    online
        Whether a status says that the device is online. For a description: whether there is one; an empty description
        removes the device.
    rejection
        Why the message was rejected; None if it was accepted.
    incompatibility
        Why this server cannot talk to the device ("speaks wire version 1, ..."); None if it can.
    """

    kind: Literal["td", "status"]
    device: str
    online: bool = False
    rejection: str | None = None
    incompatibility: str | None = None


class PendingFacts(NamedTuple):
    """Facts and documents that were read but are not yet written to the graph."""

    facts: dict[Iri, dict[Iri, Binding | None]]
    documents: DocumentChanges

    def of(self, subject: Iri) -> dict[Iri, Binding | None]:
        return self.facts.setdefault(subject, {})


class Registry:
    """Keeps the devices of one fleet in the graph.

    Parameters
    ----------
    store
        The graph.
    fleet
        Name of the fleet.
    clock
        Returns the current time, for facts about when something happened.

    Attributes
    ----------
    things : ThingStore
        The documents.
    accepted, rejected : int
        How many messages were accepted and rejected.
    last_rejection : str or None
        Why the last rejected message was rejected.

    Examples
    --------
    >>> from tinyfleet.ontology.store.store import EmbeddedStore
    >>> registry = Registry(EmbeddedStore(), "home")
    >>> registry.ingest_one("tinyfleet/home/devices/kitchen/td", b"not JSON")
    False
    >>> registry.rejected
    1
    """

    def __init__(self, store: Store, fleet: str, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._store = store
        self._clock = clock
        self.fleet = fleet_name(fleet)
        self._topics = Topics(fleet)
        self.things = ThingStore(store)
        self.accepted = 0
        self.rejected = 0
        self.last_rejection: str | None = None
        self._log = LogLimit(log.warning)

    def ingest_one(self, topic: str, payload: bytes) -> bool:
        """Ingest one message, as `ingest` does. False if it was rejected or its topic is not one of the registry's."""
        (result,) = self.ingest([(topic, payload)])
        return result is not None and result.rejection is None

    def ingest(self, messages: Sequence[tuple[str, bytes]]) -> list[IngestResult | None]:
        """Write the facts of messages to the graph.

        Parameters
        ----------
        messages
            Topics and payloads, in the order of their arrival. An empty description (a cleared retained message)
            removes the device from the graph.

        Returns
        -------
        list
            For each message the result; None for a topic that is not one of the registry's. By then the facts are in
            the graph.

        Raises
        ------
        StoreError
            If the store fails: the same messages can then be ingested again.
        """
        with self.things.lock:
            parsed = [self._parse(topic, payload) for topic, payload in messages]
            statuses = ((m.iri, m.content) for m in parsed if m is not None and isinstance(m.content, Status))
            foreign = ((m.iri, _OFFLINE) for m in parsed if m is not None and isinstance(m.content, WireVersionError))
            history = lineage.DeviceHistory(self._store, [*statuses, *foreign])
            pending = PendingFacts({}, {})
            results = [None if message is None else self._ingest(message, pending, history) for message in parsed]
            self.things.write(*pending)
        for result in results:
            if result is not None and result.rejection is not None:
                self.rejected += 1
                self.last_rejection = result.rejection
            elif result is not None:
                self.accepted += 1
        return results

    def mark_unknown(self) -> None:
        """Forget of every online device that it is: the broker is away, or its session is new, and those that are
        online will report again. Many devices take more than one transaction."""
        self._write_to_all("?device tf:online true .", {TF.online: None})

    def mark_missing_offline(self) -> int:
        """Mark the devices as offline that `mark_unknown` has left unknown, and that have not reported since; return
        how many they are."""
        # A device that was online has told how much it has learned; one that never reported a status has not.
        return self._write_to_all(
            "?device tf:samplesLearned ?samples . FILTER NOT EXISTS { ?device tf:online ?online }",
            {TF.online: False, TF.offlineSince: self._clock()},
        )

    def _write_to_all(self, pattern: str, facts: dict[Iri, Binding | None]) -> int:
        answer = self._store.evaluate(
            f"""PREFIX tf: <https://w3id.org/tinyfleet#>
            SELECT ?device WHERE {{ VALUES ?fleet {{ UNDEF }} {pattern} ?device tf:fleet ?fleet }}""",
            fleet=self.fleet,
        )
        assert isinstance(answer, ox.QuerySolutions)
        devices = (value(solution["device"]) for solution in answer)
        count = 0
        while some := list(islice(devices, 1000)):
            self._store.write({Iri(str(device)): facts for device in some})
            count += len(some)
        return count

    def _parse(self, topic: str, payload: bytes) -> "_ParsedMessage | None":
        match self._topics.parse(topic):
            case "td", (device,):
                return _ParsedMessage("td", device, device_iri(self.fleet, device), payload)
            case "status", (device,):
                return _ParsedMessage("status", device, device_iri(self.fleet, device), _parse_status(payload))
        return None

    def _ingest(self, message: "_ParsedMessage", pending: PendingFacts, history: lineage.DeviceHistory) -> IngestResult:
        kind, device, iri, content = message
        reason: str | None = None
        online = True
        try:
            match content:
                case RejectedMessage():
                    raise content
                case WireVersionError():
                    online, reason = False, self._foreign_status(iri, content, pending, history)
                case Status():
                    online, reason = content.online, self._status(iri, content, pending, history)
                case b"":
                    self.things.write(*pending)
                    pending.facts.clear()
                    pending.documents.clear()
                    self.things.remove(iri)
                    history.removed(iri)
                    online = False
                case _:
                    reason = self._description(iri, content, pending)
        except StoreError:
            raise
        except (RejectedMessage, UserError) as error:
            what = "Thing Description" if kind == "td" else "status"
            rejection = printable(f"{what} of '{device}' rejected: {error}")
            self._log("rejected", rejection)
            return IngestResult(kind, device, rejection=rejection)
        return IngestResult(kind, device, online, incompatibility=reason)

    def _status(self, iri: Iri, status: Status, pending: PendingFacts, history: lineage.DeviceHistory) -> str | None:
        facts = pending.of(iri)
        facts[TF.online] = status.online
        facts[TF.wireVersion] = WIRE_VERSION
        reason = None
        if status.online:  # a will is written before the device has done anything, so the rest of it says nothing
            reason = _incompatibility(WIRE_VERSION, status.program_format)
            facts[TF.incompatibility] = reason
            facts[TF.programFormat] = status.program_format
            facts[TF.currentModel] = model_iri(status.model)
            facts[TF.samplesLearned] = status.samples
            facts[TF.malformedMessages] = status.malformed
            facts[TF.staleMessages] = status.stale
            facts[TF.refusedCommands] = status.refused or None
            facts[TF.trialState] = _TRIAL_STATES[status.trial]
            facts[TF.boots] = status.boots or None
            facts[TF.resetReason] = status.reset.name.lower() if status.reset else None
            facts[TF.keysVersion] = status.keys
            facts[TF.battery] = status.battery
            facts[TF.drift] = status.drift
        for subject, changes in history.changes(iri, status, self._clock()).items():
            pending.of(subject).update(changes)
        return reason

    def _foreign_status(
        self, iri: Iri, error: WireVersionError, pending: PendingFacts, history: lineage.DeviceHistory
    ) -> str | None:
        """A status in another version of the wire: nothing in it can be read but the version."""
        reason = _incompatibility(error.version, None)
        pending.of(iri).update(
            {TF.online: False, TF.wireVersion: error.version, TF.incompatibility: reason, **_NO_STATE}
        )
        for subject, changes in history.changes(iri, _OFFLINE, self._clock()).items():
            pending.of(subject).update(changes)
        return reason

    def _description(self, iri: Iri, payload: bytes, pending: PendingFacts) -> str | None:
        document = parse_thing_description(payload)
        if document.get("id", document.get("@id")) != iri:
            raise RejectedMessage(f"its id must be {iri} on this topic")
        self._describe(document, pending)
        reason = pending.of(iri).get(TF.incompatibility)
        return None if reason is None else str(reason)

    def name(self, document: Mapping[str, Any]) -> Iri:
        """Return an ID for a description without one: the device's own, or else a random UUID (version 4)."""
        kinds, device = document.get("@type"), document.get("tf:deviceId")
        if isinstance(kinds, list) and "tf:Device" in kinds and isinstance(device, str):
            return device_iri(self.fleet, device)
        return Iri(uuid.uuid4().urn)

    def put_description(self, document: Mapping[str, Any]) -> bool:
        """Write a description to the graph, replacing the one with the same ID.

        Returns
        -------
        bool
            True if there was no description with this ID.

        Raises
        ------
        RejectedMessage, UserError
            If the description is not valid.
        """
        with self.things.lock:
            pending = PendingFacts({}, {})
            new = self._describe(document, pending)
            self.things.write(*pending)
            return new

    def _describe(self, given: Mapping[str, Any], pending: PendingFacts) -> bool:
        """Add a description to what will be written; True if there is none with its ID yet."""
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
        return self.things.change(id, document, expires, pending.documents)

    def _device(self, device: str, iri: Iri, document: Document, pending: PendingFacts) -> None:
        description = self._check_device(device, iri, document)
        facts = description.facts(iri)
        board = Iri(str(facts[TF.board][0]))
        known = _as_lists(pending.facts[board]) if board in pending.facts else self._about(board)
        stated = {p: v for p, v in description.facts(board).items() if p in _BOARD}
        _check_board(description, facts, board, known, stated)
        if known:
            self._warn_about_differences(iri, board, known, stated)
        else:
            known = self._add_board(board, stated, pending)
        new = pending.of(iri)
        new.update((p, facts.get(p)) for p in _DEVICE)
        new[RDF.type] = _TYPES
        new[SSN.hasSubSystem] = known.get(SSN.hasSubSystem)
        if new[TD.description] is None:
            new[TD.description] = known.get(TD.title)
        wire, program_format = (_number(facts.get(p)) for p in (TF.wireVersion, TF.programFormat))
        if wire is not None:  # without a version it says nothing about compatibility, and a status may have
            new[TF.wireVersion] = wire
            new[TF.programFormat] = program_format
            new[TF.incompatibility] = _incompatibility(wire, program_format)

    def _warn_about_differences(
        self, device: Iri, board: Iri, known: Mapping[Iri, list[Value]], stated: Mapping[Iri, list[Value]]
    ) -> None:
        for predicate, values in stated.items():
            if set(values) != set(known.get(predicate, ())):
                name, kept = predicate.split("#")[-1], _as_text(known.get(predicate, []))
                line = f"{device} says that {name} of its board is {_as_text(values)}; {board} keeps {kept}"
                self._log("differs", printable(line))

    def _check_device(self, device: str, iri: Iri, document: Document) -> "DescribedTriples":
        if iri != device_iri(self.fleet, device):
            raise RejectedMessage(f"id: {iri:.100} is not of the fleet {self.fleet!r}")
        description = DescribedTriples(to_triples(document))
        types = description.facts(iri).get(RDF.type, [])
        if TF.Device not in types or TD.Thing not in types:
            raise RejectedMessage('its @type must be ["Thing", "tf:Device"]')
        for subject in description.of_type(TF.Device):
            if subject != iri:
                raise RejectedMessage(f"it describes another device, {subject:.100}")
        description.check(document)
        facts = description.facts(iri)
        for predicate, expected in ((TF.fleet, self.fleet), (TF.deviceId, device)):
            if facts[predicate] != [expected]:
                raise RejectedMessage(f"its {predicate.removeprefix(TF.iri)} must be '{expected}'")
        return description

    def _add_board(
        self, board: Iri, stated: Mapping[Iri, list[Value]], pending: PendingFacts
    ) -> dict[Iri, list[Value]]:
        """Add a new board, with what its facts entail, to what will be written; return its facts."""
        flat = {board: {RDF.type: TF.Board, TF.boardId: board.removeprefix(BOARDS), **stated}}
        parts = known_parts(self._store, [str(name) for name in stated.get(TF.sensor, ())])
        entailed = with_entailments(flat, parts)
        for subject, facts in entailed.items():
            pending.of(subject).update(facts)
        return _as_lists(entailed[board])

    def _thing(self, iri: Iri, document: Document, pending: PendingFacts) -> None:
        """The flat facts about a thing that is not a device, replacing all its earlier facts."""
        if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", iri) or iri.startswith(("urn:tinyfleet:", BASE)):
            raise RejectedMessage(f"id: {iri:.100} cannot be the ID of a thing; use an IRI of your own")
        description = DescribedTriples(to_triples(document))
        for triple in description.triples:
            if triple.predicate.value == RDF.type and str(triple.object).startswith(f"<{TF.iri}"):
                raise RejectedMessage(f"@type: {triple.object!s:.100} is only for IDs urn:tinyfleet:{self.fleet}:…")
        description.check(document)
        facts: dict[Iri, list[Value]] = {RDF.type: [TD.Thing]}
        for triple in description.triples:
            if triple.subject == ox.NamedNode(iri) and isinstance(triple.object, (ox.NamedNode, ox.Literal)):
                facts.setdefault(Iri(triple.predicate.value), []).append(value(triple.object))
        pending.facts[iri] = {**dict.fromkeys(self._about(iri)), **facts}

    def _about(self, subject: Iri) -> dict[Iri, list[Value]]:
        """The graph's facts about a subject."""
        rows = self._store.query("SELECT ?p ?o WHERE { VALUES ?s { UNDEF } ?s ?p ?o }", s=subject)
        facts: dict[Iri, list[Value]] = {}
        for row in rows:
            facts.setdefault(Iri(str(row["p"])), []).append(row["o"])
        return facts


def _check_board(
    description: DescribedTriples,
    device: Mapping[Iri, list[Value]],
    board: Iri,
    known: Mapping[Iri, list[Value]],
    stated: Mapping[Iri, list[Value]],
) -> None:
    """Raise RejectedMessage if the description does not describe a board that is not known, or the arena exceeds it."""
    if stated and board not in description.of_type(TF.Board):
        raise RejectedMessage("what its tf:board points to must have the @type tf:Board")
    if not known and TF.ramBytes not in stated:
        raise RejectedMessage(f"its board {board:.100} is not known and it does not describe it")
    ram, arena = {**known, **stated}.get(TF.ramBytes, [math.inf])[0], device.get(TF.arenaBytes, [0])[0]
    if isinstance(arena, int) and isinstance(ram, (int, float)) and arena > ram:
        raise RejectedMessage(f"its arena of {arena} bytes is larger than the {ram} bytes of RAM of its board")


def _incompatibility(wire: int, program_format: int | None) -> str | None:
    """Why this server cannot talk to a device with these versions; None if it can."""
    if wire != WIRE_VERSION:
        return f"speaks wire version {wire}, this server speaks {WIRE_VERSION}; {_update(wire < WIRE_VERSION)}"
    if program_format is not None and program_format != PROGRAM_FORMAT:
        older = program_format < PROGRAM_FORMAT
        return f"reads program format {program_format}, this server sends {PROGRAM_FORMAT}; {_update(older)}"
    return None


def _update(device_is_older: bool) -> str:
    return "update its firmware" if device_is_older else "update the server"


_OFFLINE = Status(False, bytes(8))
# What was known of a device's state before it turned out that its statuses cannot be read.
_NO_STATE: dict[Iri, Binding | None] = dict.fromkeys(
    (
        TF.programFormat,
        TF.samplesLearned,
        TF.malformedMessages,
        TF.staleMessages,
        TF.refusedCommands,
        TF.trialState,
        TF.boots,
        TF.resetReason,
        TF.keysVersion,
        TF.battery,
        TF.drift,
    )
)
_TRIAL_STATES = {
    Trial.BUILT_IN: None,
    Trial.ON_TRIAL: "on trial",
    Trial.CONFIRMED: "confirmed",
    Trial.ROLLED_BACK: "rolled back",
}


class _ParsedMessage(NamedTuple):
    """A message of a device: a description's bytes, a valid status, or why there is none."""

    kind: Literal["td", "status"]
    device: str
    iri: Iri
    content: bytes | Status | WireVersionError | RejectedMessage


def _parse_status(payload: bytes) -> Status | WireVersionError | RejectedMessage:
    if not payload:
        return RejectedMessage("it is empty")
    try:
        status = decode_status(payload)
    except WireVersionError as error:
        return error
    except ProtocolError as error:
        return RejectedMessage(str(error))
    if status.online and status.battery is not None and not 0 <= status.battery <= 1:
        return RejectedMessage(f"battery must be from 0 to 1, not {status.battery}")
    if status.online and status.drift is not None and not math.isfinite(status.drift):
        return RejectedMessage(f"drift must be a number, not {status.drift}")
    return status


def _as_lists(facts: Mapping[Iri, Binding | None]) -> dict[Iri, list[Value]]:
    return {p: list(each(given)) for p, given in facts.items()}


def _as_text(values: list[Value]) -> str:
    return printable(", ".join(sorted(str(v)[:100] for v in values[:20]))) or "nothing"


def _number(values: list[Value] | None) -> int | None:
    return values[0] if values and isinstance(values[0], int) else None
