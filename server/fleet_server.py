"""The fleet's server in one object: a broker, the graph on disk, the registry that fills it, and over HTTP SPARQL, the
query page and the Thing Description Directory."""

import dataclasses
import hmac
import ipaddress
import json
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.private_files import make_private_folder, write_private
from tinyfleet.edge.wire.broker_address import BrokerAddress, is_loopback
from tinyfleet.edge.wire.commands import Action, Forget, Reboot
from tinyfleet.edge.wire.errors import ProtocolError
from tinyfleet.edge.wire.log_limit import LogLimit
from tinyfleet.edge.wire.mqtt_session import Receipt, Session
from tinyfleet.edge.wire.server_info import SERVER_FILE
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.http.access import SCOPES, Access, Client, Scope, Served
from tinyfleet.ontology.http.endpoint import Endpoint
from tinyfleet.ontology.http.request_handling import HttpError, in_thread, problem
from tinyfleet.ontology.ingest.registry import IngestResult, Registry
from tinyfleet.ontology.store import data_folder
from tinyfleet.ontology.store.column_index import IndexedStore
from tinyfleet.ontology.store.store import DiskError, StoreError
from tinyfleet.ontology.vocabulary.namespaces import Iri, device_iri, fleet_name
from tinyfleet.server.authority.authority import Authority, own_addresses
from tinyfleet.server.authority.identities import Role
from tinyfleet.server.broker import LOOPBACK, Broker, Secured
from tinyfleet.server.commands.counters import Counters
from tinyfleet.server.commands.service import CommandService
from tinyfleet.server.enrolment_api import EnrolmentApi
from tinyfleet.server.housekeeping import Housekeeper
from tinyfleet.server.metrics import Monitoring
from tinyfleet.server.mosquitto import Mosquitto
from tinyfleet.server.reconciliation import report_other_models

AUTHORITY = "authority"
"""Folder of the fleet's authority, in the data folder."""
MAX_BATCH = 1000
"""Messages written in one transaction at most."""
QUEUE_SIZE = 10_000
"""Messages that may wait to be written; beyond that, the broker waits."""
BATCH_DELAY = 0.005
"""Seconds that the first message of a transaction waits for others: a larger transaction costs less per message."""
STARTUP_WAIT = 2.0
"""Seconds that a new server waits until no device counts as online any more because an earlier server saw it; with a
million, that continues afterwards."""
GRACE = 30.0
"""Seconds that devices have to report after the broker was away, or the server; then they count as offline. Their
attempts to reconnect are 10 s apart at most."""
DISK_RETRY = 2.0
"""Seconds between two attempts to write to a disk that is full."""
MAX_KNOWN = 100_000
"""Devices whose last report is remembered."""
RENEWAL_INTERVAL = 12 * 3600.0
"""Seconds after which the server looks whether its own certificates near their end."""
COUNTERS = "command-counter"
"""File of the data folder, with the numbers that commands may have had."""
CHECK_INTERVAL = 1.0
"""Seconds between two looks whether the threads live."""

_ACTIONS: dict[str, Callable[[int], Action]] = {"reboot": Reboot, "reset": Forget}
_Message = tuple[str, bytes, Receipt | None]
_NEW_SESSION: _Message = ("a new session", b"", None)
_LOST: _Message = ("the session is lost", b"", None)
_END: _Message = ("the end", b"", None)

log = logging.getLogger(__name__)


