"""`tinyfleet graph`: what fills the knowledge graph besides the fleet itself."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyfleet.command_line import BOARD, DATA, CommandGroup, DataOption, JsonOption, out_option
from tinyfleet.edge.errors import UserError, printable
from tinyfleet.edge.files import read_file as read_bytes
from tinyfleet.ontology.vocabulary.namespaces import PREFIXES, Iri, shorten

if TYPE_CHECKING:
    from tinyfleet.ontology.store.store import Facts

_MAX_FILE_BYTES = 1 << 29

app = CommandGroup("""Fill the knowledge graph from files.

Examples:
  tinyfleet graph load build/boards.ttl
""")


@app.command()
def build_catalogue(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder with platformio_boards.csv, core_boards.json and sensor_parts.csv."),
    ],
    out: Annotated[Path, out_option("FILE")] = Path("build/boards.ttl"),
    as_json: JsonOption = False,
) -> None:
    """Build a graph of boards from public board files.

    It is written as Turtle, or as N-Triples if the file ends in .nt. Boards that are rejected are listed with the
    reason.

    Examples:
      tinyfleet graph build-catalogue boards/ --out build/boards.ttl
      tinyfleet graph load build/boards.ttl
    """
    from tinyfleet.ontology.ingest import board_catalogue as catalogue

    made = catalogue.read_board_catalogue(folder)
    n = write_file(out, made.facts)
    if as_json:
        typer.echo(
            json.dumps(
                {"file": str(out), "boards": made.boards, "parts": made.parts, "triples": n, "rejected": made.rejected},
                indent=2,
            )
        )
        return
    for board, reason in made.rejected.items():
        typer.echo(f"rejected: {board}: {reason}")
    typer.echo(f"{out}: {made.boards:,} boards, {made.parts} parts, {n:,} triples; {len(made.rejected)} rejected")


@app.command()
def load(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Turtle (.ttl) or N-Triples (.nt) files.")],
    data: DataOption = DATA,
    as_json: JsonOption = False,
) -> None:
    """Load files into the graph.

    They go to the server that runs on the data folder or, if none does, to the graph on disk. Nothing is loaded unless
    everything passes the checks.

    Examples:
      tinyfleet graph load build/boards.ttl
    """
    from tinyfleet.ontology.ingest.describe import put_facts
    from tinyfleet.ontology.store.data_folder import open_store
    from tinyfleet.ontology.store.store import triples
    from tinyfleet.ontology.vocabulary import shapes

    facts: dict[Iri, dict[Iri, list[object]]] = {}
    for file in files:
        for subject, said in read_file(file).items():
            for predicate, objects in said.items():
                facts.setdefault(subject, {}).setdefault(predicate, []).extend(objects)
    n = sum(len(objects) for said in facts.values() for objects in said.values())
    shapes.check(", ".join(map(str, files)), triples(facts))  # type: ignore[arg-type]
    with open_store(data, create=True) as store:
        put_facts(store, facts)  # type: ignore[arg-type]
    typer.echo(json.dumps({"triples": n}) if as_json else f"{n:,} triples loaded")


def read_file(path: Path) -> dict[Iri, dict[Iri, list[object]]]:
    """The facts of a Turtle or N-Triples file. Raises UserError if it is invalid, or has a blank node."""
    import pyoxigraph as ox

    from tinyfleet.ontology.store.store import OPAQUE, value

    form = {".ttl": ox.RdfFormat.TURTLE, ".nt": ox.RdfFormat.N_TRIPLES}.get(path.suffix)
    if form is None:
        raise UserError(f"{path} is neither Turtle (.ttl) nor N-Triples (.nt)")
    data = read_bytes(path, _MAX_FILE_BYTES, "give the path of a Turtle or N-Triples file")
    if b"<<" in data and b"<<" in re.sub(OPAQUE.encode(), b" ", data):
        raise UserError(f"{path} has triples about triples (<< >>), which the graph does not hold; remove them")
    facts: dict[Iri, dict[Iri, list[object]]] = {}
    try:
        for quad in ox.parse(data, form):
            if not isinstance(quad.subject, ox.NamedNode) or isinstance(quad.object, ox.BlankNode):
                raise UserError(f"{path} has a blank node; give every resource an IRI")
            said = facts.setdefault(Iri(quad.subject.value), {})
            said.setdefault(Iri(quad.predicate.value), []).append(value(quad.object))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not RDF: {printable(str(error), 200)}") from None
    return facts


def write_file(path: Path, facts: Facts) -> int:
    """Writes facts as Turtle or N-Triples, sorted; returns the number of triples."""
    import pyoxigraph as ox

    from tinyfleet.ontology.store.store import term, triples

    unique = sorted({(str(term(s)), str(term(p)), str(term(o))): (s, p, o) for s, p, o in triples(facts)}.items())
    graph = [ox.Triple(ox.NamedNode(s), ox.NamedNode(p), term(o)) for _, (s, p, o) in unique]
    form = ox.RdfFormat.N_TRIPLES if path.suffix == ".nt" else ox.RdfFormat.TURTLE
    used = PREFIXES if form == ox.RdfFormat.TURTLE else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ox.serialize(graph, format=form, prefixes=used) or b"")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another with --out") from None
    return len(graph)


@app.command()
def add_measurement(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Model ID: the first 16 hexadecimal digits of its file's SHA-256."),
    ],
    board: Annotated[str, BOARD],
    latency: Annotated[
        float | None, typer.Option("--latency", metavar="SECONDS", help="Duration of one inference.")
    ] = None,
    energy: Annotated[float | None, typer.Option("--energy", metavar="JOULES", help="Energy of one inference.")] = None,
    instructions: Annotated[
        int | None, typer.Option("--instructions", metavar="N", help="Instructions of one inference.")
    ] = None,
    emulated: Annotated[bool, typer.Option("--emulated", help="It was measured on an emulator.")] = False,
    data: DataOption = DATA,
) -> None:
    """Add a measurement of one inference of a model on a board.

    Prints the measurement's IRI. Give at least one of --latency, --energy and --instructions.

    Examples:
      tinyfleet graph add-measurement 0123456789abcdef --board pico --latency 0.012
    """
    from tinyfleet.ontology.ingest.describe import put_measurement
    from tinyfleet.ontology.store.data_folder import open_store
    from tinyfleet.ontology.vocabulary.namespaces import model_iri

    with open_store(data, create=True) as store:
        iri = put_measurement(
            store,
            model_iri(model.removeprefix("urn:tinyfleet:model:")),
            board,
            emulated=emulated,
            latency_seconds=latency,
            energy_joules=energy,
            instructions=instructions,
        )
    typer.echo(iri)


@app.command()
def import_selocml(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of the .ttl files; schema_*.ttl are the schemas.")
    ],
    fleet: Annotated[str, typer.Option("--fleet", metavar="NAME", help="Fleet name.")] = "selocml",
    out: Annotated[Path | None, out_option("FILE")] = None,
    data: DataOption = DATA,
    as_json: JsonOption = False,
) -> None:
    """Import the devices and models that SeLoC-ML's authors describe.

    Known defects of these files are corrected, and each is reported. With --out the result is written to a file (.ttl,
    .nt), not to the graph.

    Examples:
      tinyfleet graph import-selocml seloc_ml/
      tinyfleet graph import-selocml seloc_ml/ --out selocml.ttl
    """
    from rich.console import Console
    from rich.table import Table

    from tinyfleet.ontology.ingest.describe import put_facts
    from tinyfleet.ontology.ingest.selocml import read_selocml
    from tinyfleet.ontology.store.data_folder import open_store
    from tinyfleet.ontology.store.store import term, triples
    from tinyfleet.ontology.vocabulary import shapes

    made = read_selocml(sorted(folder.glob("*.ttl")), fleet)
    shapes.check("the import", triples(made.facts))
    if out is None:
        with open_store(data, create=True) as store:
            put_facts(store, made.facts)
    else:
        write_file(out, made.facts)
    written = len({(s, p, term(o)) for s, p, o in triples(made.facts)})
    counts = {"devices": made.devices, "models": made.models, "read": made.triples_read, "written": written}
    if as_json:
        typer.echo(json.dumps(counts | {"defects": [asdict(defect) for defect in made.defects]}, indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("defect", "where", "times", "fix"):
        table.add_column(column, justify="right" if column == "times" else "left", overflow="fold")
    for defect in made.defects:
        table.add_row(defect.kind, shorten(defect.subject), str(defect.times), shorten(defect.fix))
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(
        f"{made.devices} devices, {made.models} models; {made.triples_read:,} triples read, {written:,} written"
    )


@app.command()
def export_vocabulary(
    out: Annotated[Path, out_option("FILE.html")] = Path("build/vocabulary.html"),
) -> None:
    """Write the vocabulary as an HTML page.

    It has each term with its definition, related terms and rules.

    Examples:
      tinyfleet graph export-vocabulary --out vocabulary.html
    """
    from tinyfleet.ontology.vocabulary.page import page

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another with --out") from None
    typer.echo(str(out))
