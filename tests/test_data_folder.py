"""The data folder's version: older folders are migrated, also after a kill; newer ones are an error."""

import json
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tinyfleet.edge.errors import UserError
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store import data_folder
from tinyfleet.ontology.store.column_index import IndexedStore
from tinyfleet.ontology.store.store import EmbeddedStore
from tinyfleet.ontology.vocabulary.namespaces import TF, device_iri

GOLDEN = Path(__file__).with_name("golden")
OLD_TERMS = ("adoptBytes", "asked", "malformed", "samples", "stale")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A data folder as version 1 wrote it: a server, two virtual devices, a third one described by hand, two runs, a
    deployment, a measurement and a lamp in the directory of things."""
    with tarfile.open(GOLDEN / "data-folder-1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "data"


def backups(data: Path) -> list[Path]:
    return sorted(data.parent.glob(f"{data.name}.version-*"))


def check_contents(data: Path) -> None:
    """The graph answers in the current terms with the values of the old one."""
    with IndexedStore(data / data_folder.GRAPH) as store:
        used = set(store.query("SELECT DISTINCT ?p { { ?s ?p ?o } UNION { GRAPH ?g { ?s ?p ?o } } }").column("p"))
        assert not used & {TF[name] for name in OLD_TERMS}
        assert store.query(library.text("troubled")).column("id") == ["cellar"]
        (cellar,) = store.query(library.text("troubled"))
        assert (cellar["malformed"], cellar["stale"]) == (3, 2)
        assert [row["selected"] for row in store.query(library.text("rounds"))] == [2, 2, 2]
        taken = {(row["id"], row["samples"]) for row in store.query(library.text("participants"))}
        assert taken == {(f"kitchen-{i}", n) for i in range(2) for n in (160, 320)}
        (slot,) = store.query(f"SELECT ?n {{ <{device_iri('home', 'cellar')}> <{TF.modelSlotBytes}> ?n }}").column("n")
        assert slot == 0
        documents = store.query(f"SELECT ?d {{ GRAPH ?g {{ ?s <{TF.document}> ?d }} }}").column("d")
        keys: set[str] = set().union(*(json.loads(str(text)) for text in documents))
        assert len(documents) == 4 and "tf:modelSlotBytes" in keys and "tf:adoptBytes" not in keys


def test_a_folder_of_version_1_is_backed_up_and_migrated(old: Path) -> None:
    with EmbeddedStore(old / "graph") as store:
        before = len(store)
    lines: list[str] = []
    data_folder.prepare(old, lines.append)
    assert data_folder.read_version(old) == data_folder.VERSION == 2
    (backup,) = backups(old)
    assert ".version-1.2" in backup.name
    assert len(lines) == 3 and str(backup) in lines[1] and f"{before:,} triples" in lines[2]
    assert sorted(path.name for path in old.iterdir()) == ["broker", "graph", "version"]
    check_contents(old)
    with EmbeddedStore(backup / "graph") as store:  # as the old release left it
        assert len(store) == before
        assert store.ask(f"ASK {{ ?s <{TF.adoptBytes}> ?o ; <{TF.samples}> ?n }}")
    assert data_folder.read_version(backup) == 1

    data_folder.prepare(old, lines.append)
    assert len(lines) == 3 and backups(old) == [backup], "a current folder is left alone"


def test_a_command_that_opens_the_folder_migrates_it(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with data_folder.open_store(old) as store:
        assert [row["id"] for row in store.query(library.text("devices"))] == ["cellar", "kitchen-0", "kitchen-1"]
    assert "version 1" in capsys.readouterr().err


MIGRATE = """
import os, signal, sys
from pathlib import Path
from tinyfleet.ontology.store import data_folder

stop, calls = int(sys.argv[2]), 0

def kill_at(name):
    real = getattr(os, name)
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(os, name, call)

for name in ("mkdir", "replace", "rename", "unlink", "rmdir", "sync", "open", "link"):
    kill_at(name)
data_folder.prepare(Path(sys.argv[1]))
print(calls)
"""


def test_a_migration_that_is_killed_is_completed_by_the_next_start(old: Path, tmp_path: Path) -> None:
    def migrate(data: Path, stop: int) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", MIGRATE, str(data), str(stop)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    whole = tmp_path / "whole" / "data"
    shutil.copytree(old, whole)
    calls = int(migrate(whole, 0).stdout)
    assert calls > 10
    for stop in range(1, calls + 1):  # at every call of the operating system that changes a folder
        data = tmp_path / f"killed-{stop}" / "data"
        shutil.copytree(old, data)
        assert migrate(data, stop).returncode == -signal.SIGKILL
        data_folder.prepare(data, lambda line: None)
        assert data_folder.read_version(data) == data_folder.VERSION
        assert not [path for path in data.iterdir() if path.name in ("graph.new", "graph.old")]
        assert not [path for path in backups(data) if path.name.endswith(".unfinished")]
        check_contents(data)
        for backup in backups(data):
            with EmbeddedStore(backup / "graph") as store:
                assert store.ask(f"ASK {{ ?s <{TF.adoptBytes}> ?o }}")
        shutil.rmtree(data.parent)


def test_a_folder_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    data_folder.prepare(tmp_path / "data")
    (tmp_path / "data" / "version").write_text("3\n")
    for use in (data_folder.prepare, lambda data: data_folder.open_store(data, create=True)):
        with pytest.raises(UserError, match=r"has version 3, and this release .* up to 2; upgrade TinyFleet"):
            use(tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["version"]


@pytest.mark.parametrize("text", ["", "two", "0", "-1"])
def test_a_damaged_version_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "version").write_text(text)
    with pytest.raises(UserError, match="does not hold the version"):
        data_folder.prepare(tmp_path)


def test_a_folder_in_use_is_not_migrated(old: Path) -> None:
    with EmbeddedStore(old / "graph"), pytest.raises(UserError, match="in use"):
        data_folder.prepare(old, lambda line: None)
    assert not backups(old)
    assert data_folder.read_version(old) == 1


def test_a_new_folder_gets_the_current_version(tmp_path: Path) -> None:
    logged: list[Any] = []
    data_folder.prepare(tmp_path / "a" / "data", logged.append)
    assert (tmp_path / "a" / "data" / "version").read_text() == "2\n"
    assert logged == []
