"""The graph's questions elsewhere: in rdflib, and over S3N's nested descriptions."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pyoxigraph as ox

from fleet_graph.fleet import FLEET, SEEN, Fleet, name_of, ntriples, real_boards, shared_facts
from fleet_graph.measuring import answers, repeat, rss
from fleet_graph.questions import BEST, FIRST, HAVE, SEARCH, VERSIONS
from tinyfleet.ontology.vocabulary.namespaces import TF, board_iri, device_iri


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
