"""Boards and models described from their own files: the figures, the refusals, the facts."""

import csv
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyoxigraph as ox
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyfleet.edge.device.thing_description import VIRTUAL
from tinyfleet.edge.model.graph import Layer
from tinyfleet.edge.model.layers import Dense, ReLU, build
from tinyfleet.edge.model.program import Program
from tinyfleet.firmware_tools.readers.common import ReadError
from tinyfleet.firmware_tools.readers.model_file import read_model_file
from tinyfleet.ontology.ingest import describe
from tinyfleet.ontology.ingest.describe import ModelDescription
from tinyfleet.ontology.store.store import EmbeddedStore
from tinyfleet.ontology.vocabulary.namespaces import Iri
from tinyfleet.ontology.vocabulary.shapes import ShapeError

PREFIXES = """PREFIX tf: <https://w3id.org/tinyfleet#>
PREFIX rdf: <http://www.w3.org/1999/02/22-rdf-syntax-ns#>
PREFIX schema: <https://schema.org/>
"""


def data(folder: str) -> Path:
    path = Path(os.environ.get("TINYFLEET_DATA", "")) / folder
    if "TINYFLEET_DATA" not in os.environ or not path.is_dir():
        pytest.skip(f"TINYFLEET_DATA has no {folder}/")
    return path


def read_description(path: Path) -> ModelDescription:
    return describe.from_graph(read_model_file(path).model)


def mlp() -> Program:
    return build([Dense(32), ReLU(), Dense(10)], (64,), "softmax_cross_entropy")


# ------------------------------------------------------------------------------------------------------------- boards


def test_a_board_is_described_once() -> None:
    with EmbeddedStore() as store:
        describe.put_board(store, VIRTUAL)
        rows = store.query(
            PREFIXES
            + "SELECT ?ram ?clock { ?b tf:boardId 'virtual' ; tf:ramBytes ?ram OPTIONAL { ?b tf:clockHz ?clock } }"
        )
        assert list(rows) == [{"ram": VIRTUAL.ram_bytes}], "a clock that is not known is absent"
        before = len(store)
        describe.put_board(store, VIRTUAL)
        assert len(store) == before


def test_a_board_that_cannot_be_right_is_refused() -> None:
    with EmbeddedStore() as store:
        with pytest.raises(ShapeError, match="tf:ramBytes: one whole number"):
            describe.put_board(store, replace(VIRTUAL, ram_bytes=0))
        assert len(store) == 0


# ------------------------------------------------------------------------------------------------------------ programs


def test_a_program_tells_everything() -> None:
    program = mlp()
    model = describe.from_program(program, "digits")
    assert (model.macs, model.parameters) == (64 * 32 + 32 * 10, 64 * 32 + 32 + 32 * 10 + 10)
    assert (model.trainable_layers, model.trainable_parameters) == (2, program.n_params)
    assert (model.input_shape, model.output_shape) == ((64,), (10,))
    assert model.train_ram_bytes == program.arena_bytes
    assert model.storage_bytes == len(program.data)
    assert model.iri == f"urn:tinyfleet:model:{program.model_id.hex()}"


def test_a_program_with_a_frozen_layer_says_which_can_train() -> None:
    frozen = mlp()
    weights = frozen.split(frozen.initial(0))
    given_ = {name: value for name, value in weights.items() if name.startswith("dense_0/")}
    program = build([Dense(32), ReLU(), Dense(10)], (64,), "softmax_cross_entropy", trainable=[1], weights=given_)
    model = describe.from_program(program, "head")
    assert [layer.trainable for layer in model.layers if layer.parameters] == [False, True]
    assert (model.trainable_layers, model.trainable_parameters) == (1, 330)


def test_a_model_becomes_facts_that_can_be_asked() -> None:
    with EmbeddedStore() as store:
        iri = describe.put_model(store, describe.from_program(mlp(), "digits"))
        rows = store.query(
            PREFIXES + "SELECT ?i ?kind ?macs ?trainable { VALUES ?m { UNDEF } ?m tf:layer ?l . "
            "?l tf:index ?i ; tf:kind ?kind ; tf:macs ?macs . OPTIONAL { ?l tf:trainable ?trainable } } ORDER BY ?i",
            m=iri,
        )
        assert list(rows) == [
            {"i": 0, "kind": "dense", "macs": 2048, "trainable": True},
            {"i": 1, "kind": "relu", "macs": 0},
            {"i": 2, "kind": "dense", "macs": 320, "trainable": True},
        ]
        shape = PREFIXES + "SELECT ?n { VALUES ?m { UNDEF } ?m tf:inputShape/rdf:rest*/rdf:first ?n }"
        assert store.query(shape, m=iri).column("n") == [64]
        before = len(store)
        assert describe.put_model(store, describe.from_program(mlp(), "digits")) == iri
        assert len(store) == before


