"""Sends a model over the air to the devices that a query selects, and writes the results into the graph.

The program is published once, as retained chunks that the broker fans out; they are cleared when all devices are done.
The server is asked to send each device the command to update its model, and asked again at growing intervals, until
the device's status or its reply confirms the model, it reports an error, or its time is up. Commands, chunks and
replies may be lost: a device that gets the same command again fetches the chunks that it lacks, or repeats its reply.
"""

import contextlib
import itertools
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from tinyfleet.edge.device.node import NOT_FOR_FLEETS
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.model.program import read_program as read_any_program
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.chunks import CHUNK, MAX_CHUNKS, chunks
from tinyfleet.edge.wire.commands import Manifest, Refusal, Sha256, Submitted, UpdateModel, encode_action
from tinyfleet.edge.wire.errors import ProtocolError
from tinyfleet.edge.wire.messages import Failure, Reply, Status, Trial, decode_reply, decode_status, error_text
from tinyfleet.edge.wire.mqtt_session import Message, Session
from tinyfleet.edge.wire.topics import ANNOUNCEMENT, Topics
from tinyfleet.ontology.ingest.describe import from_program
from tinyfleet.ontology.ingest.lineage import Lineage
from tinyfleet.ontology.queries import matching
from tinyfleet.ontology.store.store import Store
from tinyfleet.ontology.vocabulary.namespaces import Iri
from tinyfleet.server.commands.client import CommandClient
from tinyfleet.server.commands.service import MAX_LIFE

MAX_CONCURRENT = 64
"""Devices that fetch the program at the same time: a broker queues all its chunks for each of them."""
REPEAT = 2.0
"""Seconds until a device that has not replied is asked again; the interval doubles each time, up to 16 times this."""

TargetStatus = Literal["confirmed", "on trial", "failed", "no answer"]


@dataclass(frozen=True)
class TrialConditions:
    """What a model must do on a device before the device keeps it.

    Parameters
    ----------
    tested
        Samples of the device that it is scored on before it runs.
    probation
        Samples that it then learns from, or is scored on, before it is confirmed.
    max_loss
        The largest mean loss of either; 0: any that is finite.
    """

    tested: int = 0
    probation: int = 0
    max_loss: float = 0.0


@dataclass(frozen=True)
class DeploymentPlan:
    """A deployment before it begins.

    Parameters
    ----------
    model
        The model's IRI.
    targets
        The devices that will get it.
    running
        The id of the model that each target runs now.
    excluded
        Why each other device of the fleet is not a target.
    """

    model: Iri
    targets: Sequence[matching.DeviceMatch]
    running: Mapping[str, str]
    excluded: Mapping[str, str]


@dataclass(frozen=True)
class TargetResult:
    """The result of one target, and the seconds that it took. The reason says why it is not confirmed."""

    device: str
    outcome: TargetStatus
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class DeploymentResult:
    """A deployment that has ended: its IRI, and each target's result, in the order in which they ended."""

    iri: Iri
    results: Sequence[TargetResult]

    def devices(self, outcome: TargetStatus) -> list[str]:
        """The targets with this result, by id."""
        return sorted(result.device for result in self.results if result.outcome == outcome)


def read_program(path: Path) -> Program:
    """The program in a file.

    Raises
    ------
    UserError
        If the file is not a program, or a fleet cannot run it.
    """
    program = read_any_program(path)
    if program.input.dtype != "float32" or program.trains_int8 or program.loss is None:
        raise UserError(f"{path} is not a program for a fleet: {NOT_FOR_FLEETS}")
    if len(program.data) > CHUNK * MAX_CHUNKS:
        raise UserError(
            f"{path} has {len(program.data):,} bytes; {CHUNK * MAX_CHUNKS:,} can be sent; use a smaller model"
        )
    return program


def manifest(program: Program, version: int, trial: TrialConditions = TrialConditions()) -> Manifest:
    """What devices are told of a program.

    Parameters
    ----------
    program
        The program.
    version
        Devices take it only if this is higher than that of any they confirmed before.
    trial
        What it must do on a device before the device keeps it.
    """
    return Manifest(
        Sha256.of(program.data).digest,
        len(program.data),
        version,
        program.arena_bytes,
        math.prod(program.input_shape),
        math.prod(program.output_shape),
        trial.tested,
        trial.probation,
        trial.max_loss,
    )


