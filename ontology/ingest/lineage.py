"""Runs, rounds, updates, model versions and deployments as PROV-O: who learned what from what, and with what result.

A run trains one model; each round takes the run's newest version and makes the next one out of its devices' replies.
Also what is written when a device's state changes: since when it is offline, and events of drift.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from tinyfleet.edge.wire.messages import Status
from tinyfleet.ontology.store.store import Binding, Store
from tinyfleet.ontology.vocabulary import shapes
from tinyfleet.ontology.vocabulary.namespaces import (
    PROV,
    RDF,
    SOSA,
    TF,
    Iri,
    deployment_iri,
    device_iri,
    fleet_name,
    model_iri,
    round_iri,
    run_iri,
    update_iri,
    version_iri,
)

DRIFTED = 0.5
"""A drift of so much is an event, once,"""
SETTLED = 0.4
"""until it has fallen below this: a drift that trembles about the threshold is one event, not many."""


@dataclass(frozen=True)
class Participation:
    """One device's part in a round: what it reported, None where it reported nothing of the kind.

    loss: mean over the samples learned from; accuracy: 0 to 1, on samples never learned from; bytes_up: payload sent;
    encoding: the form of its update, such as "sparse f16"; staleness: how many versions others made meanwhile.
    """

    device: str
    loss: float | None = None
    accuracy: float | None = None
    samples: int | None = None
    bytes_up: int | None = None
    encoding: str | None = None
    staleness: int | None = None


class Lineage:
    """Writes one fleet's runs into the store. Saying the same thing twice changes nothing."""

    def __init__(self, store: Store, fleet: str) -> None:
        self._store = store
        self._fleet = fleet_name(fleet)

    def begin(
        self,
        run: int,
        model: Iri,
        strategy: str,
        sha256: str,
        *,
        task: str | None = None,
        derived_from: Iri | None = None,
        at: datetime | None = None,
    ) -> Iri:
        """A run begins, with parameters of this hash; derived_from is the version they come from, if from any.

        The IRI of version 0.
        """
        about, version = run_iri(self._fleet, run), version_iri(self._fleet, run, 0)
        facts: dict[Iri, dict[Iri, Binding | None]] = {
            about: {
                RDF.type: [TF.Run, PROV.Activity],
                TF.fleet: self._fleet,
                TF.runNumber: run,
                TF.strategy: strategy,
                TF.task: task,
                TF.ofModel: model,
                PROV.used: [model] if derived_from is None else [model, derived_from],
                PROV.startedAtTime: at or datetime.now(UTC),
            },
            version: self._version(model, 0, sha256, about, derived_from),
        }
        shapes.admit(self._store, f"run {run}", facts)
        return version

    def round(
        self,
        run: int,
        number: int,
        parts: Sequence[Participation],
        *,
        asked: int,
        started: datetime,
        ended: datetime | None = None,
        sha256: str | None = None,
        bytes_up: int | None = None,
        bytes_down: int | None = None,
        accuracy: float | None = None,
        lost: Iterable[str] = (),
    ) -> Iri | None:
        """A round has ended: `asked` devices were asked, `parts` took part, and the parameters now have this hash; of
        those asked, the devices in `lost` gave no usable reply.

        The IRI of the version that the round made, derived from the run's newest before it; None if it made none
        (sha256 is None: nobody replied). The round's loss is the mean of its parts' losses.
        """
        about = round_iri(self._fleet, run, number)
        losses = [p.loss for p in parts if p.loss is not None and math.isfinite(p.loss)]
        model, before = self._newest(run, number)
        devices = [device_iri(self._fleet, p.device) for p in parts]
        facts: dict[Iri, dict[Iri, Binding | None]] = {
            about: {
                RDF.type: [TF.Round, PROV.Activity],
                TF.inRun: run_iri(self._fleet, run),
                TF.roundNumber: number,
                TF.asked: asked,
                TF.noReplyFrom: [device_iri(self._fleet, device) for device in lost],
                TF.loss: sum(losses) / len(losses) if losses else None,
                TF.accuracy: _finite(accuracy),
                TF.bytesUp: bytes_up,
                TF.bytesDown: bytes_down,
                PROV.used: before,
                PROV.wasAssociatedWith: devices,
                PROV.qualifiedAssociation: [Iri(f"{about}:{p.device}") for p in parts],
                PROV.startedAtTime: started,
                PROV.endedAtTime: ended or datetime.now(UTC),
            }
        }
        for p, device in zip(parts, devices, strict=True):
            facts[Iri(f"{about}:{p.device}")] = {
                RDF.type: [TF.Participation, PROV.Association],
                TF.inRound: about,
                TF.device: device,
                PROV.agent: device,
                TF.loss: _finite(p.loss),
                TF.accuracy: _finite(p.accuracy),
                TF.samples: p.samples,
                TF.bytesUp: p.bytes_up,
            }
            facts[update_iri(self._fleet, run, number, p.device)] = {
                RDF.type: [TF.Update, PROV.Entity],
                PROV.wasGeneratedBy: about,
                PROV.wasAttributedTo: device,
                TF.bytesUp: p.bytes_up,
                TF.encoding: p.encoding,
                TF.staleness: p.staleness,
            }
        version = None
        if sha256 is not None:
            version = version_iri(self._fleet, run, number)
            facts[version] = self._version(model, number, sha256, about, before)
        shapes.admit(self._store, f"round {number} of run {run}", facts)
        return version

    def end(self, run: int, at: datetime | None = None) -> None:
        """A run has ended."""
        self._store.write({run_iri(self._fleet, run): {PROV.endedAtTime: at or datetime.now(UTC)}})

    def deployment(
        self,
        number: int,
        model: Iri,
        targets: Iterable[str],
        *,
        selected_by: str,
        started: datetime,
        ended: datetime | None = None,
        confirmed: Iterable[str] = (),
        failed: Iterable[str] = (),
    ) -> Iri:
        """A model is given to devices: said when it begins, and again, with what came of it, when it has ended."""

        def iris(devices: Iterable[str]) -> list[Iri]:
            return [device_iri(self._fleet, device) for device in devices]

        about = deployment_iri(self._fleet, number)
        facts: dict[Iri, dict[Iri, Binding | None]] = {
            about: {
                RDF.type: [TF.Deployment, PROV.Activity],
                TF.fleet: self._fleet,
                TF.ofModel: model,
                PROV.used: model,
                TF.target: iris(targets),
                TF.confirmedBy: iris(confirmed),
                TF.failedOn: iris(failed),
                TF.selectedBy: selected_by,
                PROV.startedAtTime: started,
                PROV.endedAtTime: ended,
            }
        }
        shapes.admit(self._store, f"deployment {number}", facts)
        return about

    def _newest(self, run: int, number: int) -> tuple[Iri, Iri | None]:
        """The model of the run, and its newest version before this round."""
        rows = self._store.query(
            """PREFIX tf: <https://w3id.org/tinyfleet#>
            PREFIX prov: <http://www.w3.org/ns/prov#>
            SELECT ?model ?version WHERE {
              VALUES ?run { UNDEF }
              VALUES ?number { UNDEF }
              ?run tf:ofModel ?model .
              OPTIONAL {
                ?version prov:wasGeneratedBy/tf:inRun? ?run ; a tf:ModelVersion ; tf:versionNumber ?n .
                FILTER(?n < ?number)
              }
            } ORDER BY DESC(?n) LIMIT 1""",
            run=run_iri(self._fleet, run),
            number=number,
        )
        if not rows:
            raise shapes.ShapeError(f"round {number} of run {run}", ["the run has not begun; call begin first"])
        model, version = rows[0]["model"], rows[0].get("version")
        return Iri(str(model)), None if version is None else Iri(str(version))

    def _version(
        self, model: Iri, number: int, sha256: str, activity: Iri, before: Iri | None
    ) -> dict[Iri, Binding | None]:
        return {
            RDF.type: [TF.ModelVersion, PROV.Entity],
            TF.ofModel: model,
            TF.versionNumber: number,
            TF.sha256: sha256,
            PROV.wasGeneratedBy: activity,
            PROV.wasDerivedFrom: before,
        }


