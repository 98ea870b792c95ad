"""The data folder of a server: its parts, its version, and its migration from older versions.

A folder holds the graph (`graph/`), the column index of the graph (`graph.index`), the address of the running server
(`server.json`), the broker's files (`broker/`) and the version of all this (`version`). Folders of version 1 had no
version file.

A migration never changes the old graph. It copies the folder, writes a new graph beside the old one, and exchanges the
two by renaming them. Whenever the process is killed, the next start finds either the old graph, and starts over, or a
complete new one, and finishes.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyoxigraph as ox

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.server_info import find_server
from tinyfleet.ontology.store.remote_store import RemoteStore
from tinyfleet.ontology.store.store import EmbeddedStore, Store, Unreachable
from tinyfleet.ontology.vocabulary.namespaces import TF, Iri

GRAPH = "graph"
"""Name of the graph's folder in the data folder."""
VERSION_FILE = "version"
VERSION = 2
"""Version of the data folders that this release writes. Version 2 renamed terms of the vocabulary."""

_NEW = "graph.new"  # being written by a migration
_OLD = "graph.old"  # there only while a complete new graph takes its place

_RENAMED_IN_2 = {
    TF.adoptBytes: TF.modelSlotBytes,
    TF.asked: TF.selectedDevices,
    TF.malformed: TF.malformedMessages,
    TF.samples: TF.samplesLearned,
    TF.stale: TF.staleMessages,
}
"""Predicates of version 1 and their names in version 2."""