def test_what_is_not_known_is_not_said_and_does_not_unsay() -> None:
    layer = Layer("custom", "CUSTOM")
    bare = ModelDescription("bare", "tflite", "ab" * 32, 10, (layer,))
    planned = ModelDescription("bare", "tflite", "ab" * 32, 10, (layer,), train_ram_bytes=100, run_ram_bytes=50)
    with EmbeddedStore() as store:
        describe.put_model(store, bare)
        said = set(store.query("SELECT ?p { <urn:tinyfleet:model:abababababababab> ?p ?o }").column("p"))
        for term in ("macs", "parameters", "trainableLayers", "trainRamBytes", "inputShape", "engine", "quantization"):
            assert Iri(f"https://w3id.org/tinyfleet#{term}") not in said
        describe.put_model(store, planned)
        describe.put_model(store, bare)
        assert store.query(PREFIXES + "SELECT ?n { ?m tf:trainRamBytes ?n }").column("n") == [100]


def test_a_model_that_cannot_be_right_is_refused_whole() -> None:
    with EmbeddedStore() as store:
        for wrong in (
            ModelDescription("m", "onnx", "ab" * 32, 10, (Layer("l", "k"),)),
            ModelDescription("m", "mote", "ab" * 32, 10, ()),
            ModelDescription("m", "mote", "ab" * 32, 10, (Layer("l", "k", input_shape=(0,)),)),
            ModelDescription("m", "mote", "ab" * 32, 10, (Layer("l", "k", macs=-1),)),
            ModelDescription("", "mote", "ab" * 32, 10, (Layer("l", "k"),), train_ram_bytes=0),
        ):
            with pytest.raises(ShapeError, match="model"):
                describe.put_model(store, wrong)
        assert len(store) == 0


# ------------------------------------------------------------------------------------------------------------- .tflite


def test_every_tflite_model_is_described_or_refused_with_a_reason() -> None:
    folder = data("tflite")
    rows = list(csv.DictReader((folder / "manifest.csv").open(encoding="utf-8")))
    refused = {}
    with EmbeddedStore() as store:
        for row in rows:
            try:
                model = read_description(folder / row["file"])
            except ReadError as error:
                refused[row["file"]] = str(error)
                continue
            iri = describe.put_model(store, model)
            assert iri == f"urn:tinyfleet:model:{row['sha256'][:16]}"
            assert len(model.layers) == int(row["operators"]), row["file"]
            assert model.file_bytes == int(row["bytes"])
            batch, *shape = (int(n) for n in row["inputs"].partition("[")[2].partition("]")[0].split(","))
            assert model.input_shape == (tuple(shape) or (batch,)), row["file"]
            assert model.macs is not None and model.macs > 0
            assert model.parameters is not None
            assert model.parameters <= int(row["const_bytes"])
            assert model.quantizations
        assert len(store.query(PREFIXES + "SELECT ?m { ?m a tf:Model }")) == len({r["sha256"] for r in rows}) - len(
            refused
        )
    assert len(rows) == 39
    assert list(refused) == ["tflm__person_detect.tflite"]  # which LiteRT refuses for the same reason
    assert "quantised axis of tensor" in refused["tflm__person_detect.tflite"]


