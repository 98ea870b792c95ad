"""Firmware for emulated boards: what is built, what it computes, and what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from firmware_fixtures import FLEET, ID, NEEDS_TOOLS, ROOT, mlp, samples
from small_models import MODELS

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model import layers
from tinyfleet.edge.mote.build_extension import INCLUDES
from tinyfleet.edge.tasks import ClientData
from tinyfleet.firmware_tools.boards import catalogue
from tinyfleet.firmware_tools.firmware import build, emulate, stack
from tinyfleet.firmware_tools.firmware.size import FirmwareSize, read_size
from tinyfleet.server.fleet_server import FleetServer

BOARDS = ["mps2-an385", "mps2-an386", "mps2-an500"]
STATE = 40  # bytes of mote_t on a 32-bit target

pytestmark = NEEDS_TOOLS


@pytest.mark.parametrize("board", BOARDS)
def test_firmware_fits_its_board_and_the_arena_is_the_planned_one(board: str, firmware: Callable[[str], Path]) -> None:
    size = read_size(firmware(board))
    target = catalogue.load_board(board).buildable()
    assert size.board == board
    assert size.arena == size.planned_arena == mlp().arena_bytes
    assert size.held["program"] == len(mlp().data)
    assert size.held["features"] == 60 * 64
    assert 10_000 < size.flash < target.flash.bytes
    assert size.arena < size.ram < target.ram.bytes


def test_firmware_uses_neither_malloc_nor_stdio(firmware: Callable[[str], Path]) -> None:
    done = subprocess.run(["arm-none-eabi-nm", firmware("mps2-an386")], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in done.stdout.splitlines()}
    assert "mote_learn" in names
    assert not names & {"malloc", "_malloc_r", "free", "_sbrk", "printf", "puts", "_write", "exit"}


def test_an_image_holds_the_operators_that_its_program_needs(tmp_path: Path) -> None:
    target, net = catalogue.load_board("mps2-an386"), mlp()
    elf = build.build_benchmark(target, net, tmp_path / "bench.elf", steps=1)
    names = subprocess.run(["arm-none-eabi-nm", elf], capture_output=True, text=True, check=True).stdout
    assert "mote_dense_back" in names and "mote_relu" in names
    assert not {"mote_conv2d", "mote_int8_dense", "mote_tanh", "mote_huber"} & set(names.split())
    size = read_size(elf)
    assert size.mote.keys() >= {"mote.c", "mote_load.c", "mote_dense.c"}
    assert sum(size.mote.values()) < size.text - len(net.data)


def test_a_device_that_keeps_its_model_is_smaller(firmware: Callable[[str], Path], tmp_path: Path) -> None:
    kept = build.build("mps2-an386", mlp(), samples(), FLEET, ID, tmp_path, model_slot_bytes=0)
    assert read_size(kept).text < read_size(firmware("mps2-an386")).text - 10_000


def whole_image(board: str, profile: build.Profile, elf: Path) -> FirmwareSize:
    """Of an image with all operators that the engine has."""
    sources = [build.SOURCES / "main_bench.c", build.SOURCES / "bench_mote.c", build.SOURCES / "semihost.c"]
    target, net = catalogue.load_board(board), mlp()
    defines = {"arena_bytes": net.arena_bytes, "inputs": 64, "outputs": 5, "steps": 1}
    build.link(target, elf, [*sources, *build.ENGINE], blobs={"program": net.data}, defines=defines, profile=profile)
    return read_size(elf)


@pytest.mark.parametrize("board", ["microbit", "mps2-an385", "mps2-an386"])
@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_what_the_engine_takes_beyond_its_arena_is_bounded(profile: build.Profile, board: str, tmp_path: Path) -> None:
    """Of any model: with all operators that the engine has, its state and its stack take at most 512 bytes."""
    size = whole_image(board, profile, tmp_path / "whole.elf")
    assert set(size.depths) == {"mote_load", "mote_infer", "mote_loss", "mote_learn", "mote_learn_with"}
    assert {"mote_conv2d_back", "mote_int8_conv2d"} <= set(size.frames)
    assert {name: depth for name, depth in size.depths.items() if depth.bytes + STATE > 512} == {}
    assert size.static == 0


@pytest.mark.parametrize("model", ["mlp", "cnn", "separable", "int8_with_head", "quantised_training"])
def test_an_image_takes_the_planned_arena_and_little_beside_it(model: str, tmp_path: Path) -> None:
    """Read from the linked image: the arena is the plan's, to the byte; the engine's state, what variables of its own
    it has (none) and the deepest of its calls take at most 512 bytes. That is all of the RAM but the bench's own."""
    net = MODELS[model]()
    elf = build.build_benchmark(catalogue.load_board("mps2-an386"), net, tmp_path / "bench.elf", steps=1)
    size = read_size(elf)
    assert size.arena == size.planned_arena == net.arena_bytes
    symbols = subprocess.run(["arm-none-eabi-nm", "-S", elf], capture_output=True, text=True, check=True).stdout
    (state,) = (int(row[1], 16) for line in symbols.splitlines() if (row := line.split())[2:] == ["b", "m"])
    assert 0 < state <= STATE
    assert size.static == 0
    deepest = max(depth.bytes for depth in size.depths.values())
    assert 0 < state + size.static + deepest <= 512
    sample = 4 * net.input.size + 4 * net.output.size
    assert size.data + size.bss <= net.arena_bytes + state + sample + 64  # a few counters of the bench's


