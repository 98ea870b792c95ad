"""The knowledge graph at scale: fleets on real boards, what they cost, and how long the questions take.

python benchmarks/graph.py --devices 10000 100000
python benchmarks/graph.py --devices 10000 --store http://127.0.0.1:7878   # a server of SPARQL 1.1, such as oxigraph's

Each size is loaded, asked and updated in a process of its own, so that memory is that of a store that has just been
opened; each query of the library is asked in one that is forked from it, and ended when it takes longer than --limit.
What a step finds is printed to stderr as it ends, and all of it in tables at the end. Figures are wall-clock, and
depend on what else the machine does; --json has the numbers.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyoxigraph as ox
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tinyfleet.edge.device.thing_description import Board, thing_description
from tinyfleet.edge.model.graph import Layer
from tinyfleet.edge.wire.messages import Status, encode
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.firmware_tools.boards import catalogue as board_files
from tinyfleet.ontology.ingest.describe import ModelDescription, board_facts, model_facts
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.column_index import IndexedStore
from tinyfleet.ontology.store.columns import Range
from tinyfleet.ontology.store.store import EmbeddedStore, Facts, RemoteStore, Store, Value, parameters, term, triples
from tinyfleet.ontology.vocabulary.namespaces import (
    PROV,
    RDF,
    TD,
    TF,
    Iri,
    board_iri,
    device_iri,
    round_iri,
    run_iri,
    version_iri,
)
from tinyfleet.server.fleet_server import FleetServer

FLEET, MODELS, SEED = "home", 200, 0
ROUND_OF = 9 / 10  # of the devices, that took part in the last round
SEEN = "https://w3id.org/tinyfleet/property/"
RDFLIB_MOST, NESTED_MOST = 10_000, 2_000
BUDGET = 3.0  # seconds that a question is asked again and again
LIMIT = 20.0  # seconds that a query of the library may take, unless --limit says otherwise
STATUSES = 20_000
P = """PREFIX prov: <http://www.w3.org/ns/prov#> PREFIX schema: <https://schema.org/>
PREFIX td: <https://www.w3.org/2019/wot/td#> PREFIX tf: <https://w3id.org/tinyfleet#>
"""
FITTING = f"""?board tf:ramBytes ?ram ; tf:flashBytes ?flash ; tf:observes <{SEEN}temperature> , <{SEEN}acceleration> .
FILTER(?ram >= 128000 && ?flash >= 512000)"""
HAVE = P + f"SELECT ?device WHERE {{ {FITTING} ?device tf:board ?board }}"
FIRST = HAVE + " LIMIT 100"
BEST = (
    P  # the device first, in a query of its own: else Oxigraph goes through all devices that have the model's engine
    + """SELECT ?model ?name ?takes WHERE {
  { SELECT ?engine ?arena ?board ?flash WHERE {
    VALUES ?device { UNDEF }
    ?device tf:engine ?engine ; tf:arenaBytes ?arena ; tf:board ?board . ?board tf:flashBytes ?flash .
  } }
  ?model a tf:Model ; tf:engine ?engine ; tf:runRamBytes ?takes ; tf:storageBytes ?storage ; schema:name ?name .
  FILTER(?arena >= ?takes && ?flash >= ?storage)
  FILTER NOT EXISTS { ?model tf:inputProperty ?missing . FILTER NOT EXISTS { ?board tf:observes ?missing } }
} ORDER BY DESC(?takes) ?model LIMIT 10"""
)
FOUND = (
    P
    + f"""SELECT ?device ?title WHERE {{ ?board tf:observes <{SEEN}acceleration> ; tf:mcu ?mcu .
  ?device tf:board ?board ; tf:arenaBytes ?arena ; td:title ?title FILTER(?arena >= 65536) }} LIMIT 10"""
)
SEARCH = (
    P
    + """SELECT ?device ?title WHERE { ?device td:title ?title ; a tf:Device
  FILTER(CONTAINS(LCASE(?title), "no. 4321")) } LIMIT 10"""
)
VERSIONS = P + "SELECT ?version (COUNT(?d) AS ?n) WHERE { ?d tf:engineVersion ?version } GROUP BY ?version"


# ------------------------------------------------------------------------------------------------------- the fleet


def real_boards() -> list[tuple[Board, list[str]]]:
    """The catalogue's boards, and what each one's sensors observe; without the data, the project's own."""
    folder = os.environ.get("TINYFLEET_DATA")
    if not folder:
        return [(board_files.load_board(name).board, []) for name in board_files.board_ids()]
    found: dict[str, tuple[Board, list[str]]] = {}
    for core in json.loads((Path(folder) / "boards/core_boards.json").read_text(encoding="utf-8")):
        parts = tuple(dict.fromkeys(sensor["part"] for sensor in core["sensors"]))
        seen = sorted({name for sensor in core["sensors"] for name in sensor["observes"]})
        size = core["clock_hz"], core["ram_bytes"], core["flash_bytes"]
        found[core["id"]] = Board(core["id"], core["name"], core["mcu"], *size, parts), seen
    with (Path(folder) / "boards/platformio_boards.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if not row["ram_note"]:  # the others' sizes are suspect
                size = int(row["clock_hz"]), int(row["ram_bytes"]), int(row["flash_bytes"])
                found.setdefault(row["id"], (Board(row["id"], row["name"], row["mcu"], *size), []))
    return list(found.values())


def models() -> list[ModelDescription]:
    """Models from 2 KB to 512 KB of RAM, evenly on a logarithmic scale."""
    rng = random.Random(SEED)
    found = []
    for i in range(MODELS):
        ram = int(2048 * 256 ** (i / (MODELS - 1)))
        layers = tuple(
            Layer(f"layer-{n}", "dense", (64,), (64,), 4096, 4160, "float32", True) for n in range(rng.randint(2, 8))
        )
        found.append(
            ModelDescription(
                f"model {i}", "mote", f"{i:016x}" + "0" * 48, ram, layers, (64,), (64,), "mote",
                ram, int(ram * rng.uniform(1.1, 3)), ram * rng.randint(1, 4),
            )
        )  # fmt: skip
    return found


def shared_facts() -> dict[Iri, dict[Iri, Any]]:
    """What is said once: boards, models, the last round."""
    rng = random.Random(SEED)
    facts: dict[Iri, dict[Iri, Any]] = {}
    for board, seen in real_boards():
        facts |= board_facts(board)
        facts[board_iri(board.id)][TF.observes] = [Iri(SEEN + name) for name in seen]
    for model in models():
        facts |= model_facts(model)
        if rng.random() < 0.5:
            facts[model.iri][TF.inputProperty] = [Iri(SEEN + rng.choice(["sound", "acceleration", "temperature"]))]
    run, about, version = run_iri(FLEET, 1), round_iri(FLEET, 1, 1), version_iri(FLEET, 1, 0)
    facts[run] = {RDF.type: [TF.Run], TF.fleet: FLEET, TF.runNumber: 1, TF.strategy: "FedAvg",
                  TF.ofModel: models()[0].iri, PROV.startedAtTime: "2026-01-02T00:00:00Z"}  # fmt: skip
    facts[about] = {RDF.type: TF.Round, TF.inRun: run, TF.roundNumber: 1, PROV.used: version,
                    PROV.endedAtTime: "2026-01-02T00:01:00Z"}  # fmt: skip
    facts[version] = {RDF.type: TF.ModelVersion, TF.ofModel: models()[0].iri, TF.versionNumber: 0,
                      TF.sha256: "0" * 64, PROV.wasGeneratedBy: run}  # fmt: skip
    return facts


def name_of(i: int) -> str:
    return f"dev-{i:07d}"


class Fleet:
    """Device i as its Thing Description and its status say it, in N-Triples; the same for every run."""

    def __init__(self) -> None:
        self._boards = [board for board, _ in real_boards()]
        self._models = [model.iri for model in models()]
        text = {name: str(term(TF[name])) for name in (
            "Device", "Participation", "fleet", "deviceId", "board", "engine", "engineVersion", "arenaBytes", "model",
            "online", "currentModel", "samples", "malformed", "stale", "battery", "drift", "inRound", "device", "loss",
            "bytesUp",
        )}  # fmt: skip
        self._t = text | {"a": str(term(RDF.type)), "Thing": str(term(TD.Thing)), "title": str(term(TD.title)),
                          "Association": str(term(PROV.Association)), "agent": str(term(PROV.agent))}  # fmt: skip

    def board(self, i: int) -> Board:
        return self._boards[random.Random(2 * i).randrange(len(self._boards))]

    def facts(self, i: int) -> dict[Iri, dict[Iri, Any]]:
        rng = random.Random(2 * i)
        board = self._boards[rng.randrange(len(self._boards))]
        model = rng.choice(self._models)
        return {
            device_iri(FLEET, name_of(i)): {
                RDF.type: [TD.Thing, TF.Device], TD.title: f"Device no. {i}", TF.fleet: FLEET, TF.deviceId: name_of(i),
                TF.board: board_iri(board.id), TF.engine: "mote", TF.engineVersion: f"0.{rng.randrange(6)}.0",
                TF.arenaBytes: max(1, board.ram_bytes * rng.randint(1, 8) // 8), TF.model: model,
                TF.online: rng.random() < 0.9, TF.currentModel: model, TF.samplesLearned: rng.randrange(100_000),
                TF.malformedMessages: 0, TF.staleMessages: rng.randrange(3), TF.battery: rng.randrange(101) / 128,
                TF.drift: rng.randrange(1024) / 1024,
            }
        }  # fmt: skip

    def part(self, i: int) -> str:
        rng = random.Random(2 * i + 1)
        if rng.random() >= ROUND_OF:
            return ""
        t, device, about = self._t, f"<{device_iri(FLEET, name_of(i))}>", round_iri(FLEET, 1, 1)
        p = f"<{about}:{name_of(i)}>"
        samples, loss, up = (
            _text(v, type(v).__name__) for v in (rng.randrange(1000), rng.randrange(1024) / 1024, 9000)
        )
        return (
            f"{p} {t['a']} {t['Participation']} .\n{p} {t['a']} {t['Association']} .\n{p} {t['inRound']} <{about}> .\n"
            f"{p} {t['device']} {device} .\n{p} {t['agent']} {device} .\n{p} {t['loss']} {loss} .\n"
            f"{p} {t['samples']} {samples} .\n{p} {t['bytesUp']} {up} .\n"
        )

    def text(self, i: int) -> str:
        return ntriples(self.facts(i)) + self.part(i)


@lru_cache(1 << 18)
def _text(value: Value, _: str) -> str:
    return str(term(value))


def ntriples(facts: Facts) -> str:
    return "".join(f"<{s}> <{p}> {_text(o, type(o).__name__)} .\n" for s, p, o in triples(facts))


def check_fleet() -> None:
    """The benchmark's devices are those that the registry writes."""
    fleet, i = Fleet(), 7
    (said,) = fleet.facts(i).values()
    td = thing_description(FLEET, name_of(i), fleet.board(i), "mote", said[TF.engineVersion], said[TF.arenaBytes],
                           bytes.fromhex(said[TF.model][-16:])) | {"title": said[TD.title]}  # fmt: skip
    counters = said[TF.samplesLearned], said[TF.malformedMessages], said[TF.staleMessages]
    status = Status(True, bytes.fromhex(said[TF.model][-16:]), *counters,
                    said[TF.battery], said[TF.drift])  # fmt: skip
    with EmbeddedStore() as written, EmbeddedStore() as made:
        registry, topics = Registry(written, FLEET), Topics(FLEET)
        for topic, payload in ((topics.td(name_of(i)), json.dumps(td).encode()),
                               (topics.status(name_of(i)), encode(status))):  # fmt: skip
            if not registry.ingest_one(topic, payload):
                raise SystemExit(f"the benchmark's fleet is out of date: {registry.last_rejection}")
        made.write({device_iri(FLEET, name_of(i)): said | {TF.online: True}})
        ask = f"SELECT ?p ?o WHERE {{ <{device_iri(FLEET, name_of(i))}> ?p ?o }}"
        ours, theirs = ({str(row) for row in store.query(ask)} for store in (made, written))
        if not ours <= theirs:
            raise SystemExit(f"the benchmark's fleet is out of date: the registry does not write {ours - theirs}")


class _Stream(io.RawIOBase):
    """Text that is made as it is read."""

    def __init__(self, parts: Iterator[str]) -> None:
        self._parts, self._rest = parts, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            text = next(self._parts, None)
            if text is None:
                return 0
            self._rest = text.encode()
        n = min(len(buffer), len(self._rest))
        buffer[:n], self._rest = self._rest[:n], self._rest[n:]
        return n


# --------------------------------------------------------------------------------------------------------- measuring


def rss() -> float:
    """MB, as Linux counts them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def answers(ask: Callable[[str], Any], query: str) -> list[Any]:
    """All of them, at once."""
    return list(ask(query))


def repeat(question: Callable[[], Any]) -> dict[str, Any]:
    """The question asked for a while: median and 99th percentile in ms, how often, and how long the answer is."""
    seconds, end, answer = list[float](), time.perf_counter() + BUDGET, None
    while not seconds or (time.perf_counter() < end and len(seconds) < 500):
        began = time.perf_counter()
        answer = question()
        seconds.append(time.perf_counter() - began)
    seconds.sort()
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "p99_ms": 1e3 * seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))],
        "times": len(seconds),
        "rows": len(answer) if answer is not None and hasattr(answer, "__len__") else None,
    }


def load(folder: Path, n: int) -> dict[str, Any]:
    fleet = Fleet()
    devices = track(range(n), f"{n} devices: loading", console=Console(stderr=True), transient=True)
    began = time.perf_counter()
    parts = (text for source in ([ntriples(shared_facts())], (fleet.text(i) for i in devices)) for text in source)
    store = ox.Store(str(folder / "graph"))
    store.bulk_load(io.BufferedReader(_Stream(parts), 1 << 20), ox.RdfFormat.N_TRIPLES)
    store.flush()
    seconds = time.perf_counter() - began
    del store
    return {"load_s": seconds, "disk_mb": size_of(folder / "graph")}


def load_remote(store: Store, n: int) -> dict[str, Any]:
    fleet = Fleet()
    began = time.perf_counter()
    store.update(f"INSERT DATA {{\n{ntriples(shared_facts())}}}")
    for i in track(range(0, n, 1000), f"{n} devices: loading", console=Console(stderr=True), transient=True):
        store.update(f"INSERT DATA {{\n{''.join(fleet.text(j) for j in range(i, min(i + 1000, n)))}}}")
    return {"load_s": time.perf_counter() - began}


def size_of(folder: Path) -> float:
    """MB."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def index(folder: Path, n: int) -> dict[str, Any]:
    """The index is built from the graph, and saved; then the store is opened as after a restart."""
    began = time.perf_counter()
    with IndexedStore(folder / "graph") as store:
        store.query(FIRST)
        first = time.perf_counter() - began
        store.wait()
        built = time.perf_counter() - began
        before = rss()
    return {"first_answer_without_index_s": first, "index_built_s": built, "memory_while_built_mb": before,
            "index_mb": (folder / "graph.index").stat().st_size / 1e6}  # fmt: skip


def questions(store: Store, n: int, limit: float) -> dict[str, Any]:
    """The goals' questions, then the library's, each of these in a process of its own."""
    rng = random.Random(SEED)
    names = [name_of(rng.randrange(n)) for _ in range(1000)]
    picked = iter(names * 10)
    best, by_version = library.text("models-for-device"), library.text("versions")
    asked: dict[str, Callable[[], Any]] = {
        "which devices have the RAM, flash and sensors: the first 100": lambda: store.query(FIRST),
        "best models for a device": lambda: store.query(best, id=next(picked), fleet=FLEET),
        "ten models that fit a device, in SPARQL": lambda: store.query(BEST, device=device_iri(FLEET, next(picked))),
        "a device by its id": lambda: store.query(
            "SELECT ?p ?o { VALUES ?s { UNDEF } ?s ?p ?o }", s=device_iri(FLEET, next(picked))
        ),
        "Thing Description search, by sensor and arena": lambda: store.query(FOUND),
        "Thing Description search, by a word of the title": lambda: store.query(SEARCH),
        "devices by engine version": lambda: store.query(by_version, fleet=FLEET),
        "devices by engine version, in SPARQL": lambda: store.query(VERSIONS),
    }
    if isinstance(store, IndexedStore):
        asked["Thing Description search, by a word of the title, in SPARQL"] = lambda: list(store.on_graph(SEARCH))
        asked["which devices have the RAM, flash and sensors: all of them"] = lambda: store.select(
            {TF.board: store.query(P + f"SELECT ?board WHERE {{ {FITTING} }}").column("board")}
        )
        asked["which devices are online with drift above 0.9: all of them"] = lambda: store.select(
            {TF.online: [True], TF.drift: Range(0.9)}
        )
    found: dict[str, Any] = {}
    for name, ask in asked.items():
        found[name] = repeat(ask)
        tell({name: found[name]})
    model = models()[20].iri
    bound: dict[str, Any] = {"fleet": FLEET, "model": model, "running": model, "id": name_of(n // 2), "run": 1}
    for name in library.names():
        text = library.text(name)
        given = {key: value for key, value in bound.items() if key in parameters(text)}
        ask_it = store.construct if "\nCONSTRUCT " in text else store.query
        ways = {f"library: {name}": given}
        if "id" in given and name != "models-for-device":
            ways = {f"library: {name}, of one device": given, f"library: {name}": given | {"id": None}}
        for title, chosen in ways.items():
            said = {key: value for key, value in chosen.items() if value is not None}
            found[title] = within(limit, partial(repeat, partial(ask_it, text, **said)))
            tell({title: found[title]})
    return found


def within(limit: float, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is measured in a process forked from this one; if it takes longer, by more than what `repeat` may, only
    that it does. Oxigraph cannot be told to stop, a process can."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(measure() | {"peak_memory_mb": rss()}).encode())
        finally:
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], limit + BUDGET)
    answer = os.read(reader, 4096) if ready else b""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    found: dict[str, Any] = json.loads(answer) if answer else {"over_limit_s": limit}
    return found


def tell(found: dict[str, Any]) -> None:
    """What has been found, as it is found, so that a run that is cut has said something."""
    for name, value in found.items():
        if name == "questions":
            tell(value)
            continue
        if isinstance(value, dict):
            value = shown(value)
        print(
            f"  {name}: {value:,.2f}" if isinstance(value, float) else f"  {name}: {value}", file=sys.stderr, flush=True
        )


def shown(question: dict[str, Any]) -> str:
    """Median and 99th percentile in ms."""
    if "over_limit_s" in question:
        return f"over {question['over_limit_s']:.0f} s"
    return f"{question['median_ms']:,.1f} / {question['p99_ms']:,.1f}"


def ask(folder: Path, n: int, limit: float) -> dict[str, Any]:
    began = time.perf_counter()
    with IndexedStore(folder / "graph") as store:
        opened = time.perf_counter() - began
        store.query(FIRST)
        first = time.perf_counter() - began
        indexed = store.indexed
        store.wait()
        answers = questions(store, n, limit)
        return {"open_s": opened, "first_answer_s": first, "indexed_at_once": indexed, "memory_mb": rss(),
                "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
                "questions": answers}  # fmt: skip


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
        for seed in (3, 4, 5):
            fleet = subprocess.Popen(
                [sys.executable, __file__, "--publish", *map(str, (*server.broker, n, STATUSES, seed))],
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


# ------------------------------------------------------------------------------------------------------- comparisons


def in_rdflib(n: int) -> dict[str, Any]:
    import rdflib

    fleet, before = Fleet(), rss()
    text = ntriples(shared_facts()) + "".join(fleet.text(i) for i in range(n))
    began = time.perf_counter()
    graph = rdflib.Graph().parse(data=text, format="nt")
    found: dict[str, Any] = {"load_s": time.perf_counter() - began, "memory_mb": rss() - before, "triples": len(graph)}
    device = device_iri(FLEET, name_of(n // 2))
    asked = {
        "which devices have the RAM, flash and sensors: the first 100": FIRST,
        "ten models that fit a device, in SPARQL": BEST.replace(
            "VALUES ?device { UNDEF }", f"VALUES ?device {{ <{device}> }}"
        ),
        "Thing Description search, by a word of the title": SEARCH,
        "devices by engine version, in SPARQL": VERSIONS,
    }
    found["questions"] = {name: repeat(partial(answers, graph.query, q)) for name, q in asked.items()}
    samples = rdflib.URIRef(TF.samplesLearned)
    began = time.perf_counter()
    for i in range(1000):
        graph.set((rdflib.URIRef(device_iri(FLEET, name_of(i % n))), samples, rdflib.Literal(i)))
    found["updates_per_s alone"] = 1000 / (time.perf_counter() - began)
    return found


def in_s3n(n: int) -> dict[str, Any]:
    """The same devices in S3N's nested form, where every device says what its board has; and the same question."""
    fleet = Fleet()
    seen = {board.id: names for board, names in real_boards()}
    spaces = {
        "s3n": "http://w3id.org/s3n/", "s3ne": "http://w3id.org/s3n/extend#", "schema": "https://schema.org/",
        "sosa": "http://www.w3.org/ns/sosa/", "ssn": "http://www.w3.org/ns/ssn/",
        "sys": "http://www.w3.org/ns/ssn/systems/",
    }  # fmt: skip
    prefixes = "".join(f"PREFIX {name}: <{iri}>\n" for name, iri in spaces.items())  # in Turtle 1.1 as in SPARQL
    parts = [prefixes]
    for i in range(n):
        board = fleet.board(i)
        parts.append(f"<{device_iri(FLEET, name_of(i))}> a s3n:SmartSensor ;\n")
        parts += [f"  ssn:hasSubSystem [ a sosa:Sensor ; sosa:observes <{SEEN}{name}> ] ;\n" for name in seen[board.id]]
        parts.append(
            "  ssn:hasSubSystem [ a s3n:MicroController ; s3n:hasSystemCapability [\n"
            f"    sys:hasSystemProperty [ a s3ne:Flash ; schema:unitCode 'BYTE' ; schema:value {board.flash_bytes} ] ;"
            f"    sys:hasSystemProperty [ a s3ne:RAM ; schema:unitCode 'BYTE' ; schema:value {board.ram_bytes} ] ] ] ."
        )
    question = (
        prefixes
        + f"""SELECT DISTINCT ?device WHERE {{
      ?device ssn:hasSubSystem [ sosa:observes <{SEEN}temperature> ] , [ sosa:observes <{SEEN}acceleration> ] ,
        [ s3n:hasSystemCapability ?able ] .
      ?able sys:hasSystemProperty [ a s3ne:RAM ; schema:value ?ram ] , [ a s3ne:Flash ; schema:value ?flash ] .
      FILTER(?ram >= 128000 && ?flash >= 512000) }}"""
    )
    found = {}
    flat_text = ntriples({s: said for s, said in shared_facts().items() if TF.ramBytes in said})
    flat_text += "".join(
        f"<{device_iri(FLEET, name_of(i))}> <{TF.board}> <{board_iri(fleet.board(i).id)}> .\n" for i in range(n)
    )
    for name, text, form, query in (
        ("nested", "".join(parts), ox.RdfFormat.TURTLE, question),
        ("flat", flat_text, ox.RdfFormat.N_TRIPLES, HAVE),
    ):
        store, before = ox.Store(), rss()
        began = time.perf_counter()
        store.load(text.encode(), form)
        took = time.perf_counter() - began
        answer = repeat(partial(answers, store.query, query))
        found[name] = {"load_s": took, "triples": len(store), "memory_mb": rss() - before, **answer}
    return found


# ------------------------------------------------------------------------------------------------------------ report


def apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The function's result, from a fresh process."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def embedded(folder: Path, n: int, limit: float, say: Callable[[str], None]) -> dict[str, Any]:
    known = folder / "loaded.json"
    found: dict[str, Any] = {}

    def step(what: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        say(f"{n} devices: {what}")
        part = apart(function, folder, n, *arguments)
        tell({name: value for name, value in part.items() if name != "questions"})
        found.update(part)

    if known.exists():
        found = json.loads(known.read_text())
        tell(found)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        step("loading", load)
        step("building the index", index)
        known.write_text(json.dumps(found))
    step("asking", ask, limit)
    step("updating", updates)
    if shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin"):
        step("end to end from MQTT", end_to_end)
    return found


def measure(sizes: list[int], url: str, kept: Path | None, limit: float, say: Callable[[str], None]) -> dict[str, Any]:
    check_fleet()
    report: dict[str, Any] = {"boards": len(real_boards()), "models": MODELS, "sizes": {}}
    for n in sizes:
        if url == "embedded":
            with tempfile.TemporaryDirectory() as folder:
                found = embedded((kept or Path(folder)) / str(n), n, limit, say)
        else:
            with RemoteStore(f"{url}/query", update_url=f"{url}/update", timeout=600) as store:
                store.update("CLEAR ALL")
                found = load_remote(store, n)
                found["questions"] = questions(store, n, limit)
                found |= remote_updates(store, n) | descriptions(store, n)
        report["sizes"][n] = found
    if url == "embedded":
        say(f"rdflib, {RDFLIB_MOST} devices")
        report["rdflib"] = {"devices": RDFLIB_MOST, **apart(in_rdflib, min(RDFLIB_MOST, max(sizes)))}
        tell(report["rdflib"])
        say(f"S3N's nested form, {NESTED_MOST} devices")
        report["s3n"] = {"devices": NESTED_MOST, **apart(in_s3n, NESTED_MOST)}
    return report


def show(report: dict[str, Any], console: Console) -> None:
    sizes = report["sizes"]

    def table(title: str, rows: list[tuple[str, Callable[[dict[str, Any]], str]]]) -> None:
        grid = Table(title=title, title_justify="left")
        grid.add_column("devices")
        for n in sizes:
            grid.add_column(f"{n:,}", justify="right")
        if "rdflib" in report:
            grid.add_column(f"rdflib, {report['rdflib']['devices']:,}", justify="right")
        for name, cell in rows:
            columns = [*sizes.values(), *([report["rdflib"]] if "rdflib" in report else [])]
            grid.add_row(name, *(cell(found) for found in columns))
        console.print(grid)

    def number(key: str, form: str = ",.1f") -> Callable[[dict[str, Any]], str]:
        return lambda found: format(found[key], form) if key in found else ""

    table(
        f"{report['boards']} boards, {report['models']} models",
        [
            ("load, s", number("load_s")),
            ("on disk, MB", number("disk_mb", ",.0f")),
            ("index built from the graph, s", number("index_built_s")),
            ("restart to first answer, s", number("first_answer_s", ".2f")),
            ("the same without a valid index, s", number("first_answer_without_index_s", ".2f")),
            ("memory after the questions, MB", number("memory_mb", ",.0f")),
            ("devices coming online a second, registry to store", number("updates_per_s at first", ",.0f")),
            ("checked updates a second of devices online, registry to store", number("updates_per_s alone", ",.0f")),
            ("the same beside a query that scans the graph", number("updates_per_s beside a long query", ",.0f")),
            ("devices coming online a second, end to end from MQTT", number("end_to_end_first_per_s", ",.0f")),
            ("processor time of the server for each, µs", number("cpu_us_per_first_status", ",.0f")),
            ("checked updates a second of devices online, end to end from MQTT", number("end_to_end_per_s", ",.0f")),
            ("processor time of the server for each, µs", number("cpu_us_per_status", ",.0f")),
            ("checked Thing Descriptions a second", number("descriptions_per_s", ",.0f")),
            ("server's start until all are marked offline, s", number("all_offline_s", ".1f")),
            ("memory of the server after that, MB", number("server_memory_mb", ",.0f")),
        ],
    )

    def latency(name: str) -> Callable[[dict[str, Any]], str]:
        def cell(found: dict[str, Any]) -> str:
            q = found["questions"].get(name)
            return shown(q) if q else ""

        return cell

    names = list(dict.fromkeys(name for found in sizes.values() for name in found["questions"]))
    table("Questions: median / 99th percentile, ms", [(name, latency(name)) for name in names])
    if "s3n" in report:
        grid = Table(title=f"Which devices have it, of {report['s3n']['devices']:,}", title_justify="left")
        for heading in ("form", "triples", "load, s", "memory, MB", "median, ms", "rows"):
            grid.add_column(heading, justify="left" if heading == "form" else "right")
        for form in ("nested", "flat"):
            found = report["s3n"][form]
            grid.add_row(form, f"{found['triples']:,}", f"{found['load_s']:.2f}", f"{found['memory_mb']:.0f}",
                          f"{found['median_ms']:.2f}", str(found["rows"]))  # fmt: skip
        console.print(grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[10_000, 100_000], help="sizes of fleets")
    parser.add_argument("--store", default="embedded", help="embedded, or the address of a server with /query, /update")
    parser.add_argument("--keep", type=Path, help="a folder for the loaded fleets, which a later run finds there")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that a query of the library may take")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--publish", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.publish:
        publish(args.publish[0], *map(int, args.publish[1:]))
        return
    progress = Console(stderr=True)
    report = measure(
        sorted(args.devices), args.store, args.keep, args.limit, lambda line: progress.print(f"[dim]{line}[/dim]")
    )
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report, Console(highlight=False, width=None if sys.stdout.isatty() else 160))


if __name__ == "__main__":
    main()
