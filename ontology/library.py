"""The query library: every .rq file in queries, by its name. Each says in its head what it answers."""

from pathlib import Path

from edge.errors import UserError

_FOLDER = Path(__file__).with_name("queries")


def names() -> list[str]:
    """The names of all queries."""
    return sorted(path.stem for path in _FOLDER.glob("*.rq"))


def text(name: str) -> str:
    """The SPARQL of a query. Raises UserError if there is none of that name."""
    if name not in names():
        raise UserError(f"there is no query {name!r}; choose one of {', '.join(names())}, or give a file")
    return (_FOLDER / f"{name}.rq").read_text(encoding="utf-8")