@pytest.mark.parametrize(
    ("core", "board"),
    [("M0", "microbit"), ("M3", "mps2-an385"), ("M4F, M7F, M33", "mps2-an386"), ("M55", "mps3-an547")],
)
def test_the_stack_is_at_most_what_the_document_says(core: str, board: str, tmp_path: Path) -> None:
    """No recursion, no arrays of variable length (the build fails), no call to who knows where: all is summed up."""
    rows = [line.split("|")[1:-1] for line in (ROOT / "docs" / "reference" / "engine.md").read_text().splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows if len(row) == 5]
    column = next(row for row in cells if row[0] == "stack in bytes").index(core)
    stated = {row[0].strip("`"): int(row[column]) for row in cells if row[0].startswith("`mote_")}
    depths = whole_image(board, "exact", tmp_path / "whole.elf").depths
    assert stated.keys() == depths.keys()
    for name, depth in depths.items():
        assert depth.bytes <= stated[name], f"{name}: {depth.calls}; change docs/reference/engine.md, or the code"


def test_the_state_is_40_bytes(tmp_path: Path) -> None:
    source = tmp_path / "state.c"
    source.write_text(f'#include "mote.h"\ntypedef char state[sizeof(mote_t) == {STATE} ? 1 : -1];\nstate s;\n')
    command = ["arm-none-eabi-gcc", "-mcpu=cortex-m0", "-mthumb", f"-I{INCLUDES[0]}", "-c", source]
    subprocess.run([*command, "-o", tmp_path / "state.o"], check=True)


def test_recursion_pointers_and_frames_of_unknown_size_are_found(tmp_path: Path) -> None:
    source = tmp_path / "deep.c"
    for body, why in (
        ("int mote_load(int n) { return n ? mote_load(n - 1) * n + mote_load(n / 2) : 1; }", "mote_load calls itself"),
        ("int use(char *); int mote_load(int n) { char a[n]; return use(a); }", "frame of mote_load has no known size"),
        ("int mote_load(int (*f)(int)) { return f(1) + 1; }", "mote_load calls through a pointer that can be anything"),
    ):
        source.write_text(body)
        command = ["arm-none-eabi-gcc", "-O2", stack.FLAG, "-c", source, "-o", tmp_path / "deep.o"]
        subprocess.run(command, check=True)
        with pytest.raises(ValueError, match=why):
            stack.usage([tmp_path / "deep.ci"], [])


def test_a_training_step_is_counted_in_instructions() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "instructions.py", "--json", "--models", "MLP", "conv"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    rows = {(row["model"], row["profile"]): row for row in json.loads(done.stdout)["rows"]}
    exact, fast = (rows["MLP 64-32-10", profile] for profile in ("exact", "fast"))
    assert exact["beyond_parameters"] == 296
    assert 5_000 < exact["infer"] < exact["learn_least"] < exact["learn"] < exact["learn_most"] < 26_500
    assert fast["learn"] < 20_000
    assert exact["mote_text"] <= 6 * 1024
    assert exact["learn"] / exact["infer"] < 2.2
    conv = rows["conv 3x3x8, max pool, dense 10 on 12x12", "fast"]
    assert conv["learn"] < 60_000
    assert exact["reference"] > exact["learn"] and conv["reference"] > conv["learn"]


