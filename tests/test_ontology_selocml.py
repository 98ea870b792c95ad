"""The devices and models of SeLoC-ML's authors, imported; and queries in their vocabulary, asked of their graph as they
published it, of the import, and of boards, devices and models that this project describes by itself."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyoxigraph as ox
import pytest
import typer
from ontology_fixtures import description, open_store, payload
from typer.testing import CliRunner

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.firmware_tools.readers.model_file import read_model_file
from tinyfleet.ontology.cli import query
from tinyfleet.ontology.graph_cli import app
from tinyfleet.ontology.ingest import board_catalogue, describe
from tinyfleet.ontology.ingest.describe import from_graph, put_facts, put_model
from tinyfleet.ontology.ingest.model_card import find_model_card
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.ingest.selocml import Imported, read_selocml
from tinyfleet.ontology.store.store import EmbeddedStore, Store, each, rows, triples
from tinyfleet.ontology.vocabulary import shapes
from tinyfleet.ontology.vocabulary.namespaces import TF, board_iri, device_iri

PREFIXES = """PREFIX nnet: <https://w3id.org/tinyml-schema/neural-network-schema#>
PREFIX om: <http://www.ontology-of-units-of-measure.org/resource/om-2/>
PREFIX rdfs: <http://www.w3.org/2000/01/rdf-schema#>
PREFIX s3n: <http://w3id.org/s3n/>
PREFIX s3n_extend: <https://w3id.org/tinyml-schema/neural-network-schema/s3n_extend/>
PREFIX schema: <https://schema.org/>
PREFIX sosa: <http://www.w3.org/ns/sosa/>
PREFIX sosa_extend: <https://w3id.org/tinyml-schema/neural-network-schema/sosa_extend/>
PREFIX ssn: <http://www.w3.org/ns/ssn/>
PREFIX ssn_extend: <https://w3id.org/tinyml-schema/neural-network-schema/ssn_extend/>
PREFIX systems: <http://www.w3.org/ns/ssn/systems/>
PREFIX td: <https://www.w3.org/2019/wot/td#>
"""
MEMORY = """
  ?device ssn:hasSubSystem [ a s3n:MicroController ; s3n:hasSystemCapability ?capability ] .
  ?capability systems:hasSystemProperty ?hasRam, ?hasFlash .
  ?hasRam a s3n_extend:RAM ; schema:value ?ram ; schema:unitCode om:kilobyte .
  ?hasFlash a s3n_extend:Flash ; schema:value ?flash ; schema:unitCode om:kilobyte .
"""
NEEDS = """
  ?network s3n:hasProcedureFeature/systems:inCondition ?needsRam, ?needsFlash .
  ?needsRam a s3n_extend:RAM ; schema:minValue ?ram ; schema:unitCode om:kilobyte .
  ?needsFlash a s3n_extend:Flash ; schema:minValue ?flash ; schema:unitCode om:kilobyte .
