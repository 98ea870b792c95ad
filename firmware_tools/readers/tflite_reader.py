""".tflite files in: their layers, and float32 and int8 models as graphs of the engine."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tinyfleet.edge.model.graph import Graph, ModelGraph
from tinyfleet.firmware_tools.readers.common import CompileError, read_model_bytes
from tinyfleet.firmware_tools.readers.tflite_file import parse_tflite, reading
from tinyfleet.firmware_tools.readers.tflite_layers import sample_shape, tflite_layers
from tinyfleet.firmware_tools.readers.tflite_lowering import lower


def read_tflite_model(data: bytes, name: str) -> ModelGraph:
    """Read a .tflite file: its layers, and the engine's graph of them if the engine can run them all.

    Parameters
    ----------
    data : bytes
        The file's content.
    name : str
        The file's name without its ending.

    Returns
    -------
    ModelGraph
        With `unsupported` in place of a graph where the engine lacks an operator or a number type.

    Raises
    ------
    ReadError
        If the file is damaged or is not a .tflite file.
    """
    with reading(f"'{name}.tflite'"):
        file = parse_tflite(data)
        layers, notes = tflite_layers(file)
        ends = [None if i == -1 else file.tensors[i] for i in (file.inputs[0], file.outputs[0])]
        input_shape, output_shape = map(sample_shape, ends)
    graph, unsupported = None, ""
    try:
        with reading(f"'{name}.tflite'"):
            graph = lower(file)
    except CompileError as error:
        unsupported = str(error)
    return ModelGraph(
        name=name,
        format="tflite",
        sha256=hashlib.sha256(data).hexdigest(),
        file_bytes=len(data),
        layers=layers,
        input_shape=input_shape,
        output_shape=output_shape,
        graph=graph,
        unsupported=unsupported,
        notes=notes,
    )


def read_tflite(model: Path | bytes) -> Graph:
    """Read a .tflite file as a graph of the engine, for inference, with all weights.

    Tensors [1, n], [1, t, c] and [1, h, w, c] become (1, 1, n), (1, t, c) and (h, w, c). Ops are named after the layers
    that the file's tensor names tell of; activations that are fused in the file belong to their layer.

    Parameters
    ----------
    model : Path or bytes
        The file, or its content.

    Returns
    -------
    Graph
        For one sample at a time.

    Raises
    ------
    CompileError
        In one line that names the operator that is not supported, or the defect.
    """
    data = read_model_bytes(model) if isinstance(model, Path) else model
    with reading(f"'{model.name}'" if isinstance(model, Path) else "the model"):
        return lower(parse_tflite(data))
