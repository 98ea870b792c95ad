"""Runs, rounds, updates, model versions and deployments as PROV-O: where each version of a model comes from.

A run trains one model; each round makes the next version from the newest one and the devices' replies. This module also
records when devices went offline, and drift events.
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
    drift_iri,
    fleet_name,
    model_iri,
    round_iri,
    run_iri,
    update_iri,
    version_iri,
)

DRIFTED = 0.5
"""Drift at which an event begins."""
FINAL = 0.4
"""Drift below which the event ends. It is lower, so that a drift that hovers around the threshold is one event."""


@dataclass(frozen=True)
class Participation:
    """One device's part in a round, with the results it reported; None for those it did not.

    Attributes
    ----------
    device
        ID of the device.
    loss
        Mean loss over the samples learned from.
    accuracy
        From 0 to 1, on held-out samples.
    samples
        Number of samples learned from.
    bytes_up
        Bytes of payload sent.
    encoding
        Encoding of its update, such as "sparse f16".
    staleness
        Number of versions that others made meanwhile.
    """

    device: str
    loss: float | None = None
    accuracy: float | None = None
    samples: int | None = None
    bytes_up: int | None = None
    encoding: str | None = None
    staleness: int | None = None


class Lineage:
    """Writes the runs and deployments of one fleet to the graph. Writing the same twice changes nothing."""

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
        """Record the start of a run.

        Parameters
        ----------
        run, model, strategy, task
            Number of the run, IRI of its model, and names of its strategy and learning task.
        sha256
            Hash of the initial parameters as float32.
        derived_from
            Version that these parameters come from, if any.
        at
            When it started. Default: now.

        Returns
        -------
        Iri
            Version 0 of the run.
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
        shapes.check_and_add(self._store, f"run {run}", facts)
        return version

    def round(
        self,
        run: int,
        number: int,
        parts: Sequence[Participation],
        *,
        selected: int,
        started: datetime,
        ended: datetime | None = None,
        sha256: str | None = None,
        bytes_up: int | None = None,
        bytes_down: int | None = None,
        accuracy: float | None = None,
        lost: Iterable[str] = (),
        refused: Iterable[str] = (),
    ) -> Iri | None:
        """Record a round that has ended.

        Parameters
        ----------
        run, number
            Numbers of the run and of the round.
        parts
            The devices that took part. The round's loss is the mean of their losses.
        selected
            How many devices were selected.
        started, ended
            When the round started and ended. Default for the end: now.
        sha256
            Hash of the new parameters; None if the round made no version, because no device replied.
        bytes_up, bytes_down
            Bytes of payload that the devices and the server sent.
        accuracy
            From 0 to 1, on held-out samples.
        lost
            IDs of selected devices that gave no reply.
        refused
            IDs of devices whose reply was out of bounds.

        Returns
        -------
        Iri or None
            The version that the round made, derived from the run's newest version before it.
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
                TF.selectedDevices: selected,
                TF.noReplyFrom: [device_iri(self._fleet, device) for device in lost],
                TF.refusedReplyFrom: [device_iri(self._fleet, device) for device in refused],
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
                TF.samplesLearned: p.samples,
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
        shapes.check_and_add(self._store, f"round {number} of run {run}", facts)
        return version

    def end(self, run: int, at: datetime | None = None, *, failed: bool = False) -> None:
        """Record the end of a run; `failed` if it was interrupted, or nothing was learned."""
        ended = at or datetime.now(UTC)
        self._store.write({run_iri(self._fleet, run): {PROV.endedAtTime: ended, TF.failed: True if failed else None}})

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
        tried: Iterable[str] = (),
        failed: Iterable[str] = (),
        interrupted: bool = False,
    ) -> Iri:
        """Record a deployment: when it begins, and again, with its results, when it has ended."""

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
                TF.triedBy: iris(tried),
                TF.failedOn: iris(failed),
                TF.failed: True if interrupted else None,
                TF.selectedBy: selected_by,
                PROV.startedAtTime: started,
                PROV.endedAtTime: ended,
            }
        }
        shapes.check_and_add(self._store, f"deployment {number}", facts)
        return about

    def _newest(self, run: int, number: int) -> tuple[Iri, Iri | None]:
        """Return the model of the run, and its newest version before this round."""
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
    """When devices went offline, and their drift events: the facts that new statuses add beside the devices' state.

    The graph is asked once for all statuses of a batch; `changes` then keeps track of the facts that it has returned
    itself. Nothing else may write to the graph meanwhile.

    Parameters
    ----------
    store
        The graph.
    statuses
        The devices and the statuses of the batch.
    """

    def __init__(self, store: Store, statuses: Iterable[tuple[Iri, Status]]) -> None:
        devices: dict[Iri, set[str]] = {}
        for device, status in statuses:
            levels = devices.setdefault(device, set())
            if status.online and (level := _drift_level(status.drift)):
                levels.add(level)
        drifting = [device for device, levels in devices.items() if levels]
        # A device's state answers for most devices: whatever set it to online also removed tf:offlineSince, and
        # whatever set its drift also began or ended the event, in the same transaction.
        online = store.values(list(devices), TF.online)
        drift = store.values(drifting, TF.drift)
        self._offline = set(store.values([d for d in devices if online.get(d) is not True], TF.offlineSince))
        self._events: dict[Iri, int] = {}
        self._under_way: dict[Iri, list[Iri]] = {}
        unclear = []
        for device in drifting:
            before = drift.get(device)
            level = _drift_level(before) if isinstance(before, float) else _BETWEEN
            if devices[device] != {level}:
                unclear.append(device)
            elif level == _HIGH:
                self._under_way[device] = []  # there is one; which one does not matter
        if unclear:
            self._read_events(store, unclear)

    def _read_events(self, store: Store, devices: Iterable[Iri]) -> None:
        rows = store.query(
            f"""SELECT ?device ?event ?ended WHERE {{
                  VALUES ?device {{ {" ".join(f"<{device}>" for device in devices)} }}
                  ?event <{TF.device}> ?device ; a <{TF.DriftEvent}> .
                  OPTIONAL {{ ?event <{PROV.endedAtTime}> ?ended }}
                }}"""
        )
        for row in rows:
            device = Iri(str(row["device"]))
            self._events[device] = self._events.get(device, 0) + 1
            if "ended" not in row:
                self._under_way.setdefault(device, []).append(Iri(str(row["event"])))

    def removed(self, device: Iri) -> None:
        """Note that all facts about the device have been removed from the graph; its events stay."""
        self._offline.discard(device)

    def changes(self, device: Iri, status: Status, at: datetime) -> dict[Iri, dict[Iri, Binding | None]]:
        """Return the facts that a device's new status changes, to be written together with its state.

        They are the time since which it is offline, and drift events: one begins where the drift rises to `DRIFTED`,
        and ends where it falls below `FINAL`. A repeated status makes no second event.
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
        level = _drift_level(status.drift)
        if level == _LOW:
            facts |= {event: {PROV.endedAtTime: at} for event in self._under_way.pop(device, ())}
        elif level == _HIGH and device not in self._under_way:
            number = self._events[device] = self._events.get(device, 0) + 1
            event = drift_iri(device, number)
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


_HIGH, _LOW, _BETWEEN = "high", "low", ""


def _drift_level(drift: float | None) -> str:
    """High if the drift begins an event, low if it ends one, neither in between or if it is not known."""
    if drift is None or FINAL <= drift < DRIFTED:
        return _BETWEEN
    return _HIGH if drift >= DRIFTED else _LOW


def _finite(number: float | None) -> float | None:
    return None if number is None or not math.isfinite(number) else float(number)
