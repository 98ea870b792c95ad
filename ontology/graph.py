"""The knowledge graph of a fleet, for programs: open it, query it, change it."""

import re
from pathlib import Path
from typing import Self

from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.data_folder import open_store
from tinyfleet.ontology.store.remote_store import RemoteStore
from tinyfleet.ontology.store.store import Binding, EmbeddedStore, Rows, Store
from tinyfleet.ontology.vocabulary.namespaces import PREFIXES


def open_graph(
    data: str | Path | None = ".tinyfleet",
    *,
    endpoint: str | None = None,
    token: str | None = None,
    create: bool = False,
) -> "Graph":
    """Open the knowledge graph of a fleet.

    Parameters
    ----------
    data
        The data folder of a server on this machine. If its server runs, that is asked; otherwise the graph on disk is
        opened. None opens an empty graph in memory.
    endpoint
        Address of a SPARQL 1.1 endpoint to use instead.
    token
        Token for updates at that endpoint.
    create
        Create the data folder if it does not exist.

    Returns
    -------
    Graph
        Close it after use, or use it in a `with`.

    Raises
    ------
    UserError
        If there is no graph in the folder, it is in use, or it was written by a newer release.

    Examples
    --------
    >>> with open_graph(None) as graph:
    ...     graph.update('INSERT DATA { <urn:tinyfleet:home:kitchen> a tf:Device ; tf:deviceId "kitchen" }')
    ...     graph.query("SELECT ?id { ?device tf:deviceId ?id }").column("id")
    ['kitchen']
    """
    if endpoint is not None:
        return Graph(RemoteStore(endpoint, token))
    return Graph(EmbeddedStore() if data is None else open_store(Path(data), create=create))


class Graph:
    """The knowledge graph of a fleet. Made by `open_graph`.

    Queries and updates are SPARQL 1.1, or the name of a query of the library (`tinyfleet query --list`). The usual
    prefixes (tf:, td:, prov:, ...) need not be declared.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def query(self, query: str, **parameters: Binding) -> Rows:
        """Run a SELECT.

        Parameters
        ----------
        query
            Name of a library query, or SPARQL.
        **parameters
            Values of the query's parameters, which it declares as `VALUES ?name { UNDEF }`. An IRI is an `Iri`; a `str`
            is text.

        Returns
        -------
        Rows
            A sequence with one dict for each row, without its unbound variables.

        Raises
        ------
        StoreError
            If the query is not valid, is not a SELECT, or does not have such a parameter.

        Examples
        --------
        >>> with open_graph(None) as graph:
        ...     graph.query("devices", fleet="home").variables
        ('id', 'online', 'running', 'board', 'engine', 'version', 'arena', 'fleet')
        """
        return self._store.query(_text(query), **parameters)

    def ask(self, query: str, **parameters: Binding) -> bool:
        """Run an ASK; the parameters and errors are those of `query`.

        Examples
        --------
        >>> with open_graph(None) as graph:
        ...     graph.ask("ASK { ?device tf:online true }")
        False
        """
        return self._store.ask(_text(query), **parameters)

    def update(self, update: str) -> None:
        """Run a SPARQL update, completely or, on an error, not at all.

        Raises
        ------
        StoreError
            If the update is not valid, or is not allowed at the endpoint.
        """
        self._store.update(with_prefixes(update))

    def close(self) -> None:
        """Close the graph; its folder is then free for another process."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _text(query: str) -> str:
    return library.text(query) if re.fullmatch(r"[a-z0-9-]+", query) else with_prefixes(query)


def with_prefixes(sparql: str) -> str:
    """Return SPARQL with declarations, on a line before it, of the known prefixes that it uses but does not declare."""
    declared = {m[1] for m in re.finditer(r"\bPREFIX\s+([\w.-]*)\s*:", sparql, re.IGNORECASE)}
    used = [p for p in PREFIXES if p not in declared and re.search(rf"(?<![\w:]){p}:", sparql)]
    return " ".join(f"PREFIX {p}: <{PREFIXES[p]}>" for p in used) + "\n" * bool(used) + sparql