def test_what_the_engine_plans_is_described_with_every_model_that_it_can_run() -> None:
    from tinyfleet.firmware_tools.compiler import compile as compiler
    from tinyfleet.firmware_tools.model_cli import description

    folder = data("tflite")
    planned = 0
    with EmbeddedStore() as store:
        for path in sorted(folder.glob("*.tflite")):
            try:
                model = description(path)
            except ReadError as error:
                assert path.name == "tflm__person_detect.tflite" and str(error)
                continue
            describe.put_model(store, model)
            if model.engine is None:
                assert any("cannot run it" in note for note in model.notes), path.name
                assert (model.run_ram_bytes, model.training_options) == (None, ())
                continue
            planned += 1
            assert model.run_ram_bytes and model.storage_bytes and model.training_options
            for option in model.training_options:
                assert option.ram_bytes >= model.run_ram_bytes
            # Training more layers never takes less.
            full = sorted((o.layers_trained, o.ram_bytes) for o in model.training_options if not o.bias_only)
            assert [ram for _, ram in full] == sorted(ram for _, ram in full)
            assert len({(o.layers_trained, o.bias_only) for o in model.training_options}) == len(model.training_options)
        rows = store.query(PREFIXES + "SELECT DISTINCT ?m { ?m tf:trainingOption ?o }")
        assert len(rows) == len({f"{p}" for p in rows.column("m")})
    assert planned == 32
    # The figures are those of the program that would be compiled.
    path = folder / "mlperf_tiny__kws_ref_model.tflite"
    program = compiler.compile_model(path, train_from="dense")
    (option,) = (o for o in description(path).training_options if o.layers_trained == 1 and not o.bias_only)
    assert (option.train_from, option.ram_bytes) == ("dense", program.arena_bytes)
    assert option.parameters == program.n_params


def test_what_quantisation_would_save_is_estimated_for_float_models_only() -> None:
    model = describe.from_program(mlp(), "digits")
    assert model.quantized_storage_bytes == 64 * 32 + 4 * 32 + 32 * 10 + 4 * 10
    assert model.quantized_run_ram_bytes == 64 + 32
    layers = (Layer("l", "CONV_2D", (4, 4, 1), (2, 2, 8), 8, 80, "int8 per-channel"),)
    int8 = ModelDescription("m", "tflite", "ab" * 32, 10, layers)
    assert (int8.quantized_storage_bytes, int8.quantized_run_ram_bytes) == (None, None)
    unknown = ModelDescription("m", "keras", "ab" * 32, 10, (Layer("l", "Mystery", quantization="float32"),))
    assert (unknown.quantized_storage_bytes, unknown.quantized_run_ram_bytes) == (None, None)


def test_training_options_become_facts_and_stay_when_a_later_description_has_none() -> None:
    options = (
        describe.TrainingOption("dense_2", 1, False, 500, 330),
        describe.TrainingOption("dense_1", 2, True, 400, 42),
    )
    model = describe.replace(describe.from_program(mlp(), "digits"), training_options=options)
    query = (
        PREFIXES
        + """SELECT ?o ?from ?n ?bias ?ram { ?m tf:trainingOption ?o .
      ?o tf:trainFrom ?from ; tf:layersTrained ?n ; tf:biasOnly ?bias ; tf:trainRamBytes ?ram } ORDER BY ?n"""
    )
    with EmbeddedStore() as store:
        iri = describe.put_model(store, model)
        wanted = [
            {"o": f"{iri}:train:1", "from": "dense_2", "n": 1, "bias": False, "ram": 500},
            {"o": f"{iri}:train:2:bias", "from": "dense_1", "n": 2, "bias": True, "ram": 400},
        ]
        assert list(store.query(query)) == wanted
        before = len(store)
        describe.put_model(store, describe.replace(model, training_options=()))
        assert list(store.query(query)) == wanted and len(store) == before
        describe.put_model(store, describe.replace(model, training_options=options[:1]))
        assert list(store.query(query)) == wanted[:1]
        assert not store.ask(f"ASK {{ <{iri}:train:2:bias> ?p ?o }}")


