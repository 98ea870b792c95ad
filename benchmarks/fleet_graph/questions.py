"""The questions of the graph's benchmark, and how long a store takes to answer them."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fleet_graph.fleet import FLEET, SEED, SEEN, models, name_of
from fleet_graph.measuring import repeat, rss, tell, within
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.column_index import IndexedStore
from tinyfleet.ontology.store.columns import Range
from tinyfleet.ontology.store.store import Store, parameters
from tinyfleet.ontology.vocabulary.namespaces import TF, device_iri

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
