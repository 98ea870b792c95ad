"""The shapes: every rule catches what breaks it, and both SHACL engines say the same."""

from datetime import UTC, datetime
from typing import Any

import pytest
from ontology_fixtures import description

from tinyfleet.edge.device.thing_description import VIRTUAL
from tinyfleet.edge.model.graph import Layer
from tinyfleet.ontology.ingest.describe import (
    ModelDescription,
    TrainingOption,
    board_facts,
    model_facts,
    part_facts,
)
from tinyfleet.ontology.ingest.description_parser import to_triples
from tinyfleet.ontology.ingest.model_card import MetricValue, ModelCard
from tinyfleet.ontology.store.store import EmbeddedStore, triples
from tinyfleet.ontology.vocabulary import shapes
from tinyfleet.ontology.vocabulary.namespaces import (
    PROV,
    RDF,
    SCHEMA,
    SOSA,
    TD,
    TF,
    Iri,
    board_iri,
    deployment_iri,
    device_iri,
    drift_iri,
    measurement_iri,
    model_iri,
    option_iri,
    part_iri,
    run_iri,
    update_iri,
)

MODEL = ModelDescription(
    "m",
    "mote",
    "ab" * 32,
    10,
    (Layer("l", "dense", (4, 4), (2,), 8, 10, "float32", True),),
    (4, 4),
    (2,),
    "mote",
    1,
    2,
    3,
    (TrainingOption("l", 1, True, 2, 2),),
    ModelCard(
        pipeline_tag="image-classification", datasets=("d",), scores=(MetricValue("accuracy", 0.9),), labels=("a", "b")
    ),
)
NOW = datetime(2026, 1, 2, tzinfo=UTC)
RUN, ROUND, PART, VERSION = (run_iri("home", 1), *(Iri(f"{run_iri('home', 1)}:{n}") for n in ("round:1", "part", "v")))
M, B, LAYER = model_iri("ab" * 8), board_iri("virtual"), Iri(f"{model_iri('ab' * 8)}#layer-0")
OPTION, SCORE, PARTS = option_iri(M, 1, True), Iri(f"{M}#score-0"), part_iri("hts221")
UPDATE, DEPLOYMENT, DRIFT = (
    update_iri("home", 1, 1, "d"),
    deployment_iri("home", 1),
    drift_iri(device_iri("home", "d"), 1),
)
MEASUREMENT = measurement_iri(M, "virtual", True)
DEVICE = device_iri("home", "d")
GOOD: dict[Iri, dict[Iri, Any]] = {
    **model_facts(MODEL),
    **board_facts(VIRTUAL),
    RUN: {
        RDF.type: TF.Run, TF.fleet: "home", TF.runNumber: 1, TF.strategy: "Reptile", TF.ofModel: M,
        PROV.startedAtTime: NOW,
    },
    ROUND: {
        RDF.type: TF.Round, TF.inRun: RUN, TF.roundNumber: 1, TF.selectedDevices: 3, TF.loss: 0.5, TF.accuracy: 1.0,
        TF.bytesUp: 0, TF.bytesDown: 9, PROV.startedAtTime: NOW, PROV.endedAtTime: NOW,
    },
    PART: {
        RDF.type: TF.Participation, TF.inRound: ROUND, TF.device: device_iri("home", "d"), TF.loss: 0.5,
        TF.accuracy: 0.0, TF.samplesLearned: 4, TF.bytesUp: 0,
    },
    VERSION: {RDF.type: TF.ModelVersion, TF.ofModel: M, TF.versionNumber: 0, TF.sha256: "cd" * 32},
    **part_facts("hts221", ["temperature"]),
    UPDATE: {
        RDF.type: TF.Update, PROV.wasGeneratedBy: ROUND, PROV.wasAttributedTo: DEVICE, TF.bytesUp: 9,
        TF.encoding: "sparse f16", TF.staleness: 0,
    },
    DEPLOYMENT: {
        RDF.type: TF.Deployment, TF.fleet: "home", TF.ofModel: M, TF.target: [DEVICE, device_iri("home", "e")],
        TF.confirmedBy: DEVICE, TF.failedOn: device_iri("home", "e"), TF.triedBy: DEVICE, TF.selectedBy: "clients",
        PROV.startedAtTime: NOW, PROV.endedAtTime: NOW,
    },
    DRIFT: {RDF.type: TF.DriftEvent, TF.device: DEVICE, TF.drift: 3.5, TF.ofModel: M, SOSA.resultTime: NOW},
    MEASUREMENT: {
        RDF.type: TF.Measurement, TF.ofModel: M, TF.onBoard: B, TF.emulated: True, TF.instructions: 22_511,
        TF.latencySeconds: 0.5, TF.energyJoules: 0.5,
    },
    DEVICE: {
        RDF.type: TF.Device, TD.title: "d", TD.description: "a device", TD.hasSecurityConfiguration: "nosec_sc",
        TF.fleet: "home", TF.deviceId: "d", TF.board: B, TF.engine: "mote", TF.engineVersion: "1", TF.arenaBytes: 9,
        TF.model: M,
    },
}  # fmt: skip
RULES: list[tuple[Iri, Iri, list[Any]]] = [
    (B, TD.title, [None, "", ["a", "b"], 5, "x" * 201]),
    (B, TF.boardId, [["a", "b"], 5]),
    (B, TF.mcu, [None, "", 5, "x" * 101]),
    (B, TF.clockHz, [0, -1, 1.5, "64 MHz", [1, 2], 10**12]),
    (B, TF.ramBytes, [None, 0, -1, 1.5, "256 KB", [1, 2], 10**16]),
    (B, TF.flashBytes, [None, 0, -1, 1.5, "1 MB", [1, 2], 10**16]),
    (B, TF.sensor, ["", 5, [f"s{i}" for i in range(65)], "x" * 65]),
    (M, SCHEMA.name, [None, "", 5, ["a", "b"]]),
    (M, TF.format, [None, "onnx", ["mote", "keras"]]),
    (M, TF.sha256, [None, "ab", "AB" * 32, ["ab" * 32, "cd" * 32]]),
    (M, TF.fileBytes, [None, 0, 1.5]),
    (M, TF.engine, [["a", "b"], 5]),
    (M, TF.layer, [None, Iri("urn:not-a-layer")]),
    (M, TF.inputShape, [Iri("urn:list-0"), [Iri("urn:list-1"), RDF.nil]]),
    (M, TF.outputShape, [Iri("urn:list-text")]),
    (M, TF.quantization, [8]),
    *(
        (M, TF[name], [-1, 1.5, "many", [1, 2]])
        for name in ("macs", "parameters", "trainableParameters", "trainableLayers")
    ),
    *((M, TF[name], [0, -1, 1.5, "2 KB", [1, 2]]) for name in ("runRamBytes", "trainRamBytes", "storageBytes")),
    (LAYER, TF["index"], [None, -1, 0.5, [0, 1]]),
    (LAYER, TF.kind, [None, "", 5]),
    (LAYER, TF.inputShape, [Iri("urn:list-0")]),
    (LAYER, TF.outputShape, [Iri("urn:list-text")]),
    (LAYER, TF.macs, [-1, "x"]),
    (LAYER, TF.parameters, [-1, "x"]),
    (LAYER, TF.trainable, ["yes", 1, [True, False]]),
    (RUN, TF.fleet, [None, 5]),
    (RUN, TF.runNumber, [None, -1, "one"]),
    (RUN, TF.strategy, [None, "", 5]),
    (RUN, TF.ofModel, [None, "text", [M, VERSION]]),
    (RUN, PROV.startedAtTime, [None, "now", 5]),
    (ROUND, TF.inRun, [None, "text"]),
    (ROUND, TF.roundNumber, [None, 0, "one"]),
    (ROUND, TF.selectedDevices, [None, -1]),
    (ROUND, TF.loss, [1, "x", [0.5, 0.6]]),
    (ROUND, TF.accuracy, [1.01, -0.01, "x"]),
    (ROUND, TF.bytesUp, [-1, 0.5]),
    (ROUND, TF.bytesDown, [-1, 0.5]),
    (ROUND, PROV.startedAtTime, [None, "now"]),
    (ROUND, PROV.endedAtTime, [None, "now", [NOW, datetime(2027, 1, 1, tzinfo=UTC)]]),
    (PART, TF.inRound, [None, "text"]),
    (PART, TF.device, [None, "text"]),
    (PART, TF.loss, ["x"]),
    (PART, TF.accuracy, [2.5]),
    (PART, TF.samplesLearned, [-1, 0.5]),
    (PART, TF.bytesUp, [-1]),
    (VERSION, TF.ofModel, [None, "text"]),
    (VERSION, TF.versionNumber, [None, -1]),
    (VERSION, TF.sha256, [None, "x"]),
    (VERSION, PROV.wasDerivedFrom, ["text", [M, RUN]]),
    (B, TF.observes, ["temperature", Iri("https://example.org/temperature")]),
    (B, TF.core, ["", 5, ["a", "b"]]),
    (B, TF.connectivity, ["", 5]),
    (B, TF.dataQualityNote, ["external RAM"]),
    (PARTS, TF.partName, [None, "HTS221", ["a", "b"]]),
    (PARTS, SOSA.observes, [None, "temperature", Iri("https://example.org/temperature")]),
    *((M, TF[name], [-1, 1.5, "2 KB", [1, 2]]) for name in ("quantizedRunRamBytes", "quantizedStorageBytes")),
    (M, TF.trainingOption, [Iri("urn:not-an-option"), "text"]),
    (M, TF.inputProperty, ["sound", Iri("https://example.org/sound")]),
    (M, TF.classLabels, [Iri("urn:list-0")]),
    (M, TF.pipelineTag, ["", 5, ["a", "b"]]),
    (M, TF.dataset, ["digits"]),
    (M, TF.metric, [Iri("urn:not-a-score"), 0.5]),
    (OPTION, TF.trainFrom, [None, "", 5, ["a", "b"]]),
    (OPTION, TF.layersTrained, [None, 0, "one"]),
    (OPTION, TF.biasOnly, [None, "yes", [True, False]]),
    (OPTION, TF.trainRamBytes, [None, 0, "2 KB"]),
    (OPTION, TF.trainableParameters, [None, 0, 1.5]),
    (SCORE, TF.metricName, [None, "", 5]),
    (SCORE, TF.metricValue, [None, 1, "0.9"]),
    (LAYER, TF.activation, ["", 5, ["a", "b"]]),
    (UPDATE, PROV.wasGeneratedBy, [None, "text"]),
    (UPDATE, PROV.wasAttributedTo, [None, "text", [DEVICE, M]]),
    (UPDATE, TF.bytesUp, [-1, 0.5]),
    (UPDATE, TF.encoding, ["", 5]),
    (UPDATE, TF.staleness, [-1, 0.5, [1, 2]]),
    (DEPLOYMENT, TF.fleet, [None, 5]),
    (DEPLOYMENT, TF.ofModel, [None, "text", [M, VERSION]]),
    (DEPLOYMENT, TF.target, [None, "d"]),
    (DEPLOYMENT, TF.confirmedBy, ["d", device_iri("home", "e")]),
    (DEPLOYMENT, TF.failedOn, ["e", DEVICE]),
    (DEPLOYMENT, TF.triedBy, ["f", device_iri("home", "e")]),
    (DEPLOYMENT, TF.selectedBy, ["", 5, ["a", "b"]]),
    (DEPLOYMENT, PROV.startedAtTime, [None, "now"]),
    (DEPLOYMENT, PROV.endedAtTime, ["now", [NOW, datetime(2027, 1, 1, tzinfo=UTC)]]),
    (DRIFT, TF.device, [None, "d"]),
    (DRIFT, TF.drift, [None, 3, "3.5"]),
    (DRIFT, TF.ofModel, ["m", [M, VERSION]]),
    (DRIFT, SOSA.resultTime, [None, "now"]),
    (MEASUREMENT, TF.ofModel, [None, "m"]),
    (MEASUREMENT, TF.onBoard, [None, "virtual", [B, M]]),
    (MEASUREMENT, TF.emulated, [None, "yes"]),
    (MEASUREMENT, TF.latencySeconds, [-0.5, "fast"]),
    (MEASUREMENT, TF.energyJoules, [-0.5, "little"]),
    (MEASUREMENT, TF.instructions, [0, 1.5]),
    (DEVICE, TD.description, [5, "x" * 1001, ["a", "b"]]),
    (DEVICE, TF.engine, [None, "Mote!", ["a", "b"]]),
    (DEVICE, TF.engineVersion, [None, "", ["a", "b"]]),
]
LISTS = {
    Iri("urn:list-0"): {RDF.first: 0, RDF.rest: RDF.nil},
    Iri("urn:list-1"): {RDF.first: 1, RDF.rest: RDF.nil},
    Iri("urn:list-text"): {RDF.first: "8x8", RDF.rest: RDF.nil},
}


