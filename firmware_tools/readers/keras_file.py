"""The description in a .keras file (Keras 3), or of a Keras model: JSON that lists its layers.

A .keras file is a zip whose config.json says all that describing and planning need. Neither Keras nor TensorFlow is
imported and the weights (HDF5) are not opened, so the worst that a hostile file can do is to be rejected.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tinyfleet.firmware_tools.readers.common import CompileError, ReadError

_MAX_CONFIG = 16 * 1024 * 1024


@dataclass(frozen=True)
class KerasDescription:
    """A model's description as Keras writes it, unchecked. version: the Keras that saved it, None if not stated."""

    name: str
    config: Any
    version: str | None

    def check_version(self) -> None:
        """Raises CompileError unless Keras 3 wrote it."""
        if self.version is None:
            raise CompileError(
                f"{self.name} is not a .keras file that Keras 3 saved; save the model with model.save('name.keras')"
            )
        if not self.version.startswith("3."):
            raise CompileError(f"{self.name} was saved by Keras {self.version}; load it and save it again with Keras 3")


def parse_keras(data: bytes, name: str) -> KerasDescription:
    """The description in a .keras file's bytes. name: how errors call the file. Raises ReadError."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            with archive.open("config.json") as file:
                text = file.read(_MAX_CONFIG + 1)
            if len(text) > _MAX_CONFIG:
                raise ReadError(f"{name}: its config.json is longer than {_MAX_CONFIG} bytes")
            return KerasDescription(name, json.loads(text), _version(archive))
    except (
        zipfile.BadZipFile,
        zlib.error,
        RuntimeError,
        NotImplementedError,
        EOFError,
        OSError,
        KeyError,
        ValueError,
    ) as e:
        raise ReadError(f"{name} is not a .keras file ({e}); save the model with model.save('name.keras')") from None


def _version(archive: zipfile.ZipFile) -> str | None:
    try:
        with archive.open("metadata.json") as file:
            return str(json.loads(file.read(_MAX_CONFIG))["keras_version"])
    except (KeyError, ValueError, TypeError):
        return None


def describe_object(model: Any) -> KerasDescription:
    """The description of a Keras model. Raises CompileError if it is not one, or has no list of layers."""
    try:
        return KerasDescription("the model", json.loads(model.to_json()), "3.")
    except NotImplementedError as e:
        raise CompileError(
            f"a {type(model).__name__} that computes in its own call() cannot be compiled; build the model with "
            "keras.Sequential or the functional API"
        ) from e
    except AttributeError as e:
        raise CompileError(f"expected a Keras model or the path of a .keras file, got {type(model).__name__}") from e


def histories(value: Any) -> Iterator[tuple[str, int, int]]:
    """The tensors (layer, its node, the node's output) in a node's arguments, in their order, once for every use."""
    if isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":
        name, node, number = value["config"]["keras_history"]
        yield name, node, number
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from histories(part)


def model_ends(value: Any) -> list[tuple[str, int, int]]:
    """The tensors that a functional model names as its inputs or outputs."""
    if isinstance(value, dict):
        return [end for part in value.values() for end in model_ends(part)]
    if isinstance(value[0], str):
        return [(value[0], value[1], value[2])]
    return [end for part in value for end in model_ends(part)]
