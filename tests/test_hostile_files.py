"""Files of anyone's: damaged, or made to cost much. Each is refused in one line, within a second, and little memory."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flatbuffers  # type: ignore[import-untyped]
import numpy as np
import pytest
import tflite  # type: ignore[import-untyped]
from fuzz_targets import CORPUS

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.files import read_file
from tinyfleet.edge.model.layers import Dense, build
from tinyfleet.edge.model.program import read_program
from tinyfleet.firmware_tools.readers.model_file import read_model_file
from tinyfleet.ontology.graph_cli import read_file as read_graph
from tinyfleet.server.cli import _parameters as read_parameters

DESCRIPTION = json.loads((CORPUS / "keras" / "seed_mlp").read_text())
PROGRAM = build([Dense(3)], (4,), "softmax_cross_entropy")


def refused(read: Callable[[], object]) -> str:
    """Why it is refused."""
    began = time.process_time()
    with pytest.raises(UserError) as error:
        read()
    assert time.process_time() - began < 1
    said = str(error.value)
    assert "\n" not in said and len(said) < 500
    return said


def keras_file(
    config: str | bytes | dict[str, Any],
    *,
    compression: int = zipfile.ZIP_DEFLATED,
    metadata: str | bytes = '{"keras_version": "3.10.0"}',
) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("metadata.json", metadata)
        archive.writestr("config.json", json.dumps(config) if isinstance(config, dict) else config)
        archive.writestr("model.weights.h5", bytes(64))
    return file.getvalue()


def changed(index: int, **settings: Any) -> dict[str, Any]:
    """The description of a small model, with other settings of one of its layers."""
    described: dict[str, Any] = json.loads(json.dumps(DESCRIPTION))
    described["config"]["layers"][index]["config"].update(settings)
    return described


def encrypted(data: bytes) -> bytes:
    """All of an archive's parts marked as encrypted, in both of its lists."""
    out = bytearray(data)
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(mark)
        while at >= 0:
            out[at + offset] |= 1
            at = data.find(mark, at + 1)
    return bytes(out)


def flipped(data: bytes) -> bytes:
    """One bit changed in what config.json is packed into."""
    at = data.find(b"config.json") + 60
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def layers_in_each_other(levels: int) -> dict[str, Any]:
    inner = DESCRIPTION
    for number in range(levels):
        inner = {"class_name": "Sequential", "config": {"name": f"m{number}", "layers": [inner]}}
    return inner


def used_again_and_again(levels: int) -> dict[str, Any]:
    """Models in each other, each of which calls the one inside ten times: 10**levels calls."""

    def tensor(name: str, node: int) -> dict[str, Any]:
        return {
            "class_name": "__keras_tensor__",
            "config": {"shape": [None, 4], "dtype": "float32", "keras_history": [name, node, 0]},
        }

    inner: dict[str, Any] = {"class_name": "Activation", "config": {"name": "m", "activation": "tanh"}}
    for level in range(levels):
        name = inner["config"]["name"]
        calls = [tensor("in", 0), *(tensor(name, node) for node in range(9))]
        first = {"class_name": "InputLayer", "config": {"name": "in", "batch_shape": [None, 4]}, "inbound_nodes": []}
        again = {**inner, "inbound_nodes": [{"args": [call]} for call in calls]}
        config = {
            "name": f"m{level}",
            "layers": [first, again],
            "input_layers": [["in", 0, 0]],
            "output_layers": [[name, 9, 0]],
        }
        inner = {"class_name": "Functional", "config": config}
    return inner