def lines(facts: Any) -> str:
    return shapes._ntriples(triples(facts))


def test_what_is_right_conforms() -> None:
    assert shapes.violations(triples(GOOD | LISTS)) == []
    assert shapes.violations(to_triples(description())) == []


@pytest.mark.parametrize(
    ("subject", "predicate", "wrong"), RULES, ids=lambda v: str(v).split("#")[-1].split("/")[-1][:20]
)
def test_every_rule_catches_what_breaks_it(subject: Iri, predicate: Iri, wrong: list[Any]) -> None:
    for value in wrong:
        facts = GOOD | LISTS | {subject: GOOD[subject] | {predicate: value}}
        found = shapes.violations(triples(facts))
        assert found, f"{predicate} = {value!r} was let through"
        assert all(len(line) < 200 for line in found)


def test_both_engines_say_the_same() -> None:
    pytest.importorskip("shacl", reason="the shacl wheel is not on this platform")
    pytest.importorskip("pyshacl", reason="pySHACL is not installed")
    cases = [GOOD | LISTS]
    cases += [GOOD | LISTS | {s: GOOD[s] | {p: value}} for s, p, wrong in RULES for value in wrong]
    for facts in cases:
        text = lines(facts)
        assert shapes.by_shacl(text) == shapes.by_pyshacl(text)
    for change in (
        {"title": None},
        {"security": None},
        {"tf:engine": "Mote!"},
        {"tf:arenaBytes": 0},
        {"tf:board": "x"},
    ):
        td = {name: value for name, value in (description() | change).items() if value is not None}
        text = shapes._ntriples(to_triples(td))
        assert shapes.by_shacl(text) == shapes.by_pyshacl(text) != []