"""
DEVICES_FOR_A_MOTION_MODEL = f"""{PREFIXES}SELECT DISTINCT ?title ?ram ?flash WHERE {{
  ?device a s3n:SmartSensor ; td:title ?title ; ssn:hasSubSystem ?accelerometer, ?gyroscope .
  ?accelerometer a sosa_extend:Accelerometer . ?gyroscope a sosa_extend:Gyroscope .
  {MEMORY} FILTER(?ram >= 116.5 && ?flash >= 531.6)
}}"""
DEVICES_WITH_THEIR_SENSORS = f"""{PREFIXES}SELECT DISTINCT ?title ?text ?kind ?ram ?flash WHERE {{
  ?device a s3n:SmartSensor ; td:title ?title ; td:description ?text ; ssn:hasSubSystem [ a ?kind ] .
  ?kind rdfs:subClassOf sosa:Sensor .
  {MEMORY}
}}"""
MODELS_FOR_A_CAMERA = f"""{PREFIXES}SELECT DISTINCT ?id ?macs ?ram ?flash ?text WHERE {{
  ?network a nnet:NeuralNetwork ; schema:identifier ?id ; schema:description ?text ; ssn:hasInput ?input ;
           nnet:hasMultiplyAccumulateOps ?macs .
  ?camera a sosa_extend:Camera ; ssn_extend:provideInput ?input .
  {NEEDS} FILTER(?ram <= 144 && ?flash <= 621)
}}"""
MODELS_THAT_HEAR_YES_AND_NO = f"""{PREFIXES}SELECT DISTINCT ?id ?score ?macs ?ram ?flash WHERE {{
  ?network a nnet:NeuralNetwork ; schema:identifier ?id ; schema:description ?text ; ssn:hasInput ?input ;
           nnet:hasCategory nnet:Classification ; nnet:trainingDataset ?data ; nnet:hasMetric ?metric ;
           nnet:hasMultiplyAccumulateOps ?macs .
  ?metric a nnet:Top_1_accuracy ; nnet:hasMetricValue ?score .
  ?microphone a sosa_extend:Microphone ; ssn_extend:provideInput ?input .
  {NEEDS} FILTER(?score > 0)
  FILTER(REGEX(?text, "yes/no", "i") && REGEX(STR(?data), "speech_commands", "i"))
}}"""
CONVOLUTIONS_OF_INT8 = f"""{PREFIXES}SELECT ?id (COUNT(DISTINCT ?layer) AS ?layers) WHERE {{
  ?network a nnet:NeuralNetwork ; schema:identifier ?id ; nnet:inputLayer|nnet:middleLayer|nnet:outputLayer ?layer .
  ?layer a nnet:Layer ; nnet:hasType nnet:Conv2D ; nnet:hasQuantization nnet:Int8 .
}} GROUP BY ?id"""
OUTPUTS = f"""{PREFIXES}SELECT ?id ?in ?out WHERE {{
  ?network a nnet:NeuralNetwork ; schema:identifier ?id ; ssn:hasInput/nnet:hasInputInfo ?in ;
           ssn:hasOutput/nnet:hasOutputInfo ?out .
}}"""
QUERIES = {
    "devices for a motion model": DEVICES_FOR_A_MOTION_MODEL,
    "devices with their sensors": DEVICES_WITH_THEIR_SENSORS,
    "models for a camera": MODELS_FOR_A_CAMERA,
    "models that hear yes and no": MODELS_THAT_HEAR_YES_AND_NO,
    "convolutions of int8": CONVOLUTIONS_OF_INT8,
    "inputs and outputs": OUTPUTS,
}


def data(folder: str) -> Path:
    path = Path(os.environ.get("TINYFLEET_DATA", "")) / folder
    if "TINYFLEET_DATA" not in os.environ or not path.is_dir():
        pytest.skip(f"TINYFLEET_DATA has no {folder}/")
    return path


@pytest.fixture(scope="module")
def imported() -> Imported:
    return read_selocml(sorted(data("seloc_ml").glob("*.ttl")))


def answers(graph: ox.Store | Store, query: str) -> list[tuple[Any, ...]]:
    """The rows, sorted: numbers to a byte, texts without the white space around them."""
    found = rows(graph.query(query)) if isinstance(graph, ox.Store) else graph.query(query)  # type: ignore[arg-type]
    tidy = [tuple(round(v, 3) if isinstance(v, float | int) else str(v).strip() for v in row.values()) for row in found]
    return sorted(set(tidy))


@pytest.fixture(scope="module")
def published() -> ox.Store:
    """Their graph as it is published."""
    graph = ox.Store()
    for file in data("seloc_ml").glob("*.ttl"):
        graph.extend(
            ox.Quad(q.subject, q.predicate, q.object)
            for q in ox.parse(path=str(file), format=ox.RdfFormat.TURTLE, lenient=True, rename_blank_nodes=True)
        )
    return graph


@pytest.fixture(scope="module")
def catalogue() -> Any:
    return board_catalogue.read_board_catalogue(data("boards")).facts


def test_the_known_defects_are_found_and_mended(imported: Imported) -> None:
    assert (imported.devices, imported.models) == (9, 23)
    times: Counter[str] = Counter()
    for defect in imported.defects:
        times[defect.kind] += defect.times
    assert times["0 for unknown"] == 12
    assert times["shape as text"] == 2 * 23
    assert times["wrong IRI"] == 1
    undefined = {defect.subject for defect in imported.defects if defect.kind == "undefined term"}
    assert len(undefined) == 10
    assert all(defect.fix for defect in imported.defects)


def test_what_is_imported_conforms_and_is_flat(imported: Imported) -> None:
    assert shapes.violations(triples(imported.facts)) == []
    with EmbeddedStore() as store:
        put_facts(store, imported.facts)
        before = len(store)
        put_facts(store, imported.facts)
        assert len(store) == before
        flat = store.query(
            """PREFIX tf: <https://w3id.org/tinyfleet#> PREFIX schema: <https://schema.org/>
            SELECT * { ?m schema:name "Squats_Counter" ; tf:macs ?macs ; tf:runRamBytes ?ram ; tf:storageBytes ?flash ;
                       tf:inputShape/<http://www.w3.org/1999/02/22-rdf-syntax-ns#first> ?size .
                       FILTER NOT EXISTS { ?m tf:metric ?score } }"""
        )
        assert [{k: v for k, v in row.items() if k != "m"} for row in flat] == [
            {"macs": 3780, "ram": 2224, "flash": 17_048, "size": 60}
        ]
        fits = store.query(
            """PREFIX tf: <https://w3id.org/tinyfleet#>
            SELECT DISTINCT ?id { ?d tf:deviceId ?id ; tf:board ?b . ?b tf:ramBytes ?ram ; tf:observes ?p .
              ?m tf:inputProperty ?p ; tf:runRamBytes ?takes . FILTER(?takes <= ?ram) } ORDER BY ?id"""
        ).column("id")
        assert "MS200_1" in fits and "targetv_1" not in fits


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_for_their_graph_finds_the_same_in_the_import(
    imported: Imported, published: ox.Store, name: str
) -> None:
    theirs = answers(published, QUERIES[name])
    with EmbeddedStore() as store:
        put_facts(store, imported.facts)
        ours = answers(store, QUERIES[name])
    # Corrected: what the board with the wrong IRI has, and how they spelt an operator.
    more = [row for row in ours if row not in theirs]
    assert [row for row in theirs if row not in ours] == []
    assert len(more) == (1 if name == "devices with their sensors" else 0), more
    assert theirs, "the query finds something"


@pytest.mark.parametrize("kind", ["memory", "remote"])
def test_a_query_for_their_graph_answers_on_ours(kind: str, catalogue: Any, tmp_path: Path) -> None:
    models = data("tflite")
    for name, card in {"vww_96_int8": CAMERA, "kws_ref_model": WORDS}.items():
        (tmp_path / f"{name}.tflite").write_bytes((models / f"mlperf_tiny__{name}.tflite").read_bytes())
        (tmp_path / f"{name}.md").write_text(card, encoding="utf-8")
    with open_store(kind, tmp_path) as store:
        put_facts(store, few(catalogue))
        registry = Registry(store, "home")
        for device, board in (("sense", "nano33ble"), ("lab", "nicla_vision"), ("bare", "pico")):
            td = description(device, tf__board={"@id": f"https://w3id.org/tinyfleet/board/{board}"})
            assert registry.ingest_one(Topics("home").td(device), payload(td | {"title": device})), (
                registry.last_rejection
            )
        for name in ("vww_96_int8", "kws_ref_model"):
            path = tmp_path / f"{name}.tflite"
            about = from_graph(read_model_file(path).model, find_model_card(path))
            put_model(store, describe.replace(about, engine="mote", run_ram_bytes=100_000))
        found = {name: answers(store, query) for name, query in QUERIES.items()}
    assert found["devices for a motion model"] == [("lab", 523.624, 786.432)]
    kinds = {(row[0], row[2].rpartition("/")[2]) for row in found["devices with their sensors"]}
    assert {("sense", "Microphone"), ("sense", "Thermometer"), ("lab", "Gyroscope"), ("lab", "Camera")} <= kinds
    assert "bare" not in {title for title, _ in kinds}
    assert [row[1:4] for row in found["models for a camera"]] == [(7_489_664, 100.0, 333.288)]
    assert [row[1] for row in found["models that hear yes and no"]] == [0.92]
    assert len(found["convolutions of int8"]) == 2
    assert [row[2] for row in found["inputs and outputs"]] == ["0: no, 1: yes"]


CAMERA = """---
license: apache-2.0
pipeline_tag: image-classification
tinyfleet:
  description: finds a person in an image
  observes: image
