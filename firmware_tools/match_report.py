"""Prints matches: the devices that can run a model, the models that a device can run, and why others do not match."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from tinyfleet.edge.errors import printable
from tinyfleet.ontology.queries.matching import TRAIN, UPDATE_MODEL, DeviceMatch, ModelMatch, UnmetRequirement
from tinyfleet.ontology.vocabulary.namespaces import Iri

UnmetRequirements = Mapping[tuple[str, Iri], Sequence[UnmetRequirement]]


def devices(
    model: Iri, matches: Sequence[DeviceMatch], unmet: UnmetRequirements, device: str | None, as_json: bool
) -> None:
    """Prints the devices that can run a model. device: the only one that was asked about, if one was."""
    matching = {match.device for match in matches}
    if as_json:
        reasons = {
            name: [asdict(requirement) for requirement in requirements] for (name, _), requirements in unmet.items()
        }
        print(json.dumps({"model": model, "matches": [asdict(match) for match in matches], "unmet": reasons}, indent=2))
        return
    table = _table("device", "board", "online", "arena", "needs", "free", "trains")
    for match in matches:
        online = {True: "yes", False: "no", None: ""}[match.online]
        numbers = (f"{n:,}" for n in (match.arena, match.required, match.free))
        table.add_row(match.device, printable(match.board), online, *numbers, _trains(match.layers, match.biases))
    console = _console()
    if matches:
        console.print(table)
    if device is None:
        console.print(f"{len(matches)} device{'' if len(matches) == 1 else 's'} can run {model}")
    else:
        console.print(f"{device} {'can' if matches else 'cannot'} run {model}")
    _reasons(console, "device", {name: requirements for (name, _), requirements in unmet.items()}, matching)


def models(device: str, matches: Sequence[ModelMatch], unmet: UnmetRequirements, as_json: bool) -> None:
    """Prints the models that a device can run."""
    if as_json:
        reasons = {
            model: [asdict(requirement) for requirement in requirements] for (_, model), requirements in unmet.items()
        }
        print(
            json.dumps({"device": device, "matches": [asdict(match) for match in matches], "unmet": reasons}, indent=2)
        )
        return
    table = _table("model", "name", "needs", "free", "parameters", "trains")
    for match in matches:
        parameters = "" if match.parameters is None else f"{match.parameters:,}"
        trains = _trains(match.layers, match.biases)
        table.add_row(
            _id(match.model), printable(match.name), f"{match.required:,}", f"{match.free:,}", parameters, trains
        )
    console = _console()
    if matches:
        console.print(table)
    console.print(f"{len(matches)} model{'' if len(matches) == 1 else 's'} can run on {device}")
    named = {_id(model): requirements for (_, model), requirements in unmet.items()}
    _reasons(console, "model", named, {_id(match.model) for match in matches})


def _reasons(console: Console, kind: str, unmet: Mapping[str, Sequence[UnmetRequirement]], matching: set[str]) -> None:
    """Prints why others do not match; of those that do, only why they cannot train it, or receive it over the air."""
    if not unmet:
        return
    table = _table(kind, "cannot", "because")
    for name, requirements in unmet.items():
        runs = name in matching
        shown = [
            requirement for requirement in requirements if runs or requirement.requirement not in (TRAIN, UPDATE_MODEL)
        ] or requirements
        cannot = (
            ", ".join(
                _CANNOT[requirement.requirement] for requirement in requirements if requirement.requirement in _CANNOT
            )
            if runs
            else "run"
        )
        table.add_row(name, cannot, "; ".join(printable(str(requirement)) for requirement in shown))
    console.print()
    console.print(table)


_CANNOT = {TRAIN: "train", UPDATE_MODEL: "update"}


def _trains(layers: int | None, biases: int | None) -> str:
    """How much of a model can train: "2 layers, biases of 5"."""
    parts = []
    if layers:
        parts.append(f"{layers} layer{'' if layers == 1 else 's'}")
    if biases and biases > (layers or 0):
        parts.append(f"biases of {biases}")
    return ", ".join(parts)


def _id(model: Iri) -> str:
    return model.rsplit(":", 1)[-1]


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        numeric = column in ("arena", "needs", "free", "parameters")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    return table


def _console() -> Console:
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 200
    return console
