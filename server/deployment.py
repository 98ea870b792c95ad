"""Gives a model to the devices that a query selects, over the air, and writes into the graph what came of it.

The program is published once, as retained chunks that the broker fans out; they are cleared when all have answered.
Each device is sent the order to adopt it, and sent it again, more and more seldom, until its status or its reply says
that it has, it says that it cannot, or its time is up: an order, a chunk or a reply may be lost, and a device that gets
the same order again asks for the chunks that it lacks, or says again what it said.
"""

import itertools
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from tinyfleet.edge.device.node import NOT_FOR_FLEETS
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.program import Program, ProgramError
from tinyfleet.edge.wire.chunks import CHUNK, MAX_CHUNKS, chunks
from tinyfleet.edge.wire.errors import ProtocolError
from tinyfleet.edge.wire.messages import (
    Failure,
    Reply,
    Status,
    UpdateModel,
    decode_reply,
    decode_status,
    encode,
    error_text,
)
from tinyfleet.edge.wire.mqtt_session import Message, Session
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.ingest.describe import from_program
from tinyfleet.ontology.ingest.lineage import Lineage
from tinyfleet.ontology.queries import match as matching
from tinyfleet.ontology.store.store import Store
from tinyfleet.ontology.vocabulary.namespaces import Iri

MAX_CONCURRENT = 64
"""Devices that fetch the program at the same time: a broker queues all its chunks for each of them."""
REPEAT = 2.0
"""Seconds until a device that has not answered is asked again; then twice that, and so on, up to 16 times that."""

TargetStatus = Literal["confirmed", "failed", "no answer"]


@dataclass(frozen=True)
class DeploymentPlan:
    """A deployment before it begins. left_out: why each other device of the fleet is none of the targets."""

    model: Iri
    targets: Sequence[matching.DeviceMatch]
    running: Mapping[str, str]  # target -> the id of the model that it runs now
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class TargetResult:
    """What came of one target, and after how many seconds. reason: why not, if it is not confirmed."""

    device: str
    outcome: TargetStatus
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class DeploymentResult:
    """A deployment that has ended: its IRI, and what came of each target, in the order of the answers."""

    iri: Iri
    results: Sequence[TargetResult]

    def devices(self, outcome: TargetStatus) -> list[str]:
        """Those that it came to this with."""
        return sorted(result.device for result in self.results if result.outcome == outcome)


def read_program(path: Path) -> Program:
    """The program in a file. Raises UserError if it is none, or none that a fleet can be given."""
    try:
        program = Program.parse(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); make one with: tinyfleet model compile") from None
    except ProgramError as error:
        raise UserError(f"{path} is not a program ({error}); make one with: tinyfleet model compile") from None
    if program.input.dtype != "float32" or program.trains_int8 or program.loss is None:
        raise UserError(f"{path} is no program for a fleet: {NOT_FOR_FLEETS}")
    if len(program.data) > CHUNK * MAX_CHUNKS:
        raise UserError(
            f"{path} has {len(program.data):,} bytes; {CHUNK * MAX_CHUNKS:,} can be sent; use a smaller model"
        )
    return program


def plan_deployment(store: Store, program: Program, name: str, sparql: str, fleet: str) -> DeploymentPlan:
    """Whom a query selects of a fleet to be given this program, and why not everyone.

    The model is described in the graph if it is not yet. Selected devices that do not meet a need of it, run it
    already, say that they have no room for it or are offline are left out. Raises UserError if nobody is left.
    """
    model = matching.describe(store, from_program(program, name))
    selected = set(matching.select(store, sparql, model, fleet))
    fits = {fit.device: fit for fit in matching.match_devices(store, model, fleet)}
    misses = matching.unmet_requirements(store, fleet, model=model)
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
    left_out = dict.fromkeys(selected - set(current), "the graph knows no such device")
    for device, running in current.items():
        missed = [miss for miss in misses.get((device, model), ()) if miss.requirement != matching.TRAIN]
        if device not in fits:
            left_out[device] = "; ".join(map(str, missed)) or "the graph knows too little of it"
        elif running == model:
            left_out[device] = "runs it already"
        elif device not in selected:
            left_out[device] = "the query does not select it"
        elif missed:
            left_out[device] = "; ".join(map(str, missed))
        elif not fits[device].online:
            left_out[device] = "is offline"
    targets = [fit for device, fit in fits.items() if device not in left_out]
    if not targets:
        raise _no_targets_message(fleet, selected, left_out)
    running_now = {fit.device: str(current[fit.device]).rsplit(":", 1)[-1] for fit in targets}
    return DeploymentPlan(model, targets, running_now, dict(sorted(left_out.items())))


def _no_targets_message(fleet: str, selected: set[str], left_out: Mapping[str, str]) -> UserError:
    if not left_out:
        return UserError(
            f"the graph knows no device of the fleet '{fleet}'; start some (tinyfleet device simulate), or name another "
            "fleet with --fleet"
        )
    # First why those that were wanted cannot be given it.
    command = sorted(left_out, key=lambda device: (device not in selected, device))
    reasons = "; ".join(f"{device}: {left_out[device]}" for device in command[:5])
    more = f"; and {len(command) - 5} more" if len(command) > 5 else ""
    return UserError(f"nobody is left to give it to: {reasons}{more}")


