"""Killed in mid-write, the graph keeps all that was acknowledged, whole, and answers again at once; and a reader
does not block the writer."""

import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from conftest import free_port, plain_broker, start_mosquitto

from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.messages import Status, encode
from tinyfleet.edge.wire.mqtt_session import Receipt, Session
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.store.column_index import IndexedStore
from tinyfleet.ontology.store.remote_store import RemoteStore
from tinyfleet.ontology.store.store import EmbeddedStore, Store
from tinyfleet.ontology.vocabulary.namespaces import TF, device_iri

DEVICES = 40
TOPICS = Topics("home")
SAMPLES = f"SELECT ?d ?n WHERE {{ ?d <{TF.samplesLearned}> ?n }}"
WRITER = """
import sys
from tinyfleet.edge.wire.messages import Status, encode
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.store.column_index import IndexedStore
from tinyfleet.ontology.ingest.registry import Registry

path, first, devices = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with IndexedStore(path) as store:
    registry, topics = Registry(store, "home"), Topics("home")
    for n in range(first, 1 << 30):
        # All devices in one transaction: a reader finds them at the same number.
        taken = registry.ingest([(topics.status(f"d{i}"), encode(Status(True, bytes(8), n))) for i in range(devices)])
        assert all(one.rejection is None for one in taken)
        print(n, flush=True)
"""
SERVER = """
import sys, threading
from pathlib import Path
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.server.fleet_server import FleetServer

server = FleetServer(Path(sys.argv[1]), "home", broker=BrokerAddress("127.0.0.1", int(sys.argv[2]), tls=False))
print("ready", flush=True)
threading.Event().wait()
"""


def start(program: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def samples(store: Store) -> dict[str, object]:
    rows = store.query(SAMPLES)
    assert len({row["d"] for row in rows}) == len(rows), "a device with two values of one thing"
    return {str(row["d"]): row["n"] for row in rows}


def test_what_was_written_before_the_kill_is_there_and_whole(tmp_path: Path) -> None:
    rng = random.Random(0)
    last = 0
    for _ in range(12):
        writer = start(WRITER, tmp_path / "graph", last + 1, DEVICES)
        for _ in range(rng.randint(1, 40)):
            said = int(line(writer))
        os.kill(writer.pid, signal.SIGKILL)  # from outside, at an arbitrary point
        assert writer.stdout is not None
        said = max([said, *map(int, writer.stdout.read().split())])
        writer.wait()
        with EmbeddedStore(tmp_path / "graph") as store:
            found = samples(store)
        assert set(found) == {device_iri("home", f"d{i}") for i in range(DEVICES)}
        (n,) = set(found.values())  # a transaction is there whole or not at all
        assert n in (said, said + 1)  # the one after the last that was told of may be there, too
        last = int(str(n))
    with IndexedStore(tmp_path / "graph") as store:
        assert store.wait() and store.indexed
        assert samples(store) == found, "an index that was not saved with this graph must not be taken for its"


def test_what_the_broker_was_told_is_in_the_graph_when_the_server_is_killed(tmp_path: Path) -> None:
    port, data = free_port(), tmp_path / "data"
    broker = start_mosquitto(tmp_path, port)
    devices = Session(plain_broker(port), "devices")
    rng, n = random.Random(1), 0
    try:
        for _ in range(5):
            server = start(SERVER, data, port)
            assert line(server) == "ready\n"
            for _ in range(rng.randint(1, 400)):
                n += 1  # retained, as devices send it: what was not acknowledged, the next server gets
                devices.publish(TOPICS.status(f"d{n % 20}"), encode(Status(True, bytes(8), n)), retain=True)
            os.kill(server.pid, signal.SIGKILL)
            server.wait()
        assert devices.flush(60)
        server = start(SERVER, data, port)
        assert line(server) == "ready\n"
        at = json.loads((data / "server.json").read_text())
        graph = RemoteStore(at["endpoint"], at["token"])
        wanted = {device_iri("home", f"d{k % 20}"): k for k in range(max(1, n - 19), n + 1)}
        deadline = time.monotonic() + 60
        while (found := samples(graph)) != wanted and time.monotonic() < deadline:
            pass
        assert found == wanted
        server.kill()
        server.wait()
    finally:
        devices.close()
        broker.terminate()
        broker.wait()


def test_the_broker_is_told_when_the_message_is_safe_and_not_before(broker: BrokerAddress) -> None:
    """mosquitto has at most 20 messages under way to a client that has not acknowledged them."""
    came: queue.Queue[tuple[bytes, Receipt | None]] = queue.Queue()
    server = Session(broker, "server", on_delivery=lambda _topic, payload, receipt: came.put((payload, receipt)))
    server.subscribe("x")
    server.publish("x", b"subscribed")
    server.received([came.get(timeout=30)[1]])
    device = Session(broker, "device", on_message=lambda _topic, payload: ready.put(payload))
    ready: queue.Queue[bytes] = queue.Queue()
    device.subscribe("ready")
    for i in range(30):
        device.publish("x", b"%d" % i)
    first = [came.get(timeout=30) for _ in range(20)]
    device.publish("ready", b"")  # all 30 are with the broker when this comes back
    ready.get(timeout=30)
    assert came.empty()
    server.received(receipt for _, receipt in first)
    rest = [came.get(timeout=30) for _ in range(10)]
    assert [payload for payload, _ in first + rest] == [b"%d" % i for i in range(30)]
    server.close()
    device.close()


def test_a_long_query_holds_up_no_update_and_sees_none_of_it(tmp_path: Path) -> None:
    with IndexedStore(tmp_path / "graph") as store:
        registry = Registry(store, "home")
        registry.ingest([(TOPICS.status(f"d{i}"), encode(Status(True, bytes(8), 0))) for i in range(150)])
        began, ended = threading.Event(), threading.Event()
        answer: list[object] = []

        def ask() -> None:
            began.set()
            # 3 million solutions, which take a second at least.
            rows = store.query(
                f"SELECT (SUM(?a * ?b * ?c) AS ?n) WHERE {{ "
                f"?x <{TF.samplesLearned}> ?a . ?y <{TF.samplesLearned}> ?b . "
                f"?z <{TF.samplesLearned}> ?c }}"
            )
            answer.extend(rows.column("n"))
            ended.set()

        asking = threading.Thread(target=ask)
        asking.start()
        began.wait()
        n = 0
        while not ended.is_set() and n < 10:
            n += 1
            registry.ingest([(TOPICS.status(f"d{i}"), encode(Status(True, bytes(8), n))) for i in range(150)])
        assert n == 10, "the updates were over before the query was"
        assert set(samples(store).values()) == {10}
        asking.join()
        (cube,) = answer  # of the sum of all samples at one moment, at which every device had said as much
        assert cube in {(150 * k) ** 3 for k in range(11)}