class DeviceHistory:
    """Since when devices are offline, and their drift events: what their new statuses change beside their state.

    The graph is asked once for all the statuses that are to come; `changes` then follows what it has said itself. To be
    used while nobody else writes.
    """

    def __init__(self, store: Store, statuses: Iterable[tuple[Iri, Status]]) -> None:
        """statuses: of which devices, and what is to be known of each."""
        devices: dict[Iri, None] = {}
        drifted: dict[Iri, None] = {}
        settled: dict[Iri, None] = {}
        for device, status in statuses:
            devices[device] = None
            if status.online and status.drift is not None:
                if status.drift >= DRIFTED:
                    drifted[device] = None
                elif status.drift < SETTLED:
                    settled[device] = None
        # What a device's state is already needs no second look: who wrote that it is online took away since when it is
        # not, and who wrote that its drift is small or large ended its event or began one, in the same transaction.
        online = store.values(list(devices), TF.online)
        drift = store.values(list(drifted | settled), TF.drift)
        self._offline = set(store.values([d for d in devices if online.get(d) is not True], TF.offlineSince))
        self._events: dict[Iri, int] = {}
        self._under_way: dict[Iri, list[Iri]] = {}
        asked = []
        for device in drifted | settled:
            known = drift.get(device)
            if not isinstance(known, float) or (device in drifted and device in settled):
                asked.append(device)
            elif device in drifted and known >= DRIFTED:
                self._under_way[device] = []  # one is, whichever
            elif device in drifted or known >= SETTLED:
                asked.append(device)
        if asked:
            for row in store.query(
                f"""SELECT ?device ?event ?ended WHERE {{
                      VALUES ?device {{ {" ".join(f"<{device}>" for device in asked)} }}
                      ?event <{TF.device}> ?device ; a <{TF.DriftEvent}> .
                      OPTIONAL {{ ?event <{PROV.endedAtTime}> ?ended }}
                    }}"""
            ):
                device = Iri(str(row["device"]))
                self._events[device] = self._events.get(device, 0) + 1
                if "ended" not in row:
                    self._under_way.setdefault(device, []).append(Iri(str(row["event"])))

    def removed(self, device: Iri) -> None:
        """Everything that was said of the device has been taken out of the graph; its events have not."""
        self._offline.discard(device)

    def changes(self, device: Iri, status: Status, at: datetime) -> dict[Iri, dict[Iri, Binding | None]]:
        """What a device's new status changes: since when it is offline, and, where its drift rises through DRIFTED, a
        drift event, which ends when it falls below SETTLED. To be written with the state.

        A status that comes twice makes no second event.
        """
        if not status.online:
            if device in self._offline:
                return {}
            self._offline.add(device)
            return {device: {TF.offlineSince: at}}
        facts: dict[Iri, dict[Iri, Binding | None]] = {}
        if device in self._offline:
            self._offline.remove(device)
            facts[device] = {TF.offlineSince: None}
        if status.drift is None:
            return facts
        if status.drift < SETTLED:
            facts |= {event: {PROV.endedAtTime: at} for event in self._under_way.pop(device, ())}
        elif status.drift >= DRIFTED and device not in self._under_way:
            number = self._events[device] = self._events.get(device, 0) + 1
            event = Iri(f"{device}:drift:{number}")
            self._under_way[device] = [event]
            facts[event] = {
                RDF.type: [TF.DriftEvent, SOSA.Observation, PROV.Activity],
                TF.device: device,
                TF.drift: status.drift,
                TF.ofModel: model_iri(status.model),
                SOSA.resultTime: at,
                PROV.startedAtTime: at,
            }
        return facts


def _finite(number: float | None) -> float | None:
    return None if number is None or not math.isfinite(number) else float(number)
