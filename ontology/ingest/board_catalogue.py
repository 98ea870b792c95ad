"""The catalogue of boards as a graph, built from public board files, so that no list of boards has to be maintained.

A folder holds `platformio_boards.csv` (a board a row: id, name, vendor, mcu, cpu, clock_hz, ram_bytes, flash_bytes,
connectivity, source_repo, source_path, source_commit, ram_note), `core_boards.json` (boards with more details, such as
their sensors; they replace the row with the same ID) and `sensor_parts.csv` (part, observed_properties).
A board that does not conform to the shapes is left out and reported.
"""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyfleet.edge.errors import UserError, printable
from tinyfleet.edge.files import read_file
from tinyfleet.edge.wire.json_text import parse_json
from tinyfleet.ontology.ingest.describe import board_facts, part_facts
from tinyfleet.ontology.store.store import Binding, triples
from tinyfleet.ontology.vocabulary import shapes
from tinyfleet.ontology.vocabulary.namespaces import DCTERMS, SCHEMA, TF, Iri

_MAX_BYTES = 1 << 26

Facts = dict[Iri, dict[Iri, Binding | None]]


@dataclass(frozen=True)
class CatalogueBoard:
    """A board as the files describe it, a `BoardLike`; `more` are its other facts."""

    id: str
    title: str
    mcu: str
    clock_hz: int | None
    ram_bytes: int
    flash_bytes: int
    sensors: tuple[str, ...] = ()
    more: Mapping[Iri, Binding | None] = field(default_factory=dict)

    @property
    def figures(self) -> tuple[object, ...]:
        return self.mcu, self.clock_hz, self.ram_bytes, self.flash_bytes


@dataclass(frozen=True)
class Catalogue:
    """The facts about all parts and boards that conform, with what follows from them; and why others were rejected."""

    facts: Facts
    boards: int
    parts: int
    rejected: Mapping[str, str]


def read_board_catalogue(folder: Path) -> Catalogue:
    """Read the files of a folder. Raises UserError if one is missing or does not have the expected form."""
    parts: Facts = {}
    for row in _rows(folder / "sensor_parts.csv", ("part", "observed_properties")):
        parts |= part_facts(row["part"].lower(), row["observed_properties"].split(";"))
    facts = dict(parts)
    shapes.check("the catalogue of parts", triples(parts))
    boards: dict[str, CatalogueBoard] = {}
    rejected: dict[str, str] = {}
    for board in _core(folder / "core_boards.json"):
        boards[board.id] = board
    detailed = set(boards)
    for board in _platformio(folder / "platformio_boards.csv"):
        if board.id in detailed:
            continue
        if board.id in boards and boards[board.id].figures != board.figures:
            rejected[f"{board.id} (again)"] = f"described earlier with other figures: {boards[board.id].figures}"
            continue
        boards.setdefault(board.id, board)
    taken = 0
    for board in boards.values():
        try:
            named = {sensor.lower() for sensor in board.sensors}
            about = board_facts(board, {s: p for s, p in parts.items() if p[TF.partName] in named}, board.more)
        except UserError as error:
            rejected[board.id] = str(error)
            continue
        wrong = shapes.violations(triples(about))
        if wrong:
            doubt = board.more.get(TF.dataQualityNote)
            rejected[board.id] = "; ".join(wrong) + (f": {doubt}" if doubt else "")
            continue
        for subject, said in about.items():
            facts.setdefault(subject, {}).update(said)
        taken += 1
    return Catalogue(facts, taken, len(parts), rejected)


def _platformio(path: Path) -> Iterator[CatalogueBoard]:
    wanted = ("id", "name", "vendor", "mcu", "cpu", "clock_hz", "ram_bytes", "flash_bytes", "connectivity", "ram_note")
    for row in _rows(path, wanted):
        source = [row.get(name) or "" for name in ("source_repo", "source_commit", "source_path")]
        yield CatalogueBoard(
            row["id"],
            row["name"],
            row["mcu"],
            _number(path, row, "clock_hz") or None,
            _number(path, row, "ram_bytes"),
            _number(path, row, "flash_bytes"),
            more={
                TF.core: row["cpu"] or None,
                SCHEMA.manufacturer: row["vendor"] or None,
                TF.connectivity: sorted({one.lower() for one in row["connectivity"].split(";") if one}),
                DCTERMS.source: "{}@{}:{}".format(*source) if all(source) else None,
                TF.dataQualityNote: row["ram_note"] or None,
            },
        )


def _core(path: Path) -> Iterator[CatalogueBoard]:
    try:
        data = read_file(path, _MAX_BYTES, "name the folder of the board files")
        entries = parse_json(data, max_values=1_000_000, max_depth=16)
        for entry in entries:
            yield CatalogueBoard(
                entry["id"],
                entry["name"],
                entry["mcu"],
                entry["clock_hz"],
                entry["ram_bytes"],
                entry["flash_bytes"],
                tuple(sensor["part"] for sensor in entry["sensors"]),
                more={
                    TF.core: entry["cpu"] or None,
                    SCHEMA.manufacturer: entry["vendor"] or None,
                    TF.connectivity: sorted(entry["connectivity"]),
                    DCTERMS.source: entry["sources"],
                },
            )
    except (ValueError, KeyError, TypeError) as error:
        reason = printable(f"{type(error).__name__}: {error}", 100)
        raise UserError(f"{path} is not a list of boards ({reason}); use the file as published") from None


def _rows(path: Path, wanted: tuple[str, ...]) -> Iterator[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            lacking = [name for name in wanted if name not in (reader.fieldnames or ())]
            if lacking:
                raise UserError(f"{path} has no column {', '.join(lacking)}; use the file as published")
            for row in reader:
                if any(row[name] is None for name in wanted):
                    raise UserError(f"{path}, line {reader.line_num}: an incomplete row")
                yield row
    except OSError as error:
        raise _missing(path, error) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a CSV file: {error}") from None


def _number(path: Path, row: dict[str, Any], name: str) -> int:
    try:
        return int(row[name] or 0)
    except ValueError:
        raise UserError(f"{path}: {name} of {row['id']} is not a whole number: '{row[name]:.40}'") from None


def _missing(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror}); name the folder of the board files")
