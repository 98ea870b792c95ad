"""What the tests of the graph share: a Thing Description, and stores of every kind."""

import atexit
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port

from tinyfleet.edge.wire.messages import Status, encode
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.http.access import Access
from tinyfleet.ontology.http.endpoint import Endpoint
from tinyfleet.ontology.store.column_index import IndexedStore
from tinyfleet.ontology.store.remote_store import RemoteStore
from tinyfleet.ontology.store.store import EmbeddedStore, Store

MODEL = bytes.fromhex("0123456789abcdef")
TOKEN = "a token"
TOPICS = Topics("home")
TD = TOPICS.td("dev-1")
NOW = datetime(2026, 1, 2, tzinfo=UTC)


@cache
def oxigraph() -> str:
    """The address of an oxigraph server, in memory; one for all tests."""
    program = Path(sys.executable).with_name("oxigraph")
    if not program.exists():
        pytest.skip("the oxigraph server is not installed: pip install oxigraph")
    port = free_port()
    command = [str(program), "serve", "--bind", f"127.0.0.1:{port}"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    atexit.register(server.kill)
    assert server.stderr is not None
    for line in server.stderr:
        if "Listening" in line:
            break
    threading.Thread(target=server.stderr.read, daemon=True).start()  # a full pipe must not stop it
    return f"http://127.0.0.1:{port}"


@contextmanager
def open_store(kind: str, folder: Path) -> Iterator[Store]:
    """A fresh store: in memory, on disk, our endpoint's over HTTP, or that of another server of SPARQL 1.1."""
    if kind == "oxigraph":
        url = oxigraph()
        with RemoteStore(f"{url}/query", update_url=f"{url}/update") as remote:
            remote.update("CLEAR ALL")
            yield remote
    elif kind == "remote":
        with (
            EmbeddedStore() as served,
            Endpoint(served, Access.of_token(TOKEN, "read")) as endpoint,
            RemoteStore(endpoint.url, TOKEN) as remote,
        ):
            yield remote
    elif kind == "indexed":
        with IndexedStore() as store:
            yield store
    else:
        with EmbeddedStore(folder / "graph" if kind == "disk" else None) as store:
            yield store


def description(device: str = "dev-1", fleet: str = "home", **changes: Any) -> dict[str, Any]:
    """A Thing Description as a device sends it. Changes replace its fields; None takes a field away."""
    td = {
        "@context": ["https://www.w3.org/2022/wot/td/v1.1", {"tf": "https://w3id.org/tinyfleet#"}],
        "id": f"urn:tinyfleet:{fleet}:{device}",
        "@type": ["Thing", "tf:Device"],
        "title": "A device",
        "securityDefinitions": {"nosec_sc": {"scheme": "nosec"}},
        "security": ["nosec_sc"],
        "tf:fleet": fleet,
        "tf:deviceId": device,
        "tf:board": {
            "@id": "https://w3id.org/tinyfleet/board/nano33ble",
            "@type": "tf:Board",
            "title": "Arduino Nano 33 BLE",
            "tf:mcu": "nrf52840",
            "tf:clockHz": 64_000_000,
            "tf:ramBytes": 262_144,
            "tf:flashBytes": 983_040,
            "tf:sensor": ["hts221", "pdm-microphone"],
        },
        "tf:engine": "mote",
        "tf:engineVersion": "0.1.0",
        "tf:arenaBytes": 65_536,
        "tf:model": {"@id": f"urn:tinyfleet:model:{MODEL.hex()}"},
        "actions": {"learn": {"title": "Learn", "forms": [{"href": "mqtt://broker/x", "op": "invokeaction"}]}},
    }
    td |= {name.replace("__", ":"): value for name, value in changes.items()}
    return {name: value for name, value in td.items() if value is not None}


def payload(td: Any) -> bytes:
    return json.dumps(td).encode()


def status(online: bool = True, model: bytes = MODEL, **rest: Any) -> bytes:
    return encode(Status(online, model, **rest))


def everything(store: Store) -> list[tuple[str, ...]]:
    """All triples of a graph without blank nodes, sorted."""
    return sorted(
        (str(row["s"]), str(row["p"]), repr(row["o"])) for row in store.query("SELECT ?s ?p ?o WHERE { ?s ?p ?o }")
    )
