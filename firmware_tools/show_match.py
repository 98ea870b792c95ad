"""What people see of a match: which devices fit a model, which models fit a device, and why others do not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from tinyfleet.ontology.queries.matching import TRAIN, UPDATE_MODEL, DeviceMatch, ModelMatch, UnmetRequirement
from tinyfleet.ontology.store.store import printable
from tinyfleet.ontology.vocabulary.namespaces import Iri

UnmetRequirements = Mapping[tuple[str, Iri], Sequence[UnmetRequirement]]


def devices(
    model: Iri, fits: Sequence[DeviceMatch], misses: UnmetRequirements, device: str | None, as_json: bool
) -> None:
    """The devices that fit a model. device: the only one that was asked about, if one was."""
    fitting = {fit.device for fit in fits}
    if as_json:
        reasons = {name: [asdict(miss) for miss in missed] for (name, _), missed in misses.items()}
        print(json.dumps({"model": model, "fits": [asdict(fit) for fit in fits], "misses": reasons}, indent=2))
        return
    table = _table("device", "board", "online", "arena", "required", "free", "trains")
    for fit in fits:
        online = {True: "yes", False: "no", None: ""}[fit.online]
        numbers = (f"{n:,}" for n in (fit.arena, fit.required, fit.free))
        table.add_row(fit.device, printable(fit.board), online, *numbers, _trains(fit.layers, fit.biases))
    console = _console()
    if fits:
        console.print(table)
    if device is None:
        console.print(f"{len(fits)} device{'' if len(fits) == 1 else 's'} can run {model}")
    else:
        console.print(f"{device} {'can' if fits else 'cannot'} run {model}")
    _reasons(console, "device", {name: missed for (name, _), missed in misses.items()}, fitting)


def models(device: str, fits: Sequence[ModelMatch], misses: UnmetRequirements, as_json: bool) -> None:
    """The models that fit a device."""
    if as_json:
        reasons = {model: [asdict(miss) for miss in missed] for (_, model), missed in misses.items()}
        print(json.dumps({"device": device, "fits": [asdict(fit) for fit in fits], "misses": reasons}, indent=2))
        return
    table = _table("model", "name", "required", "free", "parameters", "trains")
    for fit in fits:
        parameters = "" if fit.parameters is None else f"{fit.parameters:,}"
        trains = _trains(fit.layers, fit.biases)
        table.add_row(_id(fit.model), printable(fit.name), f"{fit.required:,}", f"{fit.free:,}", parameters, trains)
    console = _console()
    if fits:
        console.print(table)
    console.print(f"{len(fits)} model{'' if len(fits) == 1 else 's'} can run on {device}")
    named = {_id(model): missed for (_, model), missed in misses.items()}
    _reasons(console, "model", named, {_id(fit.model) for fit in fits})


def _reasons(console: Console, what: str, misses: Mapping[str, Sequence[UnmetRequirement]], fitting: set[str]) -> None:
    """Why others do not fit; of those that do, only why they cannot train, or be given it over the air."""
    if not misses:
        return
    table = _table(what, "cannot", "because")
    for name, missed in misses.items():
        runs = name in fitting
        shown = [miss for miss in missed if runs or miss.requirement not in (TRAIN, UPDATE_MODEL)] or missed
        cannot = (
            ", ".join(_CANNOT[miss.requirement] for miss in missed if miss.requirement in _CANNOT) if runs else "run"
        )
        table.add_row(name, cannot, "; ".join(printable(str(miss)) for miss in shown))
    console.print()
    console.print(table)


_CANNOT = {TRAIN: "train", UPDATE_MODEL: "adopt"}


def _trains(layers: int | None, biases: int | None) -> str:
    """What of a model can train: "2 layers, biases of 5"."""
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
        numeric = column in ("arena", "required", "free", "parameters")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    return table


def _console() -> Console:
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 200
    return console
