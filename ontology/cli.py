"""`tinyfleet query`: asks the graph, from a file, from the query library or from the command line."""

from __future__ import annotations

import json
import math
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyfleet.command_line import DATA, DataOption, JsonOption
from tinyfleet.edge.errors import UserError, printable
from tinyfleet.ontology.vocabulary.namespaces import PREFIXES, Iri, shorten

if TYPE_CHECKING:
    from tinyfleet.ontology.store.store import Binding, Rows, Value

_MAX_QUERY_BYTES = 1 << 20
_MAX_DIGITS = 20


def query(
    file: Annotated[
        str | None,
        typer.Argument(metavar="QUERY", help="A SPARQL file, or the name of a library query (see --list)."),
    ] = None,
    sparql: Annotated[
        str | None,
        typer.Option("--sparql", metavar="TEXT", help="The query itself; prefixes such as tf: and td: are known."),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", metavar="NAME=VALUE", help="Bind a query parameter. Repeatable."),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the library queries and their parameters.")] = False,
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", metavar="URL", help="SPARQL endpoint to query instead of the data folder's."),
    ] = None,
    data: DataOption = DATA,
    as_json: JsonOption = False,
) -> None:
    """Ask the fleet's knowledge graph a SPARQL question.

    It asks the server that runs on the data folder or, if none does, the graph on disk. A parameter of a query is what
    it declares as VALUES ?NAME { UNDEF }.

    Examples:
      tinyfleet query --list
      tinyfleet query devices
      tinyfleet query trainable --param model=urn:tinyfleet:model:0123456789abcdef
      tinyfleet query --sparql 'SELECT ?id { ?d tf:deviceId ?id ; tf:online true }'
    """
    if list_:
        _print_library(as_json)
        return
    import pyoxigraph as ox

    from tinyfleet.ontology.graph import with_prefixes
    from tinyfleet.ontology.store.data_folder import open_store
    from tinyfleet.ontology.store.store import parameters, rows

    if (file is None) == (sparql is None):
        raise UserError("give a query: a file, the name of a library query (--list shows them), or --sparql TEXT")
    text = with_prefixes(sparql) if sparql is not None else read_query(str(file))
    bindings = dict(_parameter(p, parameters(text)) for p in param or ())
    with open_store(data, endpoint) as store:
        answer = store.evaluate(text, **bindings)
        if isinstance(answer, ox.QueryBoolean):
            typer.echo("true" if answer else "false")
        elif isinstance(answer, ox.QueryTriples):
            typer.echo((ox.serialize(answer, format=ox.RdfFormat.TURTLE, prefixes=PREFIXES) or b"").decode().rstrip())
        else:
            found = rows(answer)
            if as_json:
                typer.echo(json.dumps(list(found), indent=2, default=str))
            else:
                print_rows(found)


def print_rows(rows: Rows, most: int | None = None) -> None:
    """The rows, or the first of them, as a table, with known namespaces as prefixes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for variable in rows.variables:
        numeric = all(isinstance(v, (int, float)) for v in rows.column(variable))
        table.add_column(variable, justify="right" if numeric and len(rows) else "left", overflow="fold")
    shown = rows[:most]
    for row in shown:
        table.add_row(*(_cell(row.get(variable)) for variable in rows.variables))
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 200  # nothing is gained by folding what no screen limits
    console.print(table)
    first = "" if len(shown) == len(rows) else f"the first {len(shown)} of "
    console.print(f"{first}{len(rows)} row{'' if len(rows) == 1 else 's'}")


def _cell(value: Value | None) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case Iri():
            return shorten(value)
        case datetime():
            return value.isoformat(sep=" ", timespec="seconds")
        case _:
            return printable(str(value))


def _print_library(as_json: bool) -> None:
    from tinyfleet.ontology.queries import library

    known = [library.query(name) for name in library.names()]
    if as_json:
        typer.echo(json.dumps({q.name: {"about": q.about, "parameters": [*q.parameters]} for q in known}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("query", "parameters", "answers"):
        table.add_column(column)
    for query in known:
        table.add_row(query.name, ", ".join(query.parameters), query.about)
    Console(markup=False, highlight=False).print(table)


def read_query(file: str) -> str:
    """The SPARQL of a file, or of the library's query of that name. Raises UserError."""
    from tinyfleet.ontology.queries import library

    path = Path(file)
    if not path.exists() and file in library.names():
        return library.text(file)
    try:
        with path.open("rb") as opened:  # it may be a pipe
            content = opened.read(_MAX_QUERY_BYTES + 1)
        if len(content) > _MAX_QUERY_BYTES:
            raise UserError(f"{file} is longer than the {_MAX_QUERY_BYTES:,} bytes of the longest query")
        return content.decode("utf-8")
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}), nor is it a query of the library{library.hint(file)}; "
            "`tinyfleet query --list` shows them"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not text; give a file with a SPARQL query") from None


def _parameter(text: str, known: list[str]) -> tuple[str, Binding]:
    name, equals, given = text.partition("=")
    if not equals:
        raise UserError(f"--param takes NAME=VALUE, not {text!r}")
    if name not in known:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise UserError(f"the query has no parameter {name!r}: {has}")
    return name, _value(given)


def _value(text: str) -> Value:
    """What a word of the command line means: an IRI, a number, a date and time, true or false, or text (always so in
    quotes)."""
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return text[1:-1]
    if text.startswith("<") and text.endswith(">"):
        return Iri(text[1:-1])
    if re.match(r"(urn:|https?://)", text):
        return Iri(text)
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"[+-]?\d+", text):
        if len(text) > _MAX_DIGITS:
            raise UserError(f"a number of {len(text)} digits is too large")
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?", text):
        if not math.isfinite(value := float(text)):
            raise UserError(f"{text:.40} is too large for a number")
        return value
    if re.match(r"\d{4}-\d\d-\d\dT", text):
        try:
            return datetime.fromisoformat(text)
        except ValueError:
            raise UserError(f"{text!r} is not a date and time; write 2026-01-31T12:00:00Z") from None
    return text
