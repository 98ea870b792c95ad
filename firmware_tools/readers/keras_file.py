"""The description in a .keras file (Keras 3), or of a Keras model: JSON that lists its layers.

A .keras file is a zip whose config.json says all that describing and planning need. Neither Keras nor TensorFlow is
imported and the weights (HDF5) are not opened, so the worst that a hostile file can do is to be rejected.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tinyfleet.edge.errors import printable
from tinyfleet.edge.files import open_zip
from tinyfleet.edge.wire.json_text import parse_json
from tinyfleet.firmware_tools.readers.common import MAX_FILE_BYTES, CompileError, ReadError

_MAX_CONFIG = 4 * 1024 * 1024  # a network of a thousand layers takes one
_MAX_VALUES = 300_000
_MAX_DEPTH = 64
_MAX_ARRAYS = 5_000
_MAX_NAME = 1_000


DESCRIPTION_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What is raised where a description is not as Keras writes it."""


def check_name(name: Any) -> str:
    """A layer's name, which is printed, and looked for in the model. Raises ReadError."""
    if not isinstance(name, str) or len(name) > _MAX_NAME or not name.isprintable():
        raise ReadError(f"a layer's name must be printable text of at most {_MAX_NAME} characters; rename the layer")
    return name


def shown(error: Exception) -> str:
    """One of DESCRIPTION_ERRORS in a few words."""
    return printable(f"{type(error).__name__}: {error}", 100)


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
        with open_zip(data, MAX_FILE_BYTES) as archive:
            config, metadata = (_part(archive, part) for part in ("config.json", "metadata.json"))
        if config is None:
            raise ValueError("it has no config.json")
        description = _parse(config)
        version = None if metadata is None else _parse(metadata)
    except ValueError as e:
        raise ReadError(f"{name} is not a .keras file ({e}); save the model with model.save('name.keras')") from None
    said = version.get("keras_version") if isinstance(version, dict) else None
    return KerasDescription(name, description, said if isinstance(said, str) else None)


def _part(archive: zipfile.ZipFile, name: str) -> bytes | None:
    """A file in the archive; None if it is not there."""
    if name not in archive.namelist():
        return None
    with archive.open(name) as file:
        text = file.read(_MAX_CONFIG + 1)
    if len(text) > _MAX_CONFIG:
        raise ValueError(f"its {name} is longer than {_MAX_CONFIG} bytes")
    return text


def _parse(text: bytes) -> Any:
    return parse_json(text, max_values=_MAX_VALUES, max_depth=_MAX_DEPTH)


def check_before_loading(data: bytes, name: str) -> None:
    """Raises ReadError unless Keras will build nothing of a .keras file but its own classes, and read only weights that
    the file really holds."""
    description = parse_keras(data, name)
    level = [part for key, part in description.config.items() if key != "compile_config"]  # which is not loaded
    while level:
        for part in level:
            module = part.get("module") if isinstance(part, dict) else None
            if module not in (None, "builtins") and str(module).split(".")[0] != "keras":
                raise ReadError(f"{name} has a part of the module {module!s:.60}; only Keras's own parts are read")
        level = [inner for part in level for inner in _inside(part)]
    try:
        with open_zip(data, MAX_FILE_BYTES) as archive:
            _check_weights(archive.read("model.weights.h5"))
    except (OSError, ValueError) as error:
        raise ReadError(f"the weights in {name} are damaged ({error}); save the model again") from None


def _inside(part: Any) -> list[Any]:
    return list(part.values()) if isinstance(part, dict) else part if isinstance(part, list) else []


def _check_weights(data: bytes) -> None:
    """Raises ValueError or OSError if an HDF5 file's arrays claim more bytes than it has, or are in other files."""
    import h5py  # type: ignore[import-untyped]

    claimed = seen = 0
    with h5py.File(io.BytesIO(data), "r") as file:
        groups = [file]
        while groups:
            group = groups.pop()
            for key in group:
                seen += 1
                if seen > _MAX_ARRAYS or not isinstance(group.get(key, getlink=True), h5py.HardLink):
                    raise ValueError("its arrays are too many, or elsewhere")
                item = group[key]
                if isinstance(item, h5py.Group):
                    groups.append(item)
                else:
                    claimed += item.nbytes
                if claimed > len(data) or getattr(item, "is_virtual", False) or getattr(item, "external", None):
                    raise ValueError("its arrays claim more than it holds")


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
