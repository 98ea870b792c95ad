"""The fleet's server in one object: a broker, the graph on disk, the registry that fills it, a SPARQL endpoint."""

import json
import logging
import os
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from edge.protocol import ProtocolError, Topics, decode_status
from edge.session import Session
from ontology.cli import GRAPH, SERVER
from ontology.endpoint import Endpoint
from ontology.names import fleet_name
from ontology.registry import Registry
from ontology.store import EmbeddedStore, StoreError
from server.broker import Broker

log = logging.getLogger(__name__)


class FleetServer:
    """Runs from its construction until it is closed (or use it in a `with`).

    data: the folder of the graph and of server.json, which tells other commands where the server is, and the token for
    updates; only its owner can read that. broker: one that runs already, or None to start one on `port` (0: a free
    one). endpoint_port: 0 for a free one. on_news: gets one line for whatever a device newly says of itself.

    Raises UserError if a port is taken, no broker is there or installed, or another server has the folder.
    """

    def __init__(
        self,
        data: Path,
        fleet: str,
        *,
        broker: tuple[str, int] | None = None,
        port: int = 1883,
        endpoint_port: int = 0,
        on_news: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.fleet = fleet_name(fleet)
        self.data = data
        self._on_news = on_news
        self._topics = Topics(fleet)
        self._online: dict[str, bool] = {}
        with ExitStack() as stack:
            self.store = stack.enter_context(EmbeddedStore(data / GRAPH))
            if broker is None:
                started = stack.enter_context(Broker(port, data / "broker"))
                self.broker = started.host, started.port
                self.broker_kind = started.kind
            else:
                self.broker, self.broker_kind = broker, "given"
            token = secrets.token_urlsafe(32)
            self.endpoint = stack.enter_context(Endpoint(self.store, token, endpoint_port)).url
            self.token = token
            self.registry = Registry(self.store, fleet)
            self._session: Session | None = None
            name = f"tinyfleet-server-{secrets.token_hex(4)}"
            self._session = Session(*self.broker, name, on_message=self._receive, on_connect=self._connected)
            stack.callback(self._session.close)
            self._connected()
            self._publish_address(data / SERVER)
            stack.callback((data / SERVER).unlink, missing_ok=True)
            self._close = stack.pop_all()

    def __enter__(self) -> "FleetServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops what was started; the graph stays on disk."""
        self._close.close()

    def _connected(self) -> None:
        """Devices that are online have said so at the broker, or will; of all others, such as those whose wills died
        with a broker, nothing is known. Called for every new session; for the first one, maybe twice."""
        if self._session is None:
            return
        self.store.update(
            f"""PREFIX tf: <https://w3id.org/tinyfleet#>
            DELETE {{ ?device tf:online true }} INSERT {{ ?device tf:online false ; tf:offlineSince ?now }}
            WHERE {{ ?device tf:fleet {json.dumps(self.fleet)} ; tf:online true BIND(NOW() AS ?now) }}"""
        )
        self._session.subscribe(self._topics.td("+"))
        self._session.subscribe(self._topics.status("+"))

    def _publish_address(self, path: Path) -> None:
        host, port = self.broker
        address = {"broker": f"{host}:{port}", "endpoint": self.endpoint, "token": self.token, "fleet": self.fleet}
        new = path.with_suffix(".new")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(address, file)
        new.replace(path)

    def _receive(self, topic: str, payload: bytes) -> None:
        """Called by the session's thread."""
        try:
            accepted = self.registry.handle(topic, payload)
        except StoreError as error:
            log.error("a message could not be stored: %s", error)
            return
        found = self._topics.parse(topic)
        if found is None:
            return
        kind, (device,) = found
        if not accepted:
            self._on_news(str(self.registry.last_refusal))
        elif kind == "td":
            self._on_news(f"{device}: described" if payload else f"{device}: removed")
        elif kind == "status":
            try:
                online = decode_status(payload).online
            except ProtocolError:
                return
            if self._online.get(device) != online:
                self._online[device] = online
                self._on_news(f"{device}: {'online' if online else 'offline'}")