GOOD = keras_file(DESCRIPTION)
HOSTILE_KERAS = {
    "empty": (b"", "not a .keras file"),
    "no archive": (b"PK" * 100, "not a .keras file"),
    "cut": (GOOD[: len(GOOD) // 2], "not a .keras file"),
    "a cut list of parts": (GOOD[:-10], "not a .keras file"),
    "encrypted": (encrypted(GOOD), "encrypted"),
    "a flipped bit": (flipped(GOOD), "not a .keras file"),
    "LZMA": (keras_file(DESCRIPTION, compression=zipfile.ZIP_LZMA), "unusual"),
    "bzip2": (keras_file(DESCRIPTION, compression=zipfile.ZIP_BZIP2), "unusual"),
    "a bomb": (keras_file(b" " * 300_000_000), "longer than"),
    "a bomb as metadata": (keras_file(DESCRIPTION, metadata=b" " * 100_000_000), "longer than"),
    "a million parts": (GOOD + b"PK\1\2" * 1_000_000, "members"),
    "no config": (keras_file(b""), "not JSON"),
    "deep JSON": (keras_file(b"[" * 5_000), "nests deeper"),
    "deeper JSON": (keras_file(b"[" * 3_000_000), "values"),
    "deep, and closed": (keras_file(b'{"a":' * 900 + b"1" + b"}" * 900), "nests deeper"),
    "many values": (keras_file(b"[" + b"[]," * 1_000_000 + b"[]]"), "values"),
    "a long integer": (keras_file(json.dumps(DESCRIPTION).replace("32", "9" * 5000)), "integer"),
    "not a number": (keras_file(json.dumps(DESCRIPTION).replace("32", "NaN")), "NaN"),
    "a name twice": (keras_file(b'{"class_name": 1, "class_name": 1}'), "twice"),
    "a list": (keras_file(b"[]"), "damaged"),
    "models nested too deep": (keras_file(layers_in_each_other(12)), "deeper"),
    "a name that clears the terminal": (keras_file(changed(1, name="\x1b[2J")), "printable"),
    "2**62 units": (keras_file(changed(1, units=2**62)), "whole number"),
}


@pytest.mark.parametrize(("data", "reason"), HOSTILE_KERAS.values(), ids=HOSTILE_KERAS)
def test_a_damaged_or_costly_keras_file_is_refused_at_once(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "model.keras"
    path.write_bytes(data)
    assert reason in refused(lambda: read_model_file(path))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (changed(1, units=30_000_000), "more than the 268,435,456 bytes"),
        (changed(1, units=70_000), "supported are up to 65535"),
        (changed(0, batch_shape=[None, 2**31 - 1]), "more than the 268,435,456 bytes"),
        (used_again_and_again(8), "calls more than 1000 layers"),
    ],
)
def test_a_description_of_what_is_too_large_for_any_device_costs_nothing(config: dict[str, Any], reason: str) -> None:
    from tinyfleet.firmware_tools.readers.keras_reader import read_keras_model

    began = time.process_time()
    model, keras = read_keras_model(keras_file(config), "model")
    assert keras is None and reason in model.unsupported
    assert time.process_time() - began < 1


def test_tables_that_share_their_parts_are_not_read_again_and_again(tmp_path: Path) -> None:
    """2,000 tensors with the same 20,000 scales and the same long name: 40 million numbers in a small file."""
    builder = flatbuffers.Builder(1 << 20)
    name = builder.CreateString("x" * 50_000)
    scales, shape = (builder.CreateNumpyVector(v) for v in (np.ones(20_000, np.float32), np.array([20_000], np.int32)))
    tflite.QuantizationParametersStart(builder)
    tflite.QuantizationParametersAddScale(builder, scales)
    quantization = tflite.QuantizationParametersEnd(builder)
    tensors = []
    for _ in range(2_000):
        tflite.TensorStart(builder)
        tflite.TensorAddName(builder, name)
        tflite.TensorAddShape(builder, shape)
        tflite.TensorAddQuantization(builder, quantization)
        tensors.append(tflite.TensorEnd(builder))
    builder.StartVector(4, len(tensors), 4)
    for tensor in reversed(tensors):
        builder.PrependUOffsetTRelative(tensor)
    every = builder.EndVector()
    tflite.SubGraphStart(builder)
    tflite.SubGraphAddTensors(builder, every)
    graph = tflite.SubGraphEnd(builder)
    tflite.BufferStart(builder)
    buffer = tflite.BufferEnd(builder)
    vectors = []
    for table in (graph, buffer):
        builder.StartVector(4, 1, 4)
        builder.PrependUOffsetTRelative(table)
        vectors.append(builder.EndVector())
    tflite.ModelStart(builder)
    tflite.ModelAddVersion(builder, 3)
    tflite.ModelAddSubgraphs(builder, vectors[0])
    tflite.ModelAddBuffers(builder, vectors[1])
    builder.Finish(tflite.ModelEnd(builder), b"TFL3")
    path = tmp_path / "model.tflite"
    path.write_bytes(builder.Output())
    assert "more than a file of its size can hold" in refused(lambda: read_model_file(path))


def npz(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def npy(array: np.ndarray[Any, Any], pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=pickle)
    return file.getvalue()


def header(text: str) -> bytes:
    encoded = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(encoded)) + encoded


FORM = "{'descr': '%s', 'fortran_order': False, 'shape': %s}"
WEIGHTS, BIAS = (name.replace("/", "_SLASH_") for name, _ in PROGRAM.parameters)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        npy(np.zeros(4)),
        npz(a=npy(np.array([{"a": 1}], object), pickle=True)),
        npz(a=bytes(200_000_000)),
        npz(a=header(FORM % ("<f4", "(1000000000000,)"))),
        npz(a=header(FORM % ("<f4", "(-1,)"))),
        npz(a=header(FORM % ("|O", "(1,)")) + b"cos\nsystem\n(S'true'\ntR."),
        npz(a=header(FORM % ("<U1000000000", "(1000,)"))),
        npz(a=header("(" * 100)),
        npz(a=header("__import__('os').system('true')")),
        encrypted(npz(a=npy(np.zeros(4)))),
    ],
)
def test_initial_parameters_that_are_none_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "initialization.npz"
    path.write_bytes(data)
    assert str(path) in refused(lambda: read_parameters(path, PROGRAM))


