"""`tinyfleet demo`, whole and interrupted; what `tinyfleet run start` says to mistakes; the plot."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from tinyfleet.__main__ import main
from tinyfleet.edge import tasks
from tinyfleet.ontology.ingest.lineage import Participation
from tinyfleet.server.demo import why_no_board
from tinyfleet.server.evaluate import Score
from tinyfleet.server.run_report import plot
from tinyfleet.server.training_run import Round

ROOT = Path(__file__).parents[1]


def start(data: Path, *words: str, board: bool = False) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tinyfleet", "demo", "--devices", "2", "--clients-per-round", "2", *words]
    command += [] if board else ["--no-board"]
    return subprocess.Popen(
        [*command, "--data", str(data)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_the_demo_shows_a_fleet_from_its_devices_to_its_graph(tmp_path: Path) -> None:
    demo = start(tmp_path / "demo", "--rounds", "2")
    said, wrong = demo.communicate(timeout=120)
    assert demo.returncode == 0, wrong
    assert "all 3 announced themselves" in said and "tf:currentModel ?model" in said
    assert re.search(r"TinyMetaFed round 2/2: 2/2 clients, loss \d.*, up .*, down ", said)
    for start_from in ("meta-learned (TinyMetaFed)", "random weights", "FedAvg's global model"):
        assert len(re.findall(r"\d%", next(line for line in said.splitlines() if start_from in line))) == 6
    assert "of the dense" in said and "RAM of the" in said
    assert (tmp_path / "demo" / "digits.png").read_bytes().startswith(b"\x89PNG")
    can_train, last_round, lineage = said.split("tinyfleet query ")[1:]
    assert all(device in can_train for device in ("pi", "device-0", "device-1"))
    assert "2 rows" in last_round and "loss" in last_round
    assert "3 rows" in lineage


@pytest.mark.slow
def test_the_demo_with_an_emulated_board(tmp_path: Path) -> None:
    if why_no_board() is not None:
        pytest.skip(str(why_no_board()))
    demo = start(tmp_path / "demo", "--rounds", "3", "--clients-per-round", "4", board=True)
    said, wrong = demo.communicate(timeout=180)
    assert demo.returncode == 0, wrong
    assert "all 4 announced themselves" in said and "3/3: 4/4 clients" in said
    assert re.search(r"^board +mps2-an386 ", said, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(
    not (os.environ.get("TINYFLEET_DATA") and Path(os.environ["TINYFLEET_DATA"], "omniglot").is_dir()),
    reason="Omniglot is not in TINYFLEET_DATA",
)
def test_the_demo_on_omniglot(tmp_path: Path) -> None:
    demo = start(tmp_path / "demo", "--rounds", "3", "--task", "omniglot")
    said, wrong = demo.communicate(timeout=180)
    assert demo.returncode == 0, wrong
    assert "TinyMetaFed round 3/3: 2/2 clients" in said
    assert (tmp_path / "demo" / "omniglot.png").exists()


def test_a_machine_without_an_emulator_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_no_board() == (
        "arm-none-eabi-gcc and qemu-system-arm not installed "
        "(apt-get install gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm)"
    )


def test_a_demo_that_is_terminated_leaves_no_process_behind(tmp_path: Path) -> None:
    demo = start(tmp_path / "demo", "--rounds", "100000")
    assert demo.stdout is not None
    port = 0
    for line in demo.stdout:
        if found := re.match(r"broker .*:(\d+)$", line):
            port = int(found[1])
        if "round 1/" in line:
            break
    demo.send_signal(signal.SIGTERM)
    demo.communicate(timeout=30)
    assert demo.returncode == 143 and port
    for device in ("device", "agent"):
        assert "stopped; " in (tmp_path / "demo" / f"{device}.log").read_text()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the broker is still there"


def said_to(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of error that a command ends with."""
    monkeypatch.setattr(sys, "argv", ["tinyfleet", *words])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_the_demo_deletes_nothing_that_is_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "name another folder with --data" in said_to(["demo", "--data", str(tmp_path)], monkeypatch, capsys)
    assert (tmp_path / "thesis.txt").exists()


def test_what_run_cannot_use_is_said_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> str:
        return said_to(["run", "start", "--data", str(tmp_path), *words], monkeypatch, capsys)

    good, cut, empty, array, other = (tmp_path / f"{name}.npz" for name in ("good", "cut", "empty", "array", "other"))
    program = tasks.load("digits").program
    np.savez(good, **program.split(program.initial(0)))
    cut.write_bytes(good.read_bytes()[:500])
    empty.write_bytes(b"")
    with array.open("wb") as file:
        np.save(file, program.initial(0))
    np.savez(other, weights=np.zeros(program.n_params))
    assert "no server runs on" in run("--initialization", str(good))
    for bad in (cut, empty, array, tmp_path / "none.npz"):
        assert "give a file that `tinyfleet run start --out` wrote" in run("--initialization", str(bad))
    assert "give a file of the same task" in run("--initialization", str(other))
    assert "there is no folder" in run("--out", str(tmp_path / "nowhere" / "initialization.npz"))
    assert "reptile does not use --proximal-mu: leave it out, or choose" in run(
        "--strategy", "reptile", "--proximal-mu", "0.1"
    )
    assert "tinyreptile does not use --local-head/--no-local-head" in run(
        "--strategy", "tinyreptile", "--no-local-head"
    )
    (tmp_path / "server.json").write_text(json.dumps({"endpoint": "http://127.0.0.1:9/sparql", "broker": "x:1"}))
    assert "nor is it a query of the library" in run("--select", "no-such.rq")
    for name in ("a b", "x" * 33):
        assert "is not a valid fleet name; use 1 to 32 letters" in run("--fleet", name)
    assert "no MQTT broker answers at mqtts://x:1" in run()


def test_a_method_has_one_colour_in_the_whole_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _path, **_: figures.append(figure))
    rounds = [Round(i, 1, [Participation("a", loss=1 / i)], {}, {}, 1000, 1000, 9256, 0.1) for i in (1, 2)]
    scores = [Score(shots, np.array([0.5, 0.6])) for shots in (1, 5)]
    starts = {"meta-learned (TinyMetaFed)": scores, "random weights": scores, "FedAvg's global model": scores}
    plot(tmp_path / "plot.png", "title", {"TinyMetaFed": rounds, "FedAvg": rounds}, starts)
    learning, adapting = figures[0].axes
    meta, fedavg = (to_hex(line.get_color()) for line in learning.get_lines())
    shown = [to_hex(bars[0].get_color()) for bars in adapting.containers]
    assert meta != fedavg and shown == [meta, to_hex("grey"), fedavg]
    assert [list(line.get_xdata()) for line in learning.get_lines()] == [[1, 2]] * 2, "kB sent"
    plot(tmp_path / "plot.png", "title", {"learned": rounds[1:]}, {"learned": scores}, by_round=True)
    learning, adapting = figures[1].axes
    (line,) = learning.get_lines()
    assert list(line.get_xdata()) == [2] and to_hex(adapting.containers[0][0].get_color()) == to_hex(line.get_color())
