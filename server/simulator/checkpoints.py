"""The state of a simulated run in a file, from which it continues to the same end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.files import read_npz
from tinyfleet.server.array_files import save_arrays
from tinyfleet.server.simulator.backend import Moments
from tinyfleet.server.simulator.results import Round, SimulationResult

_MAX_BYTES = 1 << 28
_COLUMNS = tuple(Round.__dataclass_fields__)


def save(path: Path, identity: str, at: SimulationResult) -> None:
    """Writes the state after a round; the file is replaced as a whole."""
    moments = at.moments or Moments(np.zeros(0, np.float32))
    table = np.array([astuple(ended) for ended in at.rounds], np.float64).reshape(-1, len(_COLUMNS))
    state = {"identity": identity, "parameters": at.parameters, "rounds": table}
    save_arrays(path, {**state, "squares": moments.squares, "steps": moments.steps})


def resume(path: Path, identity: str, begin: SimulationResult) -> SimulationResult:
    """The state in a checkpoint.

    Parameters
    ----------
    path
        The file.
    identity
        Of the run: a checkpoint of another run is an error.
    begin
        The state that the run began with.

    Raises
    ------
    UserError
        If the file is not a checkpoint, or if it is one of another run.
    """
    kinds: list[Callable[[float], Any]] = [int, int, int, float, float, int, int, float]
    advice = "remove it, or choose another file"
    try:
        saved = read_npz(path, _MAX_BYTES, advice)
        if saved["identity"].shape != () or str(saved["identity"]) != identity:
            raise UserError(f"{path} belongs to a run with other settings; {advice}")
        parameters, squares = saved["parameters"], saved["squares"]
        if parameters.shape != begin.parameters.shape or {parameters.dtype, squares.dtype} != {np.dtype(np.float32)}:
            raise ValueError("its parameters are not those of the model")
        rounds = [Round(*(kind(v) for kind, v in zip(kinds, row, strict=True))) for row in saved["rounds"].tolist()]
        moments = Moments(squares, int(saved["steps"])) if begin.moments is not None else None
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is not a checkpoint ({error}); {advice}") from error
    return SimulationResult(begin.initialization, parameters, rounds, moments)
