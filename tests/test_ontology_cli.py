"""`tinyfleet query` as a user types it: against a running server, against the graph on disk, and with mistakes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import free_port
from ontology_fixtures import MODEL, description, payload, status

from tinyfleet.edge.wire.server_info import SERVER_FILE
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.http.access import Access
from tinyfleet.ontology.http.endpoint import Endpoint
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.store.data_folder import open_store
from tinyfleet.ontology.store.store import EmbeddedStore

ROOT = Path(__file__).parents[1]


def fill(store: EmbeddedStore) -> None:
    registry = Registry(store, "home")
    for device in ("dev-1", "dev-2"):
        registry.ingest_one(Topics("home").td(device), payload(description(device)))
        registry.ingest_one(Topics("home").status(device), status())


@pytest.fixture(params=["disk", "server"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with open_store(tmp_path, create=True) as store:
        fill(store)
        if request.param == "server":
            with Endpoint(store, Access.of_token("unknown", "read")) as endpoint:
                (tmp_path / SERVER_FILE).write_text(json.dumps({"endpoint": endpoint.url}))
                yield tmp_path
            return
    yield tmp_path


def query(*arguments: object, data: Path | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "tinyfleet/__main__.py"), "query", *map(str, arguments)]
    if data is not None:
        command += ["--data", str(data)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"COLUMNS": "200", "PATH": ""})


def test_rows_come_as_a_table_and_as_json(data: Path) -> None:
    sparql = "SELECT ?id ?board ?arena { ?d tf:deviceId ?id ; tf:board ?board ; tf:arenaBytes ?arena } ORDER BY ?id"
    table = query("--sparql", sparql, data=data)
    assert table.returncode == 0, table.stderr
    lines = [line.split() for line in table.stdout.splitlines()]
    assert lines[0] == ["id", "board", "arena"]
    assert lines[1] == ["dev-1", "https://w3id.org/tinyfleet/board/nano33ble", "65536"]
    assert lines[-1] == ["2", "rows"]
    rows = json.loads(query("--sparql", sparql, "--json", data=data).stdout)
    assert [row["arena"] for row in rows] == [65_536, 65_536]


def test_a_query_of_the_library_or_of_a_file_takes_parameters(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.rq"
    file.write_text("PREFIX tf: <https://w3id.org/tinyfleet#> SELECT ?id { VALUES ?model { UNDEF } "
                    "VALUES ?arena { UNDEF } ?d tf:currentModel ?model ; tf:arenaBytes ?arena ; "
                    "tf:deviceId ?id }")  # fmt: skip
    model = f"model=urn:tinyfleet:model:{MODEL.hex()}"
    found = query(file, "--param", model, "--param", "arena=65536", "--json", data=data)
    assert len(json.loads(found.stdout)) == 2
    assert json.loads(query(file, "--param", "arena=1", "--json", data=data).stdout) == []
    assert json.loads(query("clients", "--param", "fleet=home", "--json", data=data).stdout) == []


def test_the_other_forms_of_query(tmp_path: Path) -> None:
    with open_store(tmp_path, create=True) as store:
        fill(store)
    assert query("--sparql", "ASK { ?d tf:online true }", data=tmp_path).stdout == "true\n"
    turtle = query("--sparql", "CONSTRUCT { ?d tf:online ?o } WHERE { ?d tf:online ?o }", data=tmp_path).stdout
    assert "tf:online true" in turtle
    assert "last-round" in query("--list").stdout
    assert json.loads(query("--list", "--json").stdout)["clients"]["parameters"] == ["model", "fleet"]


def test_what_a_device_says_cannot_steer_the_terminal(tmp_path: Path) -> None:
    with open_store(tmp_path, create=True) as store:
        Registry(store, "home").ingest_one(
            Topics("home").td("d"), payload(description("d", title="\x1b]0;x\x07[red]\r"))
        )
    shown = query("--sparql", "SELECT ?t { ?d a tf:Device ; td:title ?t }", data=tmp_path).stdout
    assert "[red]" in shown
    assert "\x1b" not in shown and "\x07" not in shown and "\r" not in shown


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "give a query"),
        (("clients", "--sparql", "ASK {}"), "give a query"),
        (("no-such.rq",), "nor is it a query of the library; `tinyfleet query --list` shows them"),
        (("client",), "nor is it a query of the library, did you mean 'clients'?"),
        (("offline", "--param", "before=2026-13-01T00:00:00Z"), "is not a date and time; write 2026-01-31T12:00:00Z"),
        ((".",), "cannot be read"),
        (("--sparql", "SELECT ?s {"), "not valid SPARQL: error at 1:"),
        (("clients", "--param", "model"), "NAME=VALUE"),
        (("clients", "--param", "modle=urn:x"), "no parameter 'modle': it has model, fleet"),
        (("clients", "--param", "model=urn:x y"), "cannot be a term"),
        (("clients", "--data", "nowhere"), "run `tinyfleet server start`"),
        (("clients", "--endpoint", "http://127.0.0.1:9/sparql"), "is the server running?"),
        (("clients", "--endpoint", "somewhere"), "must begin with http"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    with open_store(tmp_path, create=True):
        pass
    done = query(*arguments, data=None if "--data" in arguments else tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_graph_that_another_process_has_open_is_said(tmp_path: Path) -> None:
    with open_store(tmp_path, create=True):
        done = query("clients", data=tmp_path)
    assert (done.returncode, "in use by another process" in done.stderr) == (2, True)


def test_a_damaged_server_file_is_said(tmp_path: Path) -> None:
    (tmp_path / SERVER_FILE).write_text("{}")
    done = query("clients", data=tmp_path)
    assert (done.returncode, "start the server again" in done.stderr) == (2, True)


def test_the_address_of_a_server_that_has_died_is_passed_over(tmp_path: Path) -> None:
    with open_store(tmp_path, create=True) as store:
        fill(store)
    (tmp_path / SERVER_FILE).write_text(json.dumps({"endpoint": f"http://127.0.0.1:{free_port()}/sparql"}))
    assert query("--sparql", "ASK { ?d tf:online true }", data=tmp_path).stdout == "true\n"