def test_nothing_measured_is_0() -> None:
    for predicate in (TF.latencySeconds, TF.energyJoules):
        assert shapes.violations(triples(GOOD | {MEASUREMENT: GOOD[MEASUREMENT] | {predicate: 0.0}}))


def test_what_is_known_only_from_elsewhere_may_leave_more_open() -> None:
    elsewhere = Iri("https://example.org/models/1")
    model = {elsewhere: GOOD[M] | {TF.sha256: None, TF.fileBytes: None, SCHEMA.identifier: "1"}}
    rest = {s: said for s, said in GOOD.items() if s not in (M, DEVICE)}
    device = {DEVICE: GOOD[DEVICE] | dict.fromkeys((TF.engine, TF.engineVersion, TF.arenaBytes, TF.model))}
    assert shapes.violations(triples(rest | model | device)) == []
    for change in ({TF.sha256: "ab" * 32}, {SCHEMA.identifier: None}):
        assert shapes.violations(triples(rest | {elsewhere: model[elsewhere] | change}))
    assert shapes.violations(triples(rest | {Iri("urn:other:model"): model[elsewhere]}))


def test_what_breaks_its_shape_is_not_written() -> None:
    with EmbeddedStore() as store:
        with pytest.raises(shapes.ShapeError) as error:
            shapes.check_and_add(store, "board 'b'", {B: GOOD[B] | {TF.ramBytes: 0}})
        assert str(error.value).startswith("board 'b' cannot be added to the graph: tf:ramBytes")
        assert error.value.violations == ("tf:ramBytes: one whole number of bytes from 1 (not 0)",)
        assert len(store) == 0
