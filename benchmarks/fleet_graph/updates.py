"""Updates of the graph a second: from the registry to the store, and end to end from MQTT."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fleet_graph.fleet import FLEET, Fleet, models, name_of
from fleet_graph.measuring import rss
from tinyfleet.edge.device.thing_description import thing_description
from tinyfleet.edge.wire.messages import Status, encode
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.store.column_index import IndexedStore
from tinyfleet.ontology.store.store import Store
from tinyfleet.ontology.vocabulary.namespaces import TF
from tinyfleet.server.fleet_server import FleetServer

SCRIPT = Path(__file__).parents[1] / "graph.py"
STATUSES = 20_000


def updates(folder: Path, n: int) -> dict[str, Any]:
    with IndexedStore(folder / "graph") as store:
        return {**beside_a_long_query(store, n), **descriptions(store, n)}


def statuses(n: int, count: int, seed: int) -> list[tuple[str, bytes]]:
    """Statuses as devices send them, one each of devices picked at random, the same for every seed. All of them have
    drifted: the first of a device that had not begins an event, and ends its absence if it was offline."""
    rng, topics = random.Random(seed), Topics(FLEET)
    model = [bytes.fromhex(model.iri[-16:]) for model in models()]
    picked = random.Random(0).choices(range(n), k=count)
    return [
        (
            topics.status(name_of(i)),
            encode(Status(True, rng.choice(model), rng.randrange(2**20), 0, rng.randrange(3), rng.random(), 0.5)),
        )
        for i in picked
    ]


def _ask_until(stop: threading.Event, store: Store, query: str) -> None:
    while not stop.is_set():
        store.query(query)


def beside_a_long_query(store: IndexedStore, n: int) -> dict[str, Any]:
    """Checked updates a second, in batches of 200: of devices that come online, that go on, and that go on while
    another thread's query scans the whole graph."""
    registry = Registry(store, FLEET)
    count = 10_000
    rates = {}
    long = "SELECT (COUNT(?o) AS ?n) WHERE { ?s ?p ?o }"
    for seed, (name, query) in enumerate((("at first", None), ("alone", None), ("beside a long query", long))):
        stop = threading.Event()
        thread = threading.Thread(target=_ask_until, args=(stop, store, query))
        if query is not None:
            thread.start()
        messages = statuses(n, count, seed)
        began, slowest = time.perf_counter(), 0.0
        for i in range(0, count, 200):
            at = time.perf_counter()
            registry.ingest(messages[i : i + 200])
            slowest = max(slowest, time.perf_counter() - at)
        rates[f"updates_per_s {name}"] = count / (time.perf_counter() - began)
        rates[f"slowest_batch_ms {name}"] = 1e3 * slowest
        stop.set()
        if query is not None:
            thread.join()
    return rates


def descriptions(store: Store, n: int) -> dict[str, Any]:
    """Thing Descriptions a second, read as JSON-LD and checked against their shapes, in batches of 50."""
    fleet, registry, topics = Fleet(), Registry(store, FLEET), Topics(FLEET)
    messages = []
    for i in range(min(n, 500)):
        (said,) = fleet.facts(i).values()
        td = thing_description(FLEET, name_of(i), fleet.board(i), "mote", "0.7.0", said[TF.arenaBytes], bytes(8))
        messages.append((topics.td(name_of(i)), json.dumps(td).encode()))
    began = time.perf_counter()
    for i in range(0, len(messages), 50):
        registry.ingest(messages[i : i + 50])
    return {"descriptions_per_s": len(messages) / (time.perf_counter() - began)}


def remote_updates(store: Store, n: int) -> dict[str, Any]:
    registry, count = Registry(store, FLEET), 2000
    messages = statuses(n, count, 1)
    began = time.perf_counter()
    for i in range(0, count, 200):
        registry.ingest(messages[i : i + 200])
    return {"updates_per_s alone": count / (time.perf_counter() - began)}


# --------------------------------------------------------------------------------------------------- end to end


def publish(host: str, port: int, n: int, count: int, seed: int) -> None:
    """`count` statuses at QoS 1, retained, over one connection, at most 1,000 unacknowledged: a fleet's."""
    packets = []
    for i, (topic, payload) in enumerate(statuses(n, count, seed)):
        body = len(topic).to_bytes(2, "big") + topic.encode() + (1 + i % 65_535).to_bytes(2, "big") + payload
        if len(body) > 127:
            raise SystemExit("a status longer than one byte of length can say")
        packets.append(bytes([0x33, len(body)]) + body)
    print("ready", flush=True)
    sys.stdin.readline()
    with socket.create_connection((host, port)) as broker:
        name = f"fleet-{seed}".encode()
        body = b"\0\4MQTT\4\2\0\0" + len(name).to_bytes(2, "big") + name
        broker.sendall(bytes([0x10, len(body)]) + body)
        broker.recv(4)
        sent = acknowledged = 0
        while acknowledged < 4 * count:
            room = min(count, acknowledged // 4 + 1000)
            if room - sent >= 200 or room == count:
                broker.sendall(b"".join(packets[sent:room]))
                sent = room
            acknowledged += len(broker.recv(4096))


def end_to_end(folder: Path, n: int) -> dict[str, Any]:
    """A server on this graph, its own mosquitto, and publishers in another process: statuses a second until all are in
    the graph and acknowledged, of devices that come online and then of the same once more, twice."""
    with ExitStack() as stack:
        began = time.perf_counter()
        server = stack.enter_context(FleetServer(folder, FLEET, port=0))
        ready = time.perf_counter() - began
        online = f"ASK {{ ?d <{TF.online}> true }}"
        while server.store.ask(online):
            time.sleep(0.05)
        settled = time.perf_counter() - began
        rates, used = [], []
        where = server.broker.host, server.broker.port
        for seed in (3, 4, 5):
            fleet = subprocess.Popen(
                [sys.executable, SCRIPT, "--publish", *map(str, (*where, n, STATUSES, seed))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert fleet.stdin is not None and fleet.stdout is not None
            fleet.stdout.readline()
            goal = server.registry.accepted + STATUSES
            began, cpu = time.perf_counter(), time.process_time()
            fleet.stdin.write(b"go\n")
            fleet.stdin.close()
            while server.registry.accepted < goal:
                time.sleep(0.005)
            rates.append(STATUSES / (time.perf_counter() - began))
            used.append(1e6 * (time.process_time() - cpu) / STATUSES)
            fleet.wait()
        return {"broker": server.broker_kind, "server_ready_s": ready, "all_offline_s": settled,
                "end_to_end_first_per_s": rates[0], "end_to_end_per_s": max(rates[1:]), "end_to_end_runs": rates,
                "cpu_us_per_first_status": used[0], "cpu_us_per_status": min(used[1:]),
                "server_memory_mb": rss(), "refused": server.registry.rejected}  # fmt: skip
