"""`tinyfleet graph`: what fills the knowledge graph besides the fleet itself."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import pyoxigraph as ox
import typer
from tinyfleet.edge.errors import UserError
from tinyfleet.ontology.cli import shorten
from tinyfleet.ontology.store.data_folder import open_store
from tinyfleet.ontology.store.store import Facts, term, triples, value
from tinyfleet.ontology.vocabulary.namespaces import PREFIXES, Iri

app = typer.Typer(
    help="Fill the knowledge graph: catalogues of boards, descriptions from elsewhere.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Data = Annotated[Path, typer.Option("--data", help="The data directory.")]


@app.command()
def boards(
    folder: Annotated[
        Path, typer.Argument(help="The folder with platformio_boards.csv, core_boards.json and sensor_parts.csv.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write: Turtle, or N-Triples if it ends in .nt.")] = Path(
        "build/boards.ttl"
    ),
    as_json: AsJson = False,
) -> None:
    """Make a graph of boards from public board files, and report which are rejected and why.

    \b
    Example:
      tinyfleet graph boards boards/ --out build/boards.ttl
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
    files: Annotated[list[Path], typer.Argument(help="Turtle (.ttl) or N-Triples (.nt) files.")],
    data: Data = Path(".tinyfleet"),
    as_json: AsJson = False,
) -> None:
    """Load files into the graph: of the server that runs on the data directory, or on disk. All is checked first.

    Example: tinyfleet graph load build/boards.ttl
    """
    from tinyfleet.ontology.ingest.describe import put_facts
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
    """The facts of a Turtle or N-Triples file. Raises UserError if it is none, or names something by a blank node."""
    form = {".ttl": ox.RdfFormat.TURTLE, ".nt": ox.RdfFormat.N_TRIPLES}.get(path.suffix)
    if form is None:
        raise UserError(f"{path} is neither Turtle (.ttl) nor N-Triples (.nt)")
    facts: dict[Iri, dict[Iri, list[object]]] = {}
    try:
        for quad in ox.parse(path=str(path), format=form):
            if not isinstance(quad.subject, ox.NamedNode) or isinstance(quad.object, ox.BlankNode):
                raise UserError(f"{path}: a blank node; what goes into the graph has a name")
            said = facts.setdefault(Iri(quad.subject.value), {})
            said.setdefault(Iri(quad.predicate.value), []).append(value(quad.object))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not RDF: {error}") from None
    return facts


def write_file(path: Path, facts: Facts) -> int:
    """Writes facts as Turtle or N-Triples, sorted; how many triples they are."""
    given = sorted({(str(term(s)), str(term(p)), str(term(o))): (s, p, o) for s, p, o in triples(facts)}.items())
    graph = [ox.Triple(ox.NamedNode(s), ox.NamedNode(p), term(o)) for _, (s, p, o) in given]
    form = ox.RdfFormat.N_TRIPLES if path.suffix == ".nt" else ox.RdfFormat.TURTLE
    used = PREFIXES if form == ox.RdfFormat.TURTLE else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ox.serialize(graph, format=form, prefixes=used) or b"")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another with --out") from None
    return len(graph)


@app.command()
def measured(
    model: Annotated[str, typer.Argument(help="The model: the first 16 hexadecimal digits of its file's SHA-256.")],
    board: Annotated[str, typer.Option(help="The kind of board that it ran on.", show_default=False)],
    latency: Annotated[float | None, typer.Option(help="Seconds of one inference.", show_default=False)] = None,
    energy: Annotated[float | None, typer.Option(help="Joules of one inference.", show_default=False)] = None,
    instructions: Annotated[int | None, typer.Option(help="Of one inference.", show_default=False)] = None,
    emulated: Annotated[bool, typer.Option("--emulated", help="An emulator stood in for the board.")] = False,
    data: Data = Path(".tinyfleet"),
) -> None:
    """Say what one inference of a model took on a board, as it was measured.

    Example: tinyfleet graph measured 0123456789abcdef --board nano33ble --latency 0.012 --energy 0.0004
    """
    from tinyfleet.ontology.ingest.describe import put_measurement
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


@app.command("import-selocml")
def import_selocml(
    folder: Annotated[Path, typer.Argument(help="The folder of the .ttl files; schema_*.ttl are the schemas.")],
    fleet: Annotated[str, typer.Option(help="The fleet that the devices are to belong to.")] = "selocml",
    out: Annotated[
        Path | None, typer.Option(help="Write a file (.ttl, .nt) instead of into the graph.", show_default=False)
    ] = None,
    data: Data = Path(".tinyfleet"),
    as_json: AsJson = False,
) -> None:
    """Import the devices and models that SeLoC-ML's authors describe, mend their known defects and report each.

    Example: tinyfleet graph import-selocml seloc_ml/
    """
    from rich.console import Console
    from rich.table import Table
    from tinyfleet.ontology.ingest.describe import put_facts
    from tinyfleet.ontology.ingest.selocml import read_selocml
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
        table.add_row(defect.kind, shorten(defect.what), str(defect.times), shorten(defect.fix))
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(
        f"{made.devices} devices, {made.models} models; {made.triples_read:,} triples read, {written:,} written"
    )


@app.command()
def vocabulary(
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("build/vocabulary.html"),
) -> None:
    """Write the vocabulary as an HTML page: every term with its definition, its place among others, and its rules.

    Example: tinyfleet graph vocabulary --out vocabulary.html
    """
    from tinyfleet.ontology.vocabulary.page import page

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another with --out") from None
    typer.echo(str(out))