def test_what_describe_prints_can_be_loaded(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from tinyfleet.firmware_tools.model_cli import app as model_app
    from tinyfleet.ontology.graph_cli import app as graph_app

    path = tmp_path / "digits.mote"
    path.write_bytes(mlp().data)
    printed = CliRunner().invoke(model_app, ["describe", str(path)])
    (tmp_path / "digits.ttl").write_text(printed.output, encoding="utf-8")
    assert CliRunner().invoke(graph_app, ["load", str(tmp_path / "digits.ttl"), "--data", str(tmp_path)]).exit_code == 0
    with EmbeddedStore(tmp_path / "graph") as loaded, EmbeddedStore() as store:
        describe.put_model(store, describe.from_program(mlp(), "digits"))
        everything = "SELECT * { ?s ?p ?o } ORDER BY ?s ?p ?o"
        assert list(loaded.query(everything)) == list(store.query(everything))


def test_multiply_accumulates_agree_with_what_the_authors_say() -> None:
    models, authors = data("tflite"), data("seloc_ml") / "tflite_models.ttl"
    graph = ox.Store()
    graph.load(path=str(authors), format=ox.RdfFormat.TURTLE, lenient=True)  # it holds <None>
    rows: Any = graph.query(
        """PREFIX nnet: <https://w3id.org/tinyml-schema/neural-network-schema#>
        PREFIX schema: <https://schema.org/>
        SELECT ?name ?macs { ?m schema:name ?name ; nnet:hasMultiplyAccumulateOps ?macs }"""
    )
    theirs = {row["name"].value: float(row["macs"].value) for row in rows}
    compared = 0
    for name, macs in theirs.items():
        path = models / f"haoyu_r__{name}.tflite"
        if path.exists():
            assert read_description(path).macs == pytest.approx(macs, rel=0.005), name
            compared += 1
    assert compared >= 20


def one_model() -> bytes:
    return (data("tflite") / "tflm__hello_world_int8.tflite").read_bytes()


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8), cut=st.integers()
)
def test_a_damaged_tflite_file_is_described_or_refused(edits: list[tuple[int, int]], cut: int) -> None:
    from tinyfleet.firmware_tools.readers.tflite_reader import read_tflite_model

    raw = bytearray(one_model())
    for place, byte in edits:
        raw[place % len(raw)] = byte
    if cut % 4 == 0:
        del raw[cut % len(raw) :]
    try:
        model = read_tflite_model(bytes(raw), "model")
    except ReadError as error:
        assert "damaged" in str(error)
    else:
        assert model.layers


@pytest.mark.parametrize(
    "content", [b"", b"TFL3", b"\0" * 100, b"\x1c\0\0\0TFL3", b"\xff\xff\xff\xffTFL3" + b"\xff" * 99]
)
def test_what_is_no_tflite_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.tflite").write_bytes(content)
    with pytest.raises(ReadError, match="model"):
        read_description(tmp_path / "model.tflite")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ReadError, match=r"neither a \.tflite nor a \.keras"):
        read_description(tmp_path / "model.onnx")
    with pytest.raises(ReadError, match="there is no file"):
        read_description(tmp_path / "none.tflite")


# -------------------------------------------------------------------------------------------------------------- .keras


def keras_file(folder: Path, layers: list[dict[str, Any]], **config: Any) -> Path:
    path = folder / "model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "config.json", json.dumps({"class_name": "Sequential", "config": {"name": "m", "layers": layers} | config})
        )
    return path


def layer(kind: str, **config: Any) -> dict[str, Any]:
    return {"class_name": kind, "config": {"name": kind.lower(), "trainable": True, "dtype": "float32"} | config}


INPUT = layer("InputLayer", batch_shape=[None, 8, 8, 1])
CONV = {"kernel_size": [3, 3], "strides": [2, 2], "padding": "same", "filters": 4, "use_bias": True}


def test_a_keras_file_tells_layers_and_figures(tmp_path: Path) -> None:
    layers = [
        INPUT,
        layer("Conv2D", **CONV),
        layer("ReLU"),
        layer("Flatten"),
        layer("Dense", units=10, use_bias=True, trainable=False),
    ]
    model = read_description(keras_file(tmp_path, layers))
    assert (model.name, model.format, model.engine) == ("model", "keras", None)
    assert (model.input_shape, model.output_shape) == ((8, 8, 1), (10,))
    assert [one.output_shape for one in model.layers] == [(4, 4, 4), (4, 4, 4), (64,), (10,)]
    assert [one.macs for one in model.layers] == [4 * 4 * 4 * 9, 0, 0, 640]
    assert [one.parameters for one in model.layers] == [40, 0, 0, 650]
    assert [one.trainable for one in model.layers] == [True, None, None, False]
    assert (model.trainable_layers, model.trainable_parameters) == (1, 40)
    with EmbeddedStore() as store:
        describe.put_model(store, model)


def test_a_layer_that_is_not_known_is_listed_without_figures(tmp_path: Path) -> None:
    model = read_description(keras_file(tmp_path, [INPUT, layer("Mystery"), layer("Flatten")]))
    assert [(one.kind, one.parameters) for one in model.layers] == [("Mystery", None), ("Flatten", None)]
    assert (model.macs, model.parameters, model.trainable_parameters) == (None, None, None)
    assert any("Mystery" in note for note in model.notes)


