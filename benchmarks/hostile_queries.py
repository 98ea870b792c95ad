"""What hostile queries cost the others: ingest, the library's queries, and a client with a harmless query of its own.

python benchmarks/hostile_queries.py [--devices 2000] [--rate 2000] [--seconds 15] [--port PORT]

A server process in memory of this machine's disk ingests status updates at the offered rate, first alone, then while
eight connections fire queries without a pause that nest too deep, double a text 28 times, or multiply the graph by
itself. All clients are processes of their own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tinyfleet.edge.wire.messages import Status, encode_status
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.http.access import Access
from tinyfleet.ontology.http.endpoint import Endpoint
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.column_index import IndexedStore

FLEET = "home"
TOPICS = Topics(FLEET)
HOSTILE = [
    "ASK { FILTER(" + "(" * 5000 + "1" + ")" * 5000 + ") }",
    "ASK { FILTER(" + "!" * 10_000 + "true) }",
    "SELECT ?v28 { BIND('xxxxxxxxxxxxxxxx' AS ?v0) "
    + " ".join(f"BIND(CONCAT(?v{i}, ?v{i}) AS ?v{i + 1})" for i in range(28)) + " }",
    "SELECT (COUNT(*) AS ?n) { ?a ?b ?c . ?d ?e ?f . ?g ?h ?i . ?j ?k ?l }",
]  # fmt: skip
HARMLESS = "PREFIX tf: <https://w3id.org/tinyfleet#> SELECT ?d { ?d tf:deviceId 'dev-7' }"


def post(url: str, query: str) -> int:
    content = urllib.parse.urlencode({"query": query}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, content), timeout=60) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def attack(url: str, first: int, answers: Any) -> None:
    """One hostile connection, until it is terminated."""
    while True:
        for query in HOSTILE[first:] + HOSTILE[:first]:
            answers.put(post(url, query))


def clock(url: str, query: str, pause: float, times: Any) -> None:
    """A client that asks the same over and over, until it is terminated. Each time in seconds."""
    while True:
        began = time.monotonic()
        status = post(url, query)
        times.put((status, time.monotonic() - began))
        time.sleep(pause)


def drained(queue: Any) -> list[Any]:
    found = []
    while not queue.empty():
        found.append(queue.get())
    return found


def measure(registry: Registry, url: str, rate: int, seconds: float, devices: int, attackers: int) -> dict[str, Any]:
    """Ingest at the rate, with clients and attackers beside it."""
    context = multiprocessing.get_context("spawn")
    queues = {name: context.Queue() for name in ("library", "harmless", "hostile")}
    clients = [
        context.Process(target=clock, args=(url, library.text("devices"), 0.02, queues["library"]), daemon=True),
        context.Process(target=clock, args=(url, HARMLESS, 0.1, queues["harmless"]), daemon=True),
        *(
            context.Process(target=attack, args=(url, i % len(HOSTILE), queues["hostile"]), daemon=True)
            for i in range(attackers)
        ),
    ]
    for client in clients:
        client.start()
    deadline = time.monotonic() + 60
    while any(queues[name].empty() for name in ("library", "harmless")) and time.monotonic() < deadline:
        time.sleep(0.1)
    for queue in queues.values():
        drained(queue)
    statuses = [encode_status(Status(online=bool(i % 2), model=bytes(8))) for i in range(2)]
    began, sent, accepted = time.monotonic(), 0, registry.accepted
    while (now := time.monotonic() - began) < seconds:
        due = int(now * rate) - sent
        if due > 0:
            batch = min(due, 200)
            registry.ingest([(TOPICS.status(f"dev-{(sent + i) % devices}"), statuses[(sent + i) // devices % 2])
                             for i in range(batch)])  # fmt: skip
            sent += batch
        else:
            time.sleep(0.001)
    elapsed = time.monotonic() - began
    for client in clients:
        client.terminate()
    times = {name: [took for status, took in drained(queues[name]) if status == 200] for name in ("library", "harmless")}
    answers = drained(queues["hostile"])
    return {
        "ingested_per_s": (registry.accepted - accepted) / elapsed,
        "library_p99_ms": 1e3 * sorted(times["library"])[int(0.99 * len(times["library"]))],
        "library_queries": len(times["library"]),
        "harmless_worst_s": max(times["harmless"], default=float("inf")),
        "harmless_queries": len(times["harmless"]),
        "hostile_answers": {str(status): answers.count(status) for status in sorted(set(answers))},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2000)
    parser.add_argument("--rate", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, IndexedStore(Path(folder) / "graph") as store:
        registry = Registry(store, FLEET)
        with Endpoint(store, Access.open()) as endpoint:
            described = threading.Thread(target=describe, args=(registry, args.devices))
            described.start()
            described.join()
            runs = {
                name: measure(registry, endpoint.url, args.rate, args.seconds, args.devices, attackers)
                for name, attackers in (("alone", 0), ("attacked", 8))
            }
    if args.json:
        print(json.dumps(runs, indent=2))
        return
    table = Table(title=f"{args.devices} devices, {args.rate} status updates a second offered")
    for column in ("", "alone", "attacked by 8 connections", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, digits in (("ingested_per_s", 0), ("library_p99_ms", 1), ("harmless_worst_s", 3)):
        alone, attacked = (runs[run][name] for run in ("alone", "attacked"))
        table.add_row(name, f"{alone:,.{digits}f}", f"{attacked:,.{digits}f}", f"{attacked / alone:.2f}")
    console = Console()
    console.print(table)
    console.print(f"answers to hostile queries by status: {runs['attacked']['hostile_answers']}")


def describe(registry: Registry, devices: int) -> None:
    """Every device announces itself."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from ontology_fixtures import description, payload

    for first in range(0, devices, 500):
        registry.ingest(
            [
                (TOPICS.td(f"dev-{i}"), payload(description(f"dev-{i}", FLEET)))
                for i in range(first, min(first + 500, devices))
            ]
        )


if __name__ == "__main__":
    main()
