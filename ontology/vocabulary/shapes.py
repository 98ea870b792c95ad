"""Checks triples against shapes.ttl (SHACL) before they are written.

The engine is the `shacl` wheel (Rust) or, on platforms without that wheel, the slower pySHACL. Both give the same
results (tests/test_ontology_shapes.py).
"""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import pyoxigraph as ox

from tinyfleet.edge.errors import UserError
from tinyfleet.ontology.store.store import Facts, Store, Triple, term, triples

SHAPES = Path(__file__).with_name("shapes.ttl")


class ShapeError(UserError):
    """A description violates its shape. `violations` are the shapes' messages, each with the wrong value."""

    def __init__(self, name: str, violations: Sequence[str]) -> None:
        self.violations = tuple(violations)
        super().__init__(f"{name} cannot be added to the graph: {'; '.join(violations)}")


def _ntriples(given: Iterable[Triple | ox.Triple]) -> str:
    return "".join(
        f"{t} .\n" if isinstance(t, ox.Triple) else f"{term(t[0])} {term(t[1])} {term(t[2])} .\n" for t in given
    )


def violations(given: Iterable[Triple | ox.Triple]) -> list[str]:
    """Return the violations of the shapes, one line each, sorted; empty if the triples conform."""
    text = _ntriples(given)
    try:
        import shacl  # noqa: F401
    except ImportError:
        return by_pyshacl(text)
    return by_shacl(text)


def check(name: str, given: Iterable[Triple | ox.Triple]) -> None:
    """Raise ShapeError, which names it as `name`, unless the triples conform."""
    wrong = violations(given)
    if wrong:
        raise ShapeError(name, wrong)


def check_and_add(store: Store, name: str, facts: Facts) -> None:
    """Check facts and write them to the store. Raises ShapeError, without writing, if they do not conform."""
    check(name, triples(facts))
    store.write(facts)


def _line(message: str, value: str | None) -> str:
    if value is None:
        return message
    return f"{message} (not {value if len(value) <= 80 else value[:80] + '…'})"


@cache
def _compiled() -> "shacl.Shapes":  # type: ignore[name-defined]  # noqa: F821
    import shacl

    return shacl.Shapes.from_turtle(SHAPES.read_text(encoding="utf-8"))


def by_shacl(ntriples: str) -> list[str]:
    """Do what `violations` does, with the `shacl` wheel."""
    report = _compiled().validate_text(ntriples, format="ntriples", max_results=20)
    return sorted({_line(r.message or r.component, r.value_plain) for r in report.results})


@cache
def _graph() -> "rdflib.Graph":  # type: ignore[name-defined]  # noqa: F821
    import rdflib

    return rdflib.Graph().parse(SHAPES, format="turtle")


def by_pyshacl(ntriples: str) -> list[str]:
    """Do what `violations` does, with pySHACL."""
    import pyshacl
    import rdflib

    data = rdflib.Graph().parse(data=ntriples, format="nt")
    _, report, _ = pyshacl.validate(data, shacl_graph=_graph())
    sh = rdflib.Namespace("http://www.w3.org/ns/shacl#")
    lines = set()
    for result in report.objects(None, sh.result):
        value = report.value(result, sh.value)
        lines.add(_line(str(report.value(result, sh.resultMessage)), None if value is None else str(value)))
    return sorted(lines)