def test_a_broken_keras_file_is_refused(tmp_path: Path) -> None:
    for layers in (
        [],
        [INPUT],
        [INPUT, {"class_name": "Dense"}],
        [INPUT, layer("Dense", units=-1, use_bias=True)],
        [INPUT, layer("Dense", units="many", use_bias=True)],
        [INPUT, layer("Conv2D", **CONV | {"kernel_size": [9, 9], "padding": "valid"})],
        [INPUT, layer("Conv2D", **CONV | {"strides": [0, 0]})],
        [INPUT, layer("Reshape", target_shape=[-1, 0])],
        "layers",
    ):
        with pytest.raises(ReadError, match="model"):
            read_description(keras_file(tmp_path, layers))  # type: ignore[arg-type]
    for content in (b"", b"PK", b"no zip"):
        (tmp_path / "model.keras").write_bytes(content)
        with pytest.raises(ReadError, match=r"is not a \.keras file"):
            read_description(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("other.json", "{}")
    with pytest.raises(ReadError, match="model"):
        read_description(tmp_path / "model.keras")
    for levels, reason in ((10, "nested deeper than 8"), (100, "nests deeper than 64")):
        deep: dict[str, Any] = layer("Flatten")
        for _ in range(levels):
            deep = {"class_name": "Sequential", "config": {"name": "m", "layers": [deep]}}
        with pytest.raises(ReadError, match=reason):
            read_description(keras_file(tmp_path, [INPUT, deep]))
    with zipfile.ZipFile(tmp_path / "model.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", b" " * 20_000_000)
    with pytest.raises(ReadError, match="longer than"):
        read_description(tmp_path / "model.keras")


KERAS = """
import json, sys, keras
from keras import layers as L
def sequential(shape, *layers): return keras.Sequential([L.Input(shape), *layers])
a = L.Input((16,)); b = L.Dense(8)(a); c = L.Dense(8, use_bias=False)(a)
functional = keras.Model(a, L.Dense(2)(L.Concatenate()([L.Add()([b, c]), b])))
models = {
    "cnn": sequential((28, 28, 1), L.Conv2D(8, 3, strides=2, padding="same"), L.DepthwiseConv2D(3),
                      L.BatchNormalization(), L.ReLU(), L.MaxPooling2D(2), L.ZeroPadding2D(1),
                      L.SeparableConv2D(4, 3), L.Conv2DTranspose(2, 3, 2), L.Flatten(),
                      L.Dropout(0.1), L.Dense(32, trainable=False), L.LayerNormalization(), L.Dense(10)),
    "wave": sequential((40, 3), L.Conv1D(4, 3, dilation_rate=2), L.AveragePooling1D(2),
                       L.LSTM(5, return_sequences=True), L.GRU(4, return_sequences=True),
                       L.SimpleRNN(3), L.Reshape((3, 1)), L.GlobalMaxPooling1D()),
    "nested": sequential((8,), sequential((8,), L.Dense(4, activation="relu")), L.Dense(2)),
    "functional": functional,
}
out = {}
for name, model in models.items():
    model.save(f"{sys.argv[1]}/{name}.keras")
    leaves = [l for l in model._flatten_layers(include_self=False) if not isinstance(l, (keras.Model, L.InputLayer))]
    leaves = [l for l in leaves if not type(l).__name__.endswith("Cell")]
    out[name] = [model.count_params(), list(model.output_shape[1:]), {l.name: l.count_params() for l in leaves}]
print(json.dumps(out))
"""


@pytest.mark.slow
def test_keras_files_agree_with_keras(tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="Keras is not installed")
    script = tmp_path / "save.py"
    script.write_text(KERAS)
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    if "No module named" in done.stderr:
        pytest.skip("Keras is not installed")
    assert done.returncode == 0, done.stderr
    for name, (parameters, output, by_layer) in json.loads(done.stdout.splitlines()[-1]).items():
        model = read_description(tmp_path / f"{name}.keras")
        assert {one.name: one.parameters for one in model.layers} == by_layer, name
        assert model.parameters == parameters
        assert model.output_shape == tuple(output)
        assert model.notes == ()