def deploy(
    store: Store,
    program: Program,
    what: DeploymentPlan,
    *,
    broker: tuple[str, int],
    fleet: str,
    selected_by: str,
    timeout: float = 60.0,
    on_result: Callable[[TargetResult], None] = lambda result: None,
) -> DeploymentResult:
    """Gives the program to the plan's targets, and writes the deployment into the graph when it begins and ends.

    timeout: seconds that one device may take. on_result: called as each answers, or does not. Raises UserError if the
    broker is not there.
    """
    targets = [fit.device for fit in what.targets]
    lineage, number, began = Lineage(store, fleet), secrets.randbits(32), datetime.now(UTC)
    with _Rollout(broker, fleet, program, targets, timeout) as rollout:
        about = lineage.deployment(number, what.model, targets, selected_by=selected_by, started=began)
        try:
            for result in rollout.run():
                on_result(result)
        finally:  # after an interrupt too: who has not answered by then has not
            ended = DeploymentResult(about, rollout.results)
            lineage.deployment(
                number,
                what.model,
                targets,
                selected_by=selected_by,
                started=began,
                ended=datetime.now(UTC),
                confirmed=ended.devices("confirmed"),
                failed=ended.devices("failed"),
            )
    return ended


@dataclass
class _Target:
    """One device, from its first order until its outcome. Times are time.monotonic()'s."""

    command: UpdateModel
    began: float
    resend_at: float
    resend_interval: float = REPEAT
    online: bool = True


class _Rollout:
    """The session with the broker, and what is under way. Use it in a `with`, and iterate over `run` once."""

    def __init__(
        self, broker: tuple[str, int], fleet: str, program: Program, devices: Sequence[str], timeout: float
    ) -> None:
        self.results: list[TargetResult] = []
        self._topics = Topics(fleet)
        self._program = program
        payloads = enumerate(chunks(program.data))
        self._chunks = [Message(self._topics.program(program.model_id, n), payload, True) for n, payload in payloads]
        self._timeout = timeout
        self._ids = itertools.count(secrets.randbits(32))
        self._changed = threading.Condition()  # guards the results, and the next two
        self._waiting: dict[str, _Target] = {}
        self._pending = list(reversed(devices))
        self._session: Session | None = None
        name = f"tinyfleet-deploy-{secrets.token_hex(4)}"
        self._session = Session(*broker, name, on_message=self._receive, on_connect=self._connected)
        self._connected()

    def __enter__(self) -> "_Rollout":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._session is not None
        self._session.send(chunk._replace(payload=b"") for chunk in self._chunks)  # nobody is to fetch it any more
        if self._session.connected:
            self._session.flush(2)
        self._session.close()

    def run(self) -> Iterator[TargetResult]:
        """The outcomes as they come; ends with the last."""
        assert self._session is not None
        told = 0
        while True:
            with self._changed:
                orders, until = self._due()
                over = not self._waiting
            for device, command in orders:  # not under the lock: the session's thread may wait for it
                self._session.publish(self._topics.command(device), encode(command))
            while told < len(self.results):
                yield self.results[told]
                told += 1
            if over:
                return
            with self._changed:
                if told == len(self.results):
                    self._changed.wait(max(0.0, until - time.monotonic()))

    def _due(self) -> tuple[list[tuple[str, UpdateModel]], float]:
        """Gives up on who is late, begins with who is next, and says whom to ask now, and when it is time to look
        again."""
        now, orders = time.monotonic(), []
        for device, target in list(self._waiting.items()):
            if now >= target.began + self._timeout:
                why = f"no answer within {self._timeout:g} s" if target.online else "it went offline"
                self._finish(device, "no answer", why)
        data = self._program.data
        while self._pending and len(self._waiting) < MAX_CONCURRENT:
            command = UpdateModel(next(self._ids) & 0xFFFFFFFF, self._program.model_id, len(data), zlib.crc32(data))
            self._waiting[self._pending.pop()] = _Target(command, now, now)
        for device, target in self._waiting.items():
            if now >= target.resend_at:
                orders.append((device, target.command))
                target.resend_at, target.resend_interval = (
                    now + target.resend_interval,
                    min(2 * target.resend_interval, 16 * REPEAT),
                )
        times = (min(target.resend_at, target.began + self._timeout) for target in self._waiting.values())
        return orders, min(times, default=now)

    def _finish(self, device: str, outcome: TargetStatus, reason: str = "") -> None:
        target = self._waiting.pop(device)
        self.results.append(TargetResult(device, outcome, time.monotonic() - target.began, reason))
        self._changed.notify_all()

    # Called by the session's thread

    def _connected(self) -> None:
        """The session is new, and so may be the broker: it then has no chunks. For the first, maybe called twice."""
        if self._session is None:
            return
        self._session.subscribe(self._topics.status("+"))
        self._session.subscribe(self._topics.reply("+"))
        self._session.send(self._chunks)

    def _receive(self, topic: str, payload: bytes) -> None:
        match self._topics.parse(topic):
            case "status", (str(device),):
                read: Callable[[bytes], Status | Reply] = decode_status
            case "reply", (str(device),):
                read = decode_reply
            case _:
                return
        try:
            said = read(payload)
        except ProtocolError:
            return
        with self._changed:
            target = self._waiting.get(device)
            if target is None:
                return
            if isinstance(said, Status):
                if said.online and said.model == self._program.model_id:
                    self._finish(device, "confirmed")
                elif said.online and not target.online:  # it is back, and what it was told may be lost
                    target.resend_at = time.monotonic()
                    self._changed.notify_all()
                target.online = said.online
            elif said.id == target.command.id:
                if isinstance(said, Failure):
                    self._finish(device, "failed", error_text(said))
                else:
                    self._finish(device, "confirmed")
