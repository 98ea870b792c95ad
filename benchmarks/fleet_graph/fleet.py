"""The fleets of the graph's benchmark: devices on real boards, and how they are loaded into a store."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyoxigraph as ox
from rich.console import Console
from rich.progress import track

from tinyfleet.edge.device.thing_description import Board, thing_description
from tinyfleet.edge.model.graph import Layer
from tinyfleet.edge.wire.messages import Status, encode
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.firmware_tools.boards import catalogue as board_files
from tinyfleet.ontology.ingest.describe import ModelDescription, board_facts, model_facts
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.store.store import EmbeddedStore, Facts, Store, Value, term, triples
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

FLEET, MODELS, SEED = "home", 200, 0
ROUND_OF = 9 / 10  # of the devices, that took part in the last round
SEEN = "https://w3id.org/tinyfleet/property/"


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