class FleetServer:
    """Runs from its construction until it is closed; or use it in a `with`.

    Messages are written in batches of those that have arrived since the last batch. A message is acknowledged to the
    broker once it is in the graph, so that no acknowledged message is lost, however the server ends.

    Parameters
    ----------
    data
        Folder of the graph and of server.json, which tells other commands where the server is and the token for
        updates; only its owner can read that file.
    fleet
        The fleet's name.
    broker
        A running broker. Default: start one that only the fleet's identities may use.
    port, operator_port
        Ports of the broker to start, for devices and for operators; 0 picks a free one. That for operators is the next
        one by default.
    listen
        IP address on which broker and HTTP server listen. Default: this machine only.
    host_names
        Names and addresses under which clients on the network find this server.
    cors_origins
        Origins whose pages may use the HTTP API with a token.
    insecure
        Start a broker that anyone on this machine may use, without encryption.
    endpoint_port
        Port of the HTTP server; 0 picks a free one.
    on_log
        Called with one line for each change that a device reports; with not too many a second.
    on_failure
        Called with the reason if the server cannot go on: the broker or a thread has died for good. Close it then.

    grace
        Seconds that devices have to report after the broker was away, or the server.

    Attributes
    ----------
    ingested, dropped : int
        Messages that were written, and that were left out because of an error.
    broker_restarts : int
        How often the broker was started again.
    waiting : int
        Messages that wait to be written.
    disk_is_full : bool
        Whether the graph cannot be written at the moment.

    Raises
    ------
    UserError
        If a port is taken, no broker is installed or listens there, or another server has the folder.
    """

    def __init__(
        self,
        data: Path,
        fleet: str,
        *,
        broker: BrokerAddress | None = None,
        port: int = 8883,
        operator_port: int | None = None,
        endpoint_port: int = 0,
        listen: str = LOOPBACK,
        host_names: Sequence[str] = (),
        cors_origins: Sequence[str] = (),
        insecure: bool = False,
        on_log: Callable[[str], None] = lambda line: None,
        on_failure: Callable[[str], None] = lambda reason: None,
        grace: float = GRACE,
    ) -> None:
        if insecure and not is_loopback(listen):
            raise UserError(f"a server without security must not listen on {listen}; leave out --insecure or --listen")
        self.fleet = fleet_name(fleet)
        self.data = data
        limit = LogLimit(on_log, 100)
        self._on_log = limit
        self._on_failure = on_failure
        self._grace = grace
        self._closing = threading.Event()
        self.ingested, self.dropped = 0, 0
        self.disk_is_full = False
        self._topics = Topics(fleet)
        self._known: dict[str, str] = {}  # what was last reported about each device
        with _disk_errors(data), ExitStack() as stack:
            data_folder.prepare(data, on_log)
            self.store = stack.enter_context(IndexedStore(data / data_folder.GRAPH))
            make_private_folder(data)
            names = _host_names(listen, host_names)
            self.authority = Authority(data / AUTHORITY, names)
            stack.callback(self.authority.close)
            self._mosquitto: Mosquitto | None = None
            is_secured = False
            if broker is None:
                if operator_port is None:
                    operator_port = port + 1 if port else 0
                secured = None if insecure else Secured(self.authority, fleet, operator_port, listen)
                started = stack.enter_context(Broker(port, data / "broker", secured=secured, on_failure=self._fail))
                self._mosquitto = started.mosquitto
                is_secured = not insecure and started.kind == "mosquitto"
                if started.kind == "amqtt":
                    on_log(
                        "mosquitto is not installed; amqtt takes its place, without encryption, identities or limits, "
                        "and slower: apt-get install mosquitto"
                    )
                self.broker, self.device_broker, self.broker_kind = (
                    started.address,
                    started.device_address,
                    started.kind,
                )
            else:
                self.broker, self.device_broker, self.broker_kind = broker, broker, "given"
            enrolment = EnrolmentApi(self.authority, self._addresses, self._publish_keys)
            self._session: Session | None = None
            self.commands: CommandService | None = None
            self.registry = Registry(self.store, fleet)
            self.token = secrets.token_urlsafe(32)
            # What the owner shows to command devices goes through the broker: it can do no more than that.
            self._submission_token = secrets.token_urlsafe(32) if is_secured else None
            self.broker = dataclasses.replace(self.broker, api_token=self._submission_token)
            access = Access(self._token_owner, "admin" if insecure else None)
            served = stack.enter_context(
                Endpoint(
                    self.store,
                    access,
                    endpoint_port,
                    listen=listen,
                    certificate=None if is_loopback(listen) else self.authority.server_files,
                    host_names=names,
                    cors_origins=cors_origins,
                    registry=self.registry,
                    deleted=self._forget,
                    routes=[
                        *enrolment.served,
                        *Monitoring(self, self.registry, self.store, lambda: served).served,
                        Served("POST", "/login-codes", "admin", self._new_login),
                        Served("DELETE", "/devices/{name}", "admin", self._forget_device),
                        Served("POST", "/devices/{name}/commands/{action}", "operate", self._command_device),
                    ],
                )
            )
            self.http = served
            self.address, self.endpoint, self._access = served.address, served.url, access
            self._public_host = names[0] if names else None
            self._local_address = served.local_address
            self._arrived: queue.SimpleQueue[_Message] = queue.SimpleQueue()
            self._room = threading.Semaphore(QUEUE_SIZE)
            self._settled = threading.Event()  # no device counts as online any longer because an earlier server saw it
            writer = threading.Thread(target=self._write, name="registry", daemon=True)
            writer.start()
            stack.callback(writer.join)
            guard = threading.Thread(target=self._guard, args=(writer, served), name="guard", daemon=True)
            guard.start()
            stack.callback(self._closing.set)
            stack.callback(self._arrived.put, _END)
            name = f"tinyfleet-server-{secrets.token_hex(4)}"
            self._housekeeper = Housekeeper(self._topics, self.store, partial(limit, "housekeeping"))
            self._session = Session(
                self.broker, name, on_delivery=self._receive, on_connect=self._connected, on_lost=self._lost
            )
            stack.callback(self._session.close)
            counters = Counters(data / COUNTERS)
            stack.callback(counters.close)
            self.commands = stack.enter_context(
                CommandService(
                    self.broker,
                    fleet,
                    name=f"tinyfleet-commands-{secrets.token_hex(4)}",
                    next_counter=counters.next,
                    signer=self.authority,
                    may_command=lambda token: not is_secured or self._may_operate(token),
                    takes_keyless=not is_secured,
                )
            )
            stack.callback(self._housekeeper.close)
            self._housekeeper.start(self._session)
            self._connected()
            self._settled.wait(STARTUP_WAIT)
            self._publish_address(data / SERVER_FILE)
            stack.callback((data / SERVER_FILE).unlink, missing_ok=True)
            stack.callback(self._closing.set)
            self._close = stack.pop_all()

    def __enter__(self) -> "FleetServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops what was started; the graph stays on disk."""
        self._close.close()

    @property
    def waiting(self) -> int:
        return self._arrived.qsize()

    @property
    def broker_restarts(self) -> int:
        return 0 if self._mosquitto is None else self._mosquitto.restarts

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to the broker now."""
        return self._session is not None and self._session.connected

    def _fail(self, reason: str) -> None:
        if not self._closing.is_set():
            self._on_failure(reason)

    def _guard(self, writer: threading.Thread, endpoint: Endpoint) -> None:
        """A server that has lost a thread must not look as if it lived."""
        renew_at = time.monotonic() + RENEWAL_INTERVAL
        while not self._closing.wait(CHECK_INTERVAL):
            if time.monotonic() >= renew_at:
                renew_at += RENEWAL_INTERVAL
                if self.authority.renew_own():
                    endpoint.read_certificate()
            commands = self.commands is None or self.commands.alive
            parts = [("writes what devices report", writer.is_alive()), ("serves HTTP", endpoint.alive)]
            for part, alive in (*parts, ("commands devices", commands)):
                if not alive:
                    self._fail(f"the thread that {part} has died; start the server again")
                    return

    def _connected(self) -> None:
        """Online devices have retained their status at the broker, or will; nothing is known about the others, as their
        wills may have been lost with a broker. Called for every new session, for the first one perhaps twice."""
        if self._session is None:
            return
        self._arrived.put(_NEW_SESSION)
        self._session.subscribe(self._topics.td("+"))
        self._session.subscribe(self._topics.status("+"))
        self._housekeeper.connected(self._session)

    def _lost(self) -> None:
        self._arrived.put(_LOST)

    def _forget(self, thing: Iri) -> None:
        """A client of the directory has deleted a thing: also remove what the broker retains of a device, which would
        add it again at the next start."""
        fleet = f"urn:tinyfleet:{self.fleet}:"
        if self._session is not None and thing.startswith(fleet):
            device = thing.removeprefix(fleet)
            for topic in (self._topics.td(device), self._topics.status(device), self._topics.echo(device)):
                self._session.publish(topic, b"", retain=True)

    async def _forget_device(self, request: Request) -> Response:
        """Remove a device from the fleet: its identity and session, what the broker retains of it, and its description.
        What it took part in stays in the graph."""
        name = request.path_params["name"]

        def forget() -> bool:
            identity = self.authority.identities.role(name) is not None
            if identity:
                self.authority.revoke(name)
            self.authority.identities.remove(name)
            thing = device_iri(self.fleet, name)
            with self.registry.things.lock:
                known = self.registry.things.get(thing) is not None
                self.registry.things.remove(thing)
            if identity or known:
                self._forget(thing)
            return identity or known

        try:
            known = await in_thread(forget)
        except UserError as error:
            return problem(HttpError(400, str(error)))
        if not known:
            return problem(HttpError(404, f"there is no device {name:.32}"))
        return Response(status_code=204)

    def _token_owner(self, token: str) -> tuple[str, Scope] | None:
        if hmac.compare_digest(token.encode(), self.token.encode()):
            return "owner", "admin"
        if self._submission_token is not None and hmac.compare_digest(token.encode(), self._submission_token.encode()):
            return "owner", "operate"
        return self.authority.identities.scope_of(token)

    def _may_operate(self, token: str | None) -> bool:
        owner = None if token is None else self._token_owner(token)
        return owner is not None and SCOPES.index(owner[1]) >= SCOPES.index("operate")

    def _publish_keys(self) -> None:
        if self.commands is not None:
            self.commands.publish_keys()

    async def _command_device(self, request: Request) -> Response:
        """Reboot a device, or make it forget what it keeps."""
        name, action = request.path_params["name"], _ACTIONS.get(request.path_params["action"])
        if action is None:
            return problem(HttpError(404, f"a device can be asked to {' or to '.join(_ACTIONS)}"))
        commands = self.commands
        if commands is None:
            return problem(HttpError(503, "the server is starting"))
        try:
            await in_thread(lambda: commands.command(name, action(secrets.randbits(32))))
        except (UserError, ProtocolError) as error:
            return problem(HttpError(409, str(error)))
        return Response(status_code=202)

    def login_address(self) -> str:
        """An address that logs a browser in to the page, once."""
        return f"{self.address}/login?code={self._access.new_login(Client('owner', 'admin'))}"

    async def _new_login(self, _request: Request) -> Response:
        return JSONResponse({"address": self.login_address()}, 201)

    def _addresses(self, role: Role) -> dict[str, str]:
        """What a new identity is told."""
        broker = self.device_broker if role == "device" else self.broker
        found = dataclasses.replace(broker, host=self._public_host or broker.host)
        return {"fleet": self.fleet, "broker": found.url, "http": self.address, "endpoint": self.endpoint}

    def _publish_address(self, path: Path) -> None:
        files = {"ca": self.broker.ca, "cert": self.broker.cert, "key": self.broker.key}
        address = {
            "broker": self.broker.url,
            "device_broker": self.device_broker.url,
            **{name: str(file.absolute()) for name, file in files.items() if file is not None},
            "http": self._local_address,
            "endpoint": f"{self._local_address}/sparql",
            "token": self.token,
            "fleet": self.fleet,
        }
        if self._submission_token is not None:
            address["submission_token"] = self._submission_token
        write_private(path, json.dumps(address))

    def _receive(self, topic: str, payload: bytes, receipt: Receipt | None) -> None:
        """Called by the session's thread. While nothing can be written, it waits, and so does the broker."""
        removed = not payload and topic.endswith("/status")  # by a server that forgets the device
        if removed or self._housekeeper.receive(topic, payload):
            if self._session is not None:
                self._session.received([receipt])
            return
        while not self._room.acquire(timeout=1.0):
            if self._closing.is_set():
                return
        self._arrived.put((topic, payload, receipt))

    def _write(self) -> None:
        """The writer's thread: writes what has arrived, then what has arrived since."""
        batch: list[_Message] = []
        offline_at: float | None = None  # when those that have not reported since the session is new count as offline
        while True:
            try:
                message = self._arrived.get(timeout=None if offline_at is None else offline_at - time.monotonic())
            except (queue.Empty, ValueError):  # ValueError: it is past
                offline_at = None
                self._try(self._give_up_missing)
                continue
            special = message is _NEW_SESSION or message is _LOST or message is _END
            if not special:
                if not batch and self._arrived.qsize() < MAX_BATCH:
                    time.sleep(BATCH_DELAY)
                batch.append(message)
            if batch and (special or len(batch) == MAX_BATCH or self._arrived.empty()):
                written, batch = batch, []
                self._room.release(len(written))
                self._try(partial(self._ingest, written))
            if message is _LOST or message is _NEW_SESSION:
                self._try(self.registry.mark_unknown)
                self._known.clear()
                self._settled.set()
                offline_at = None if message is _LOST else time.monotonic() + self._grace
            if message is _LOST:
                self._on_log("broker", "the broker is away: whether devices are online is unknown")
            elif message is _END:
                return

    def _give_up_missing(self) -> None:
        if missing := self.registry.mark_missing_offline():
            self._on_log("broker", f"devices have not come back: they count as offline ({missing})")

    def _try(self, write: Callable[[], None]) -> None:
        """Write, again and again while the disk is full. One message must not stop the others."""
        while True:
            try:
                write()
            except DiskError as error:
                if not self.disk_is_full:
                    self.disk_is_full = True
                    self._on_log("disk", f"{error}; what devices report waits until there is room")
                if self._closing.wait(DISK_RETRY):
                    return
                continue
            except Exception:
                log.exception("messages could not be written")
            else:
                if self.disk_is_full:
                    self.disk_is_full = False
                    self._on_log("disk", "the graph can be written again")
            return

    def _ingest(self, batch: list[_Message]) -> None:
        try:
            results = self.registry.ingest([(topic, payload) for topic, payload, _ in batch])
        except DiskError:
            raise
        except StoreError as error:
            if len(batch) > 1:  # one of them may be the cause
                for message in batch:
                    self._ingest([message])
            else:  # not acknowledged: the broker delivers it again to the next session
                self.dropped += 1
                self._on_log("not stored", f"a message could not be stored: {error}")
            return
        self.ingested += len(batch)
        if self._session is not None:
            self._session.received(receipt for _, _, receipt in batch)
        online = [result.device for result in filter(None, results) if self._report(result)]
        report_other_models(self.store, self.fleet, online, self._on_log)

    def _report(self, result: IngestResult) -> bool:
        """Log what changed; whether the device has come online. A state that was reported last for the device is not
        repeated."""
        if result.rejection is not None:
            self._on_log("rejected", result.rejection)
            return False
        if result.kind == "td":
            self._on_log("described", f"{result.device}: {'described' if result.online else 'removed'}")
            if result.incompatibility is None:
                return False
        line = f"{result.device}: {'online' if result.online else 'offline'}"
        if result.incompatibility is not None:
            line = f"device {result.device} {result.incompatibility}"
        if self._known.get(result.device) != line:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[result.device] = line
            self._on_log("state", line)
            return result.online and result.kind == "status"
        return False


@contextmanager
def _disk_errors(data: Path) -> Iterator[None]:
    """Say in one line that a file cannot be written; only the user can help."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the data folder {data} cannot be used ({error}); check its permissions and the free space on its disk"
        ) from error


def _host_names(listen: str, given: Sequence[str]) -> list[str]:
    """The names under which clients find this server: those that are given, else the address or all of this machine."""
    if given or is_loopback(listen):
        return list(given)
    if ipaddress.ip_address(listen).is_unspecified:
        return own_addresses()
    return [listen]
