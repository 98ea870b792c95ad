"""The catalogue of boards: how public board files are read, and which are rejected."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tinyfleet.edge.errors import UserError
from tinyfleet.ontology.graph_cli import app
from tinyfleet.ontology.ingest import board_catalogue
from tinyfleet.ontology.store.store import EmbeddedStore, triples
from tinyfleet.ontology.vocabulary import shapes
from tinyfleet.ontology.vocabulary.namespaces import TF, board_iri, property_iri

PARTS = "part,observed_properties\nhts221,temperature;relative-humidity\n"
HEAD = "id,name,vendor,mcu,cpu,clock_hz,ram_bytes,flash_bytes,connectivity,ram_note\n"
ROW = "one,Board One,Maker,stm32,cortex-m4,64000000,65536,524288,WiFi;bluetooth,\n"
CORE = {
    "id": "two", "name": "Board Two", "vendor": "Maker", "mcu": "nrf52840", "cpu": "cortex-m4", "clock_hz": 64_000_000,
    "ram_bytes": 262_144, "flash_bytes": 983_040, "connectivity": ["bluetooth"], "sources": ["somewhere"],
    "sensors": [{"part": "HTS221"}, {"part": "unheard of"}],
}  # fmt: skip


def folder(path: Path, rows: str = ROW, core: object = None) -> Path:
    (path / "platformio_boards.csv").write_text(HEAD + rows, encoding="utf-8")
    (path / "core_boards.json").write_text(json.dumps([CORE] if core is None else core), encoding="utf-8")
    (path / "sensor_parts.csv").write_text(
        "part,observed_properties\nhts221,temperature;relative-humidity\n", encoding="utf-8"
    )
    return path


def test_files_become_a_graph(tmp_path: Path) -> None:
    made = board_catalogue.read_board_catalogue(folder(tmp_path))
    assert (made.boards, made.parts, made.rejected) == (2, 1, {})
    one, two = made.facts[board_iri("one")], made.facts[board_iri("two")]
    assert (one[TF.ramBytes], one[TF.connectivity]) == ([65_536], ["bluetooth", "wifi"])
    assert TF.observes not in one
    assert set(two[TF.observes]) == {property_iri("temperature"), property_iri("relative-humidity")}  # type: ignore[arg-type]
    assert shapes.violations(triples(made.facts)) == []


def test_what_cannot_be_right_is_refused_and_the_rest_taken(tmp_path: Path) -> None:
    rows = (
        ROW
        + ROW  # the same again is no harm
        + ROW.replace("65536", "65537")
        + ROW.replace("one", "doubtful").replace(",\n", ",suspect: external RAM\n")
        + ROW.replace("one", "no-ram").replace("65536", "")
        + ROW.replace("one", "bad name")
        + ROW.replace("one", "two")
        + ROW.replace("one", "no-clock").replace("64000000", "")
    )
    made = board_catalogue.read_board_catalogue(folder(tmp_path, rows))
    assert made.boards == 3
    assert made.facts[board_iri("two")][TF.ramBytes] == [262_144], "what more is known of takes the row's place"
    assert made.facts[board_iri("no-clock")][TF.clockHz] is None
    assert set(made.rejected) == {"one (again)", "doubtful", "no-ram", "bad name"}
    assert "suspect: external RAM" in made.rejected["doubtful"]
    assert "tf:ramBytes" in made.rejected["no-ram"]


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sensor_parts\.csv cannot be read"):
        board_catalogue.read_board_catalogue(tmp_path)
    folder(tmp_path, ROW.replace("65536", "64 KB"))
    with pytest.raises(UserError, match="ram_bytes of one is not a whole number"):
        board_catalogue.read_board_catalogue(tmp_path)
    folder(tmp_path, "one,Board\n")
    with pytest.raises(UserError, match="incomplete row"):
        board_catalogue.read_board_catalogue(tmp_path)
    folder(tmp_path, core=[{"id": "x"}])
    with pytest.raises(UserError, match="is not a list of boards"):
        board_catalogue.read_board_catalogue(tmp_path)
    folder(tmp_path)
    (tmp_path / "platformio_boards.csv").write_text("id,name\nx,y\n")
    with pytest.raises(UserError, match="has no column vendor, mcu"):
        board_catalogue.read_board_catalogue(tmp_path)


def test_a_file_is_made_and_loaded_and_loading_again_changes_nothing(tmp_path: Path) -> None:
    out, data = tmp_path / "build/boards.ttl", tmp_path / "data"
    done = CliRunner().invoke(app, ["build-catalogue", str(folder(tmp_path)), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    sizes = []
    for _ in range(2):
        assert CliRunner().invoke(app, ["load", str(out), "--data", str(data)]).exit_code == 0
        with EmbeddedStore(data / "graph") as store:
            sizes.append(len(store))
    assert sizes == [report["triples"]] * 2
    (tmp_path / "bad.nt").write_text(out.read_text().replace("tf:ramBytes 65536", "tf:ramBytes 0"))
    (tmp_path / "bad.nt").rename(tmp_path / "bad.ttl")
    done = CliRunner().invoke(app, ["load", str(tmp_path / "bad.ttl"), "--data", str(data)])
    assert isinstance(done.exception, UserError) and "tf:ramBytes" in str(done.exception)
    (tmp_path / "blank.ttl").write_text("[] <urn:p> 5 .")
    done = CliRunner().invoke(app, ["load", str(tmp_path / "blank.ttl"), "--data", str(data)])
    assert isinstance(done.exception, UserError) and "blank node" in str(done.exception)


def test_what_was_measured_is_written_and_nothing_else(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    model = "0123456789abcdef"
    said = ["add-measurement", model, "--board", "nano33ble", "--data", data]
    for more in (["--latency", "0.5"], ["--latency", "0.012", "--instructions", "700000"]):
        assert CliRunner().invoke(app, [*said, *more]).exit_code == 0
    assert CliRunner().invoke(app, [*said, "--emulated", "--instructions", "700000"]).exit_code == 0
    for wrong, reason in ([], "nothing was measured"), (["--energy", "0"], "leave it out"):
        done = CliRunner().invoke(app, [*said, *wrong])
        assert isinstance(done.exception, UserError) and reason in str(done.exception)
    with EmbeddedStore(tmp_path / "data/graph") as store:
        rows = store.query(
            """PREFIX tf: <https://w3id.org/tinyfleet#>
            SELECT ?emulated ?latency ?instructions ?energy {
              ?it a tf:Measurement ; tf:ofModel ?model ; tf:onBoard ?board ; tf:emulated ?emulated .
              OPTIONAL { ?it tf:latencySeconds ?latency } OPTIONAL { ?it tf:instructions ?instructions }
              OPTIONAL { ?it tf:energyJoules ?energy } } ORDER BY ?emulated"""
        )
    assert list(rows) == [
        {"emulated": False, "latency": 0.012, "instructions": 700_000},
        {"emulated": True, "instructions": 700_000},
    ]


def test_the_public_catalogue(tmp_path: Path) -> None:
    path = Path(os.environ.get("TINYFLEET_DATA", "")) / "boards"
    if "TINYFLEET_DATA" not in os.environ or not path.is_dir():
        pytest.skip("TINYFLEET_DATA has no boards/")
    made = board_catalogue.read_board_catalogue(path)
    assert made.boards == 1_131, "1,143 rows, two boards of which come twice with different figures, ten doubtful"
    assert sum("suspect" in reason for reason in made.rejected.values()) == 10
    assert sum("(again)" in board for board in made.rejected) == 2
    sensing = [s for s, said in made.facts.items() if TF.observes in said]
    assert len(sensing) == 16