def test_initial_parameters_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path, arrays = tmp_path / "initialization.npz", PROGRAM.split(PROGRAM.initial(0))
    np.savez(path, **arrays)  # type: ignore[arg-type]
    assert np.array_equal(read_parameters(path, PROGRAM), PROGRAM.initial(0))
    next(iter(arrays.values())).flat[0] = np.nan
    np.savez(path, **arrays)  # type: ignore[arg-type]
    assert "not finite" in refused(lambda: read_parameters(path, PROGRAM))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("graph.ttl", b"<a> <b> " + b"(" * 200_000),
        ("graph.ttl", b"<a> <b> " + b"[ <c> " * 200_000),
        ("graph.ttl", b"<a> <b> " + b"<<( <c> <d> " * 100_000),
        ("graph.ttl", b"<urn:a> <urn:b> " + b"<<( <urn:c> <urn:d> " * 100_000 + b"<urn:e>" + b" )>>" * 100_000 + b" ."),
        ("graph.ttl", b"<urn:a> <urn:b> " + b"<< <urn:c> <urn:d> " * 100_000 + b"<urn:e>" + b" >>" * 100_000 + b" ."),
        ("graph.ttl", b"<urn:a> <urn:b> " + b"(" * 100_000 + b")" * 100_000 + b" ."),
        ("graph.ttl", b"<urn:a> <urn:b> " + b"[ <urn:c> " * 100_000 + b"1" + b" ]" * 100_000 + b" ."),
        ("graph.nt", b"<urn:a> <urn:b> " + b"<<( <urn:c> <urn:d> " * 100_000),
        ("graph.ttl", b'<a> <b> """' + b"x" * 1_000_000),
        ("graph.ttl", b"\xff\xfe<\x00a\x00"),
        ("graph.ttl", b"@prefix a: <urn:a> .\n" * 20_000 + b"a:b"),
    ],
)
def test_rdf_that_is_none_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    refused(lambda: read_graph(path))


def test_double_brackets_in_texts_and_comments_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "graph.ttl"
    path.write_text('<urn:a> <urn:b> "a << b" . # <<\n')
    assert len(read_graph(path)) == 1


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    """A pipe would be waited for, and a device never ends."""
    os.mkfifo(tmp_path / "pipe.keras")
    for path in (tmp_path / "pipe.keras", Path("/dev/zero")):
        assert "is not a file" in refused(lambda path=path: read_file(path, 100, "choose another"))
    assert "is not a file" in refused(lambda: read_model_file(tmp_path / "pipe.keras"))
    assert "cannot be read" in refused(lambda: read_file(tmp_path, 100, "choose another"))
    assert "there is no file" in refused(lambda: read_program(tmp_path / "none.mote"))
    with (tmp_path / "large.mote").open("wb") as file:
        file.truncate(1 << 40)  # takes no space
    assert "at most" in refused(lambda: read_program(tmp_path / "large.mote"))