def plan_deployment(store: Store, program: Program, name: str, sparql: str, fleet: str) -> DeploymentPlan:
    """Which devices of a fleet will get a program, and why the others will not.

    The model is described in the graph if it is not yet. Devices are excluded that the query does not select, that do
    not meet a requirement of the model, run it already, have no memory for it, or are offline.

    Parameters
    ----------
    store
        The graph.
    program
        The model.
    name
        Its name in the graph.
    sparql
        A query whose column ?id selects the devices.
    fleet
        The fleet's name.

    Returns
    -------
    DeploymentPlan

    Raises
    ------
    UserError
        If no device is left.
    """
    model = matching.describe(store, from_program(program, name))
    selected = set(matching.select_devices(store, sparql, model, fleet))
    matches = {match.device: match for match in matching.match_devices(store, model, fleet)}
    unmet = matching.unmet_requirements(store, fleet, model=model)
    rows = store.query(
        """PREFIX tf: <https://w3id.org/tinyfleet#>
        SELECT ?id ?running WHERE {
          VALUES ?fleet { UNDEF }
          ?device tf:fleet ?fleet ; a tf:Device ; tf:deviceId ?id .
          OPTIONAL { ?device tf:currentModel ?running }
        }""",
        fleet=fleet,
    )
    current = {str(row["id"]): row.get("running") for row in rows}
    excluded = dict.fromkeys(selected - set(current), "the graph knows no such device")
    for device, running in current.items():
        missing = [u for u in unmet.get((device, model), ()) if u.requirement != matching.TRAIN]
        reason = _exclusion(matches.get(device), missing, running == model, device in selected)
        if reason is not None:
            excluded[device] = reason
    targets = [match for device, match in matches.items() if device not in excluded]
    if not targets:
        raise _no_targets_message(fleet, selected, excluded)
    running_now = {match.device: str(current[match.device]).rsplit(":", 1)[-1] for match in targets}
    return DeploymentPlan(model, targets, running_now, dict(sorted(excluded.items())))


def _exclusion(
    match: matching.DeviceMatch | None,
    missing: Sequence[matching.UnmetRequirement],
    runs_it: bool,
    is_selected: bool,
) -> str | None:
    """Why a device will not get the model; None if it will."""
    unmet = "; ".join(map(str, missing))
    if match is None:
        return unmet or "the graph knows too little about it"
    reasons = (
        (runs_it, "runs it already"),
        (not is_selected, "the query does not select it"),
        (bool(unmet), unmet),
        (not match.online, "is offline"),
    )
    return next((reason for applies, reason in reasons if applies), None)


def _no_targets_message(fleet: str, selected: set[str], excluded: Mapping[str, str]) -> UserError:
    if not excluded:
        return UserError(
            f"the graph knows no device of the fleet '{fleet}'; start some (tinyfleet device simulate), or name "
            "another fleet with --fleet"
        )
    # The selected devices first: why they are excluded matters most.
    devices = sorted(excluded, key=lambda device: (device not in selected, device))
    reasons = "; ".join(f"{device}: {excluded[device]}" for device in devices[:5])
    more = f"; and {len(devices) - 5} more" if len(devices) > 5 else ""
    return UserError(f"no device is left to send it to: {reasons}{more}")


def deploy(
    store: Store,
    program: Program,
    deployment_plan: DeploymentPlan,
    *,
    broker: BrokerAddress,
    fleet: str,
    selected_by: str,
    timeout: float = 60.0,
    trial: TrialConditions = TrialConditions(),
    on_result: Callable[[TargetResult], None] = lambda result: None,
) -> DeploymentResult:
    """Sends the program to the plan's targets, and writes the deployment into the graph when it begins and ends.

    Parameters
    ----------
    store
        The graph.
    program
        The model.
    deployment_plan
        From `plan_deployment`.
    broker
        The MQTT broker.
    fleet
        The fleet's name.
    selected_by
        The query that selected the targets, for the graph.
    timeout
        Seconds that one device may take.
    trial
        What the model must do on a device before the device keeps it.
    on_result
        Called with each target's result.

    Returns
    -------
    DeploymentResult

    Raises
    ------
    UserError
        If no broker listens there.
    """
    targets = [match.device for match in deployment_plan.targets]
    lineage, number, began = Lineage(store, fleet), secrets.randbits(32), datetime.now(UTC)
    with _Rollout(broker, fleet, program, targets, timeout, trial) as rollout:
        about = lineage.deployment(number, deployment_plan.model, targets, selected_by=selected_by, started=began)
        interrupted = True
        try:
            for result in rollout.run():
                on_result(result)
            interrupted = False
        finally:  # after an interrupt too, with the results so far
            ended = DeploymentResult(about, rollout.results)
            lineage.deployment(
                number,
                deployment_plan.model,
                targets,
                selected_by=selected_by,
                started=began,
                ended=datetime.now(UTC),
                confirmed=ended.devices("confirmed"),
                tried=ended.devices("on trial"),
                failed=ended.devices("failed"),
                interrupted=interrupted,
            )
    return ended


@dataclass
class _Target:
    """One device, from its first command until its result. Times are those of time.monotonic()."""

    command: UpdateModel
    began: float
    resend_at: float
    resend_interval: float = REPEAT
    online: bool = True


