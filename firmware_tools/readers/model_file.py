"""A model's file, of either format, read once for all that is done with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinyfleet.edge.model.graph import ModelGraph
from tinyfleet.firmware_tools.readers.common import ReadError, read_model_bytes
from tinyfleet.firmware_tools.readers.keras_graph import KerasGraph
from tinyfleet.firmware_tools.readers.keras_reader import read_keras_model


@dataclass(frozen=True)
class ModelFile:
    """A .keras or .tflite file that has been read.

    Parameters
    ----------
    path : Path
        The file; only a .keras file's weights are still to be read from it.
    model : ModelGraph
        Its layers, and the engine's operations for them.
    keras : KerasGraph, optional
        Of a .keras file that the engine can run: where the weights of the operations are.
    """

    path: Path
    model: ModelGraph
    keras: KerasGraph | None = None


def read_model_file(path: str | Path) -> ModelFile:
    """Read a .keras or .tflite file.

    Parameters
    ----------
    path : str or Path
        The file; its ending tells the format.

    Returns
    -------
    ModelFile
        Also of a model that the engine cannot run.

    Raises
    ------
    ReadError
        If the file cannot be read, is damaged, or is of another format.
    """
    path = Path(path)
    if path.suffix not in (".tflite", ".keras"):
        raise ReadError(f"{path} is neither a .tflite nor a .keras file; export the model to one of them")
    data = read_model_bytes(path)
    if path.suffix == ".keras":
        return ModelFile(path, *read_keras_model(data, path.stem))
    try:
        from tinyfleet.firmware_tools.readers.tflite_reader import read_tflite_model
    except ImportError:
        raise ReadError(f"{path} needs the package tflite to be read; pip install tflite") from None
    return ModelFile(path, read_tflite_model(data, path.stem))