def prepare(data: Path, log: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> None:
    """Make a data folder ready to be opened: create it, or migrate it from an older version.

    Call it before opening the graph of a folder. Nothing happens to a folder of the current version.

    Parameters
    ----------
    data
        The data folder. It is created if it does not exist.
    log
        Called with lines about a migration.

    Raises
    ------
    UserError
        If the folder was written by a newer release, if another process uses its graph, or if there is no space or
        permission to migrate it.
    """
    try:
        data.mkdir(parents=True, exist_ok=True)
        with _locked(data):
            _finish(data)
            version = read_version(data)
            if version < VERSION:
                log(f"{data} has version {version} of the data folder; migrating it to version {VERSION}")
                log(f"backup of version {version}: {_back_up(data, version)}")
                log(f"{data} migrated to version {VERSION}: {_migrate(data, version):,} triples")
            elif not (data / VERSION_FILE).exists():
                _write_version(data)
    except OSError as error:
        raise UserError(
            f"the data folder {data} cannot be prepared ({error}); check its permissions and the free space on its disk"
        ) from None


@contextmanager
def _locked(data: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two processes that start at the same time do not both migrate it."""
    folder = os.open(data, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def read_version(data: Path) -> int:
    """Return the version of a data folder; that of a folder without a graph is the current one.

    Raises
    ------
    UserError
        If the version is newer than this release, or the file does not hold a version.
    """
    path = data / VERSION_FILE
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return 1 if (data / GRAPH).is_dir() else VERSION
    if not text.isdecimal() or int(text) < 1:
        raise UserError(
            f"{path} does not hold the version of a data folder but {text[:40]!r}; restore it from a backup"
        )
    version = int(text)
    if version > VERSION:
        raise UserError(
            f"the data folder {data} has version {version}, and this release of TinyFleet reads versions up to "
            f"{VERSION}; upgrade TinyFleet, or choose another folder with --data"
        )
    return version


def _write_version(data: Path) -> None:
    new = data / f"{VERSION_FILE}.new"
    new.write_text(f"{VERSION}\n", encoding="utf-8")
    new.replace(data / VERSION_FILE)


def _finish(data: Path) -> None:
    """Complete a migration that was interrupted after its new graph was complete, and remove the files of any other."""
    if (data / _OLD).is_dir():
        if (data / _NEW).is_dir():  # the old graph has been moved away, the new one not yet into its place
            (data / _NEW).replace(data / GRAPH)
        _write_version(data)
        shutil.rmtree(data / _OLD)
    elif (data / _NEW).is_dir():
        shutil.rmtree(data / _NEW)


def _back_up(data: Path, version: int) -> Path:
    """Copy the folder to one beside it and return that. Files of the graph are hard links where that is possible."""
    data = data.absolute()
    for unfinished in data.parent.glob(f"{data.name}.version-*.unfinished"):
        shutil.rmtree(unfinished)
    backup = data.with_name(f"{data.name}.version-{version}.{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
    unfinished = backup.with_name(f"{backup.name}.unfinished")
    with EmbeddedStore(data / GRAPH) as store:  # held open: no other process can write while it is copied
        shutil.copytree(data, unfinished, ignore=lambda folder, _: {GRAPH} if Path(folder) == data else set())
        store.backup(unfinished / GRAPH)
    os.sync()
    unfinished.replace(backup)
    return backup


def _migrate(data: Path, version: int) -> int:
    """Write the graph of a folder in the current version and put it in the old one's place; return its triples."""
    assert version == 1, "a new version of the data folder needs a migration here"
    with EmbeddedStore(data / GRAPH) as store, EmbeddedStore(data / _NEW) as new:
        new.load(_version_2(quad) for quad in store.quads())
        triples = len(new)
    os.sync()
    (data / GRAPH).replace(data / _OLD)
    (data / f"{GRAPH}.index").unlink(missing_ok=True)
    _finish(data)
    return triples


def _version_2(quad: ox.Quad) -> ox.Quad:
    """A quad of version 1 as version 2 has it."""
    predicate, value = Iri(quad.predicate.value), quad.object
    if predicate == TF.document and isinstance(value, ox.Literal):
        document = json.dumps(_rename_keys(json.loads(value.value)), ensure_ascii=False, separators=(",", ":"))
        return ox.Quad(quad.subject, quad.predicate, ox.Literal(document), quad.graph_name)
    if predicate in _RENAMED_IN_2:
        return ox.Quad(quad.subject, ox.NamedNode(_RENAMED_IN_2[predicate]), value, quad.graph_name)
    return quad


def _rename_keys(node: Any) -> Any:
    """A Thing Description with the new names of the terms that it uses."""
    if isinstance(node, dict):
        return {_KEYS.get(name, name): _rename_keys(inner) for name, inner in node.items()}
    return [_rename_keys(inner) for inner in node] if isinstance(node, list) else node


_KEYS = {f"tf:{old.removeprefix(TF.iri)}": f"tf:{new.removeprefix(TF.iri)}" for old, new in _RENAMED_IN_2.items()}


def open_store(data: Path, endpoint: str | None = None, *, create: bool = False) -> Store:
    """Open the graph of a data folder: that of the server that runs on it or, if none does, the one on disk.

    Parameters
    ----------
    data
        The data folder. Its owner may also update the graph of a running server.
    endpoint
        Address of a SPARQL endpoint to use instead.
    create
        Create the folder and an empty graph if there is none.

    Raises
    ------
    UserError
        If there is no graph, or the folder cannot be used (see `prepare`).
    """
    if endpoint is not None:
        return RemoteStore(endpoint)
    graph = data / GRAPH
    if server := find_server(data):
        try:
            remote = remote_store(server)
            remote.ask("ASK { }")
            return remote
        except Unreachable:  # the server was killed and left its address behind; a slow one still holds the graph
            if not graph.is_dir():
                raise
    if not create and not any((data / name).is_dir() for name in (GRAPH, _OLD)):
        raise UserError(
            f"there is no graph in {data} and no server runs on it; run `tinyfleet server start`, or give "
            "another folder with --data or an endpoint with --endpoint"
        )
    prepare(data)
    return EmbeddedStore(graph)


def remote_store(server: Mapping[str, str]) -> RemoteStore:
    """The graph of the server that `find_server` found."""
    ca = Path(server["ca"]) if "ca" in server else None
    return RemoteStore(server["endpoint"], server.get("token"), ca=ca)
