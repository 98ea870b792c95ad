"""The query library: the .rq files in this folder, by name. The head of each describes the query and its parameters.

A parameter is declared as `VALUES ?name { UNDEF }`. A name means the same in all queries: ?model is the model to be
run, trained or deployed, ?running the one that a device runs now, ?id a device ID. A query with a column ?id can select
devices for `tinyfleet run start` and `tinyfleet deploy`.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

from tinyfleet.edge.errors import UserError
from tinyfleet.ontology.store.store import parameters

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Query:
    """A query of the library; `parameters` are the descriptions of its parameters."""

    name: str
    about: str
    parameters: dict[str, str]
    sparql: str


def names() -> list[str]:
    """Return the names of all queries."""
    return sorted(path.stem for path in _FOLDER.glob("*.rq"))


def text(name: str) -> str:
    """Return the SPARQL of a query. Raises UserError if there is no query with this name."""
    if name not in names():
        raise UserError(f"there is no query {name!r} in the library{hint(name)}; `tinyfleet query --list` shows them")
    return (_FOLDER / f"{name}.rq").read_text(encoding="utf-8")


def hint(name: str) -> str:
    """Return a hint for a name that no query has: the most similar one, if any."""
    like = difflib.get_close_matches(name, names(), 1)
    return f", did you mean {like[0]!r}?" if like else ""


def query(name: str) -> Query:
    """Return a query with the description in its head. Raises UserError if there is no query with this name."""
    sparql = text(name)
    about, _, rest = "\n".join(
        line.removeprefix("#").strip() for line in sparql.split("\n\n")[0].splitlines()
    ).partition("\n\n")
    said = dict(line.split(": ", 1) for line in rest.splitlines())
    return Query(name, about.replace("\n", " "), {p: said[p] for p in parameters(sparql)}, sparql)