class _Rollout:
    """The session with the broker, and the targets at work. Use it in a `with`, and iterate over `run` once."""

    def __init__(
        self,
        broker: BrokerAddress,
        fleet: str,
        program: Program,
        devices: Sequence[str],
        timeout: float,
        trial: TrialConditions,
    ) -> None:
        self.results: list[TargetResult] = []
        self._topics = Topics(fleet)
        self._program = program
        payloads = enumerate(chunks(program.data))
        self._chunks = [Message(self._topics.program(program.model_id, n), payload, True) for n, payload in payloads]
        self._timeout = timeout
        self._manifest = manifest(program, int(time.time()), trial)
        self._ids = itertools.count(secrets.randbits(32))
        self._changed = threading.Condition()  # guards the results, and the next two
        self._waiting: dict[str, _Target] = {}
        self._pending = list(reversed(devices))
        self._session: Session | None = None
        name = f"tinyfleet-deploy-{secrets.token_hex(4)}"
        self._commands = CommandClient(self._topics, name, broker.api_token, self._on_refusal)
        self._driver = self._topics.driver("model", program.model_id, name)
        self._session = Session(
            broker, name, on_message=self._receive, on_connect=self._connected, will=(self._driver, b"")
        )
        self._connected()
        try:
            self._commands.require_server(broker)
        except UserError:
            self._session.close()
            raise

    def __enter__(self) -> "_Rollout":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._session is not None
        self._session.send(chunk._replace(payload=b"") for chunk in self._chunks)  # the broker keeps nothing
        self._session.publish(self._driver, b"", retain=True)
        if self._session.connected:
            self._session.flush(2)
        self._session.close()

    def run(self) -> Iterator[TargetResult]:
        """The results as they arrive; ends with the last."""
        assert self._session is not None
        reported = 0
        while True:
            with self._changed:
                commands, until = self._due()
                over = not self._waiting
            if commands:  # not under the lock: the session's thread may wait for it
                self._session.send(self._commands.messages(commands))
            while reported < len(self.results):
                yield self.results[reported]
                reported += 1
            if over:
                return
            with self._changed:
                if reported == len(self.results):
                    self._changed.wait(max(0.0, until - time.monotonic()))

    def _due(self) -> tuple[list[Submitted], float]:
        """Gives up on targets that are late and begins with the next ones; returns the commands to send now, and
        when to look again."""
        now = time.monotonic()
        commands: list[Submitted] = []
        for device, target in list(self._waiting.items()):
            if now >= target.began + self._timeout:
                reason = f"no answer within {self._timeout:g} s" if target.online else "it went offline"
                self._finish(device, "no answer", reason)
        while self._pending and len(self._waiting) < MAX_CONCURRENT:
            command = UpdateModel(next(self._ids) & 0xFFFFFFFF, self._manifest)
            self._waiting[self._pending.pop()] = _Target(command, now, now)
        for device, target in self._waiting.items():
            if now >= target.resend_at:
                life = max(1, int(1000 * (target.began + self._timeout - now)))
                commands.append(Submitted(device, min(life, MAX_LIFE), encode_action(target.command)))
                target.resend_at, target.resend_interval = (
                    now + target.resend_interval,
                    min(2 * target.resend_interval, 16 * REPEAT),
                )
        times = (min(target.resend_at, target.began + self._timeout) for target in self._waiting.values())
        return commands, min(times, default=now)

    def _finish(self, device: str, outcome: TargetStatus, reason: str = "") -> None:
        target = self._waiting.pop(device)
        self.results.append(TargetResult(device, outcome, time.monotonic() - target.began, reason))
        self._changed.notify_all()

    # Called by the session's thread

    def _connected(self) -> None:
        """A new session has no subscriptions, and a new broker no chunks. May be called twice for the first session."""
        if self._session is None:
            return
        self._session.publish(self._driver, ANNOUNCEMENT, retain=True)
        self._session.subscribe(self._topics.status("+"))
        self._session.subscribe(self._topics.reply("+"))
        self._commands.subscribe(self._session)
        self._session.send(self._chunks)

    def _receive(self, topic: str, payload: bytes) -> None:
        decode: dict[str, Callable[[bytes], Status | Reply]] = {"status": decode_status, "reply": decode_reply}
        match self._topics.parse(topic):
            case (("status" | "reply") as kind, (str(device),)):
                with contextlib.suppress(ProtocolError):
                    message = decode[kind](payload)
                    with self._changed:
                        if (target := self._waiting.get(device)) is not None:
                            self._take(device, target, message)
            case None:
                self._commands.receive(topic, payload)

    def _on_refusal(self, refusal: Refusal) -> None:
        with self._changed:
            target = self._waiting.get(refusal.to)
            if target is not None and target.command.id == refusal.id:
                self._finish(refusal.to, "failed", refusal.reason)

    def _take(self, device: str, target: _Target, message: Status | Reply) -> None:
        if not isinstance(message, Status):
            if message.id == target.command.id:
                if isinstance(message, Failure):
                    self._finish(device, "failed", error_text(message))
                else:
                    self._finish(device, "on trial" if self._manifest.probation else "confirmed")
            return
        if message.online and message.model == self._program.model_id:
            self._finish(device, "on trial" if message.trial is Trial.ON_TRIAL else "confirmed")
        elif message.online and not target.online:  # it is back, and may have lost its command
            target.resend_at = time.monotonic()
            self._changed.notify_all()
        target.online = message.online
