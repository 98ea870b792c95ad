"""The query library: every .rq file in queries, by its name. Each says in its head what it answers and what it takes.

A query takes parameters (`VALUES ?name { UNDEF }`). The same name means the same in all of them: ?model is the model
in question, to be run, trained or deployed, ?running the one that a device runs now, ?id a device's id. A query with a
column ?id selects devices, for `tinyfleet run start` and `tinyfleet deploy`.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

from tinyfleet.edge.errors import UserError
from tinyfleet.ontology.store.store import parameters

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Query:
    """A query of the library. parameters: what each is, by its name."""

    name: str
    about: str
    parameters: dict[str, str]
    sparql: str


def names() -> list[str]:
    """The names of all queries."""
    return sorted(path.stem for path in _FOLDER.glob("*.rq"))


def text(name: str) -> str:
    """The SPARQL of a query. Raises UserError if there is none of that name."""
    if name not in names():
        raise UserError(f"there is no query {name!r} in the library{hint(name)}; `tinyfleet query --list` shows them")
    return (_FOLDER / f"{name}.rq").read_text(encoding="utf-8")


def hint(name: str) -> str:
    """What to say of a name that no query has: which one was meant, if one is like it."""
    like = difflib.get_close_matches(name, names(), 1)
    return f", did you mean {like[0]!r}?" if like else ""


def query(name: str) -> Query:
    """A query with what its head says of it. Raises UserError if there is none of that name."""
    sparql = text(name)
    about, _, rest = "\n".join(
        line.removeprefix("#").strip() for line in sparql.split("\n\n")[0].splitlines()
    ).partition("\n\n")
    said = dict(line.split(": ", 1) for line in rest.splitlines())
    return Query(name, about.replace("\n", " "), {p: said[p] for p in parameters(sparql)}, sparql)