# ------------------------------------------------------------------------------------------------ bad input


def test_an_unknown_board_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no board named 'uno'.*microbit, mps2-an385, mps2-an386"):
        catalogue.load_board("uno")


def test_a_board_without_firmware_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no firmware is built for board 'raspberry-pi-4'.*mps2-an386"):
        build.build("raspberry-pi-4", mlp(), samples(), FLEET, ID, tmp_path)
    with pytest.raises(
        UserError, match=r"no driver for that of board 'microbit'; boards with one: mps2-an385, mps2-an3"
    ):
        build.build("microbit", mlp(), samples(), FLEET, ID, tmp_path)
    with pytest.raises(UserError, match=r"there is no emulator for board 'raspberry-pi-4'"):
        emulate.Emulator(catalogue.load_board("raspberry-pi-4"), tmp_path / "none.elf")


def test_a_damaged_board_file_is_refused_with_the_entry(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    good = (catalogue.FOLDER / "mps2-an386.toml").read_text()
    path.write_text(good.replace("ram_bytes = 4_194_304", 'ram_bytes = "4 MB"'))
    with pytest.raises(UserError, match=r"x\.toml: 'ram_bytes' must be a int.*'4 MB'"):
        catalogue.read_board_file(path)


@pytest.mark.parametrize(("fleet", "id"), [("home/garden", ID), (FLEET, "#"), (FLEET, "")])
def test_a_name_that_cannot_be_in_a_topic_is_refused(fleet: str, id: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"name is 1 to 32 letters"):
        build.build("mps2-an386", mlp(), samples(), fleet, id, tmp_path)


def test_a_missing_compiler_or_emulator_is_named_with_its_package(
    firmware: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elf = firmware("mps2-an386")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"apt-get install gcc-arm-none-eabi libnewlib-arm-none-eabi"):
        build.build("mps2-an386", mlp(), samples(), FLEET, ID, tmp_path)
    with pytest.raises(UserError, match=r"apt-get install qemu-system-arm"):
        emulate.Emulator(catalogue.load_board("mps2-an386"), elf)


def test_a_program_larger_than_the_board_is_refused_by_how_much(tmp_path: Path) -> None:
    data = ClientData(np.zeros((12, 1000), np.uint8), np.arange(0, 13, 2, dtype=np.uint32), 1.0, 5)
    large = layers.build([layers.Dense(1100), layers.ReLU(), layers.Dense(5)], (1000,), "softmax_cross_entropy")
    with pytest.raises(UserError, match=r"too large for board 'mps2-an386'.* [\d,]+ bytes more RAM than its 4,194,304"):
        build.build("mps2-an386", large, data, FLEET, ID, tmp_path)
    many = ClientData(np.zeros((70_000, 64), np.uint8), np.array([0, 35_000, 70_000], np.uint32), 1.0, 2)
    with pytest.raises(UserError, match=r" [\d,]+ bytes more flash than its 4,194,304"):
        build.build("mps2-an386", mlp(), many, FLEET, ID, tmp_path)


def test_samples_of_another_size_than_the_model_takes_are_refused(tmp_path: Path) -> None:
    other = layers.build([layers.Dense(5)], (32,), "softmax_cross_entropy")
    with pytest.raises(UserError, match=r"the samples have 64 features and the model takes 32"):
        build.build("mps2-an386", other, samples(), FLEET, ID, tmp_path)


def test_what_is_not_firmware_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "readme.txt"
    text.write_text("hello")
    for path in (text, Path("/bin/sh"), tmp_path / "nothing.elf"):
        with pytest.raises(UserError, match=r"tinyfleet firmware build"):
            read_size(path)


def test_the_known_boards_go_into_the_graph(tmp_path: Path) -> None:
    with FleetServer(tmp_path, "test", port=0) as server:
        words = ["-m", "tinyfleet", "firmware", "boards", "--add-to-graph", "--json", "--data", str(tmp_path)]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
        assert {board["id"] for board in json.loads(done.stdout)} == set(catalogue.board_ids())
        rows = server.store.query(
            "PREFIX tf: <https://w3id.org/tinyfleet#> SELECT ?ram { ?b tf:boardId 'mps2-an386' ; tf:ramBytes ?ram }"
        )
        assert rows.column("ram") == [4_194_304]