---
"""
WORDS = """---
pipeline_tag: audio-classification
datasets: [speech_commands]
model-index:
- results:
  - dataset: {name: Speech Commands v2}
    metrics: [{type: accuracy, value: 0.92}]
tinyfleet:
  description: Hears yes/no and ten other words
  observes: [sound]
  input: 49 frames of ten MFCC features
  labels: [no, yes]
---
# Words
"""


def few(facts: Any) -> Any:
    """The facts about the parts, and about a few of the boards."""
    wanted = tuple(f"https://w3id.org/tinyfleet/board/{b}" for b in ("nano33ble", "nicla_vision", "pico"))
    return {s: said for s, said in facts.items() if "/board/" not in s or s.partition("#")[0] in wanted}


def test_the_import_command_reports(tmp_path: Path) -> None:
    folder = str(data("seloc_ml"))
    done = CliRunner().invoke(app, ["import-selocml", folder, "--data", str(tmp_path / "data"), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert (report["devices"], report["models"]) == (9, 23)
    assert {"kind": "wrong IRI", "times": 1}.items() <= {
        key: value for defect in report["defects"] if defect["kind"] == "wrong IRI" for key, value in defect.items()
    }.items()
    done = CliRunner().invoke(app, ["import-selocml", folder, "--out", str(tmp_path / "theirs.ttl")])
    assert done.exit_code == 0 and "9 devices, 23 models" in done.output
    done = CliRunner().invoke(app, ["load", str(tmp_path / "theirs.ttl"), "--data", str(tmp_path / "other")])
    assert done.exit_code == 0, done.output
    with EmbeddedStore(tmp_path / "data/graph") as one, EmbeddedStore(tmp_path / "other/graph") as other:
        assert len(one) == len(other) == report["written"]


def test_devices_go_out_in_their_form_and_come_back(catalogue: Any, tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "graph") as store:
        put_facts(store, few(catalogue))
        td = description("lab", tf__board={"@id": "https://w3id.org/tinyfleet/board/nicla_vision"}, title="lab")
        assert Registry(store, "home").ingest_one(Topics("home").td("lab"), payload(td))
    cli = typer.Typer()
    cli.command()(query)
    done = CliRunner().invoke(cli, ["s3n", "--data", str(tmp_path), "--param", "fleet=home"])
    assert done.exit_code == 0, done.output
    (tmp_path / "out.ttl").write_text(done.stdout, encoding="utf-8")
    back = read_selocml([tmp_path / "out.ttl"], "back")
    board = back.facts[board_iri("seloc-lab")]
    assert board[TF.ramBytes] == 523_624 or board[TF.ramBytes] == [523_624]
    assert set(each(board[TF.sensor])) == {"gc2145", "lsm6dso", "vl53l1x"}
    assert back.facts[device_iri("home", "lab")][TF.fleet] == "back"


def test_what_is_no_such_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ttl").write_text("<urn:a> <urn:b> <urn:c> .")
    with pytest.raises(UserError, match="neither"):
        read_selocml([tmp_path / "a.ttl"])
    (tmp_path / "a.ttl").write_text("@prefix : <urn:> . :a :b")
    with pytest.raises(UserError, match="not Turtle"):
        read_selocml([tmp_path / "a.ttl"])
    (tmp_path / "a.ttl").write_text("<urn:a> a <http://w3id.org/s3n/SmartSensor> .")
    with pytest.raises(UserError, match="does not say its RAM"):
        read_selocml([tmp_path / "a.ttl"])
