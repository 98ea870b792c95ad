"""What fits where: the library's queries beside a plain reference, over random fleets; and as a user asks for it."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ontology_fixtures import description, payload, status

from tinyfleet.edge.model.layers import Dense, ReLU, build
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.ingest import describe
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.queries import library, matching
from tinyfleet.ontology.store.data_folder import open_store
from tinyfleet.ontology.store.store import Binding, EmbeddedStore, Store
from tinyfleet.ontology.vocabulary.namespaces import RDF, SCHEMA, TD, TF, Iri, board_iri, device_iri, model_iri

ROOT = Path(__file__).parents[1]
PROPERTIES = [Iri(f"https://w3id.org/tinyfleet/property/{name}") for name in ("sound", "temperature", "acceleration")]


@dataclass(frozen=True)
class Board:
    ram: int
    flash: int | None
    observes: frozenset[Iri]


@dataclass(frozen=True)
class Option:
    layers: int
    bias: bool
    ram: int


@dataclass(frozen=True)
class Model:
    engine: str | None
    run: int | None
    storage: int | None
    inputs: frozenset[Iri]
    default: tuple[int, int] | None  # RAM to train what is trainable by default, and how many layers that is
    options: tuple[Option, ...]
    parameters: int | None


@dataclass(frozen=True)
class Device:
    board: int
    engine: str
    arena: int | None
    online: bool | None
    adopts: int | None


# Few sizes, and unknown facts now and then, so that there is about as much that fits as does not, much of it exactly.
sizes = st.integers(1, 3)
maybe = st.sampled_from([1, 2, 3, 1, 2, 3, None])
engines = st.sampled_from(["mote", "mote", "mote", "litert"])
properties = st.frozensets(st.sampled_from(PROPERTIES))
boards = st.builds(Board, st.integers(2, 4), st.sampled_from([3, 2, 1, None]), properties)
options = st.lists(
    st.builds(Option, st.integers(1, 5), st.booleans(), st.integers(1, 5)),
    max_size=4,
    unique_by=lambda o: (o.layers, o.bias),
).map(tuple)
models = st.builds(
    Model,
    engines | engines | st.none(),
    maybe,
    maybe,
    st.sampled_from([frozenset(), frozenset(), *({p} for p in PROPERTIES), frozenset(PROPERTIES[:2])]).map(frozenset),
    st.none() | st.tuples(st.integers(1, 5), st.integers(0, 5)),
    options,
    st.none() | st.integers(1, 3),
)
fleets = st.lists(boards, min_size=1, max_size=3).flatmap(
    lambda made: st.tuples(
        st.just(made),
        st.lists(
            st.builds(
                Device,
                st.integers(0, len(made) - 1),
                engines,
                st.none() | st.integers(1, 5),
                st.none() | st.booleans(),
                st.none() | st.integers(0, 3),
            ),
            min_size=2,
            max_size=6,
        ),
        st.lists(models, min_size=1, max_size=5),
    )
)
Fleet = tuple[Sequence[Board], Sequence[Device], Sequence[Model]]


def name_of(number: int) -> Iri:
    return model_iri(f"{number:016x}")


def write(store: Store, fleet: Fleet) -> None:
    facts: dict[Iri, dict[Iri, Binding | None]] = {}
    for i, board in enumerate(fleet[0]):
        facts[board_iri(f"b{i}")] = {
            RDF.type: TF.Board,
            TF.boardId: f"b{i}",
            TF.ramBytes: board.ram,
            TF.flashBytes: board.flash,
            TF.observes: sorted(board.observes),
        }
    for i, device in enumerate(fleet[1]):
        facts[device_iri("home", f"d{i}")] = {
            RDF.type: [TF.Device, TD.Thing],
            TF.fleet: "home",
            TF.deviceId: f"d{i}",
            TF.board: board_iri(f"b{device.board}"),
            TF.engine: device.engine,
            TF.arenaBytes: device.arena,
            TF.online: device.online,
            TF.modelSlotBytes: device.adopts,
        }
    for i, model in enumerate(fleet[2]):
        iri = name_of(i)
        facts[iri] = {
            RDF.type: TF.Model,
            SCHEMA.name: f"m{i}",
            TF.engine: model.engine,
            TF.runRamBytes: model.run,
            TF.storageBytes: model.storage,
            TF.inputProperty: sorted(model.inputs),
            TF.parameters: model.parameters,
            TF.trainRamBytes: None if model.default is None else model.default[0],
            TF.trainableLayers: None if model.default is None else model.default[1],
            TF.trainingOption: [Iri(f"{iri}:train:{n}") for n in range(len(model.options))],
        }
        for n, option in enumerate(model.options):
            facts[Iri(f"{iri}:train:{n}")] = {
                RDF.type: TF.TrainingOption,
                TF.layersTrained: option.layers,
                TF.biasOnly: option.bias,
                TF.trainRamBytes: option.ram,
            }
    store.write(facts)


def least_to_train(model: Model) -> int | None:
    ways = [option.ram for option in model.options]
    if model.default is not None and model.default[1]:
        ways.append(model.default[0])
    return min(ways, default=None)


def missed(model: Model, device: Device, board: Board) -> set[tuple[str, object, object]]:
    """The reference: (need, what the model takes, what is there) of each need that is not met."""
    room = board.ram if device.arena is None else device.arena
    needs: set[tuple[str, object, object]] = {("sensor", p, None) for p in model.inputs - board.observes}
    if model.engine != device.engine:
        needs.add(("engine", model.engine, device.engine))
    for requirement, takes, has in (
        ("RAM to run", model.run, room),
        ("flash", model.storage, board.flash),
        ("RAM to train", least_to_train(model), room),
    ):
        if takes is None or has is None or takes > has:
            needs.add((requirement, takes, has))
    if model.storage is not None and device.adopts is not None and model.storage > device.adopts:
        needs |= {(matching.UPDATE_MODEL, model.storage, device.adopts)} if model.engine == device.engine else set()
    return needs


def trained(model: Model, room: int) -> tuple[int, int] | None:
    """The reference: of how many layers all weights, and of how many the biases alone, fit to train."""
    full = [o.layers for o in model.options if not o.bias and o.ram <= room]
    bias = [o.layers for o in model.options if o.bias and o.ram <= room]
    if model.default is not None and model.default[1] and model.default[0] <= room:
        full.append(model.default[1])
    return (max(full, default=0), max(bias, default=0)) if full or bias else None


@settings(max_examples=200)
@given(fleets)
def test_what_fits_is_what_a_plain_reference_says(fleet: Fleet) -> None:
    """Which fit, in which order, how much of them trains, and why not: for every model, device and pair."""
    boards, devices, models = fleet
    with EmbeddedStore() as store:
        write(store, fleet)
        needs = {(i, n): missed(m, d, boards[d.board]) for i, d in enumerate(devices) for n, m in enumerate(models)}
        room = [boards[d.board].ram if d.arena is None else d.arena for d in devices]
        runs = {
            pair
            for pair, missing in needs.items()
            if {requirement for requirement, _, _ in missing} <= {matching.TRAIN, matching.UPDATE_MODEL}
        }
        for n, model in enumerate(models):
            expected = []
            for i, device in enumerate(devices):
                if (i, n) in runs:
                    assert model.run is not None
                    layers, biases = trained(model, room[i]) or (None, None)
                    left = room[i] - model.run
                    names = f"d{i}", f"b{device.board}", name_of(n)
                    expected.append(
                        matching.DeviceMatch(*names, room[i], model.run, left, device.online, layers, biases)
                    )
            trains = store.query(library.text("trainable"), model=name_of(n), fleet="home")
            assert {str(row["id"]): (row["layers"], row["biases"]) for row in trains} == {
                fit.device: (fit.layers, fit.biases) for fit in expected if fit.layers is not None
            }
            key = lambda f: (f.layers is None, -(f.layers or 0), -(f.biases or 0), -f.free, f.device)  # noqa: E731
            assert matching.match_devices(store, name_of(n), "home") == sorted(expected, key=key)
        for i in range(len(devices)):
            fits = []
            for n, model in enumerate(models):
                if (i, n) in runs:
                    assert model.run is not None
                    layers, biases = trained(model, room[i]) or (None, None)
                    fits.append(
                        matching.ModelMatch(
                            name_of(n), f"m{n}", len(model.inputs), model.run, room[i] - model.run, model.parameters,
                            layers, biases,
                        )
                    )  # fmt: skip
            assert matching.match_models(store, f"d{i}", "home") == sorted(
                fits,
                key=lambda f: (not f.observed, -(f.layers or -1), -(f.biases or -1), -(f.parameters or -1), f.name),
            )
        said = {
            (int(device[1:]), int(model.rsplit(":", 1)[1], 16)): [
                (miss.requirement, miss.required, miss.has) for miss in misses
            ]
            for (device, model), misses in matching.unmet_requirements(store, "home").items()
        }
        by_text = {pair: sorted(missing, key=str) for pair, missing in needs.items() if missing}
        assert {pair: sorted(missing, key=str) for pair, missing in said.items()} == by_text


# As a user asks for it

PROGRAM = build([Dense(32), ReLU(), Dense(10)], (64,), "softmax_cross_entropy")
LARGE = build([Dense(300), ReLU(), Dense(10)], (64,), "softmax_cross_entropy")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with a graph of three devices and a described model that one cannot train and one cannot run."""
    with open_store(tmp_path, create=True) as store:
        registry, topics = Registry(store, "home"), Topics("home")
        arenas: Mapping[str, int] = {"roomy": 65_536, "tight": PROGRAM.arena_bytes, "small": 2_000}
        for device, arena in arenas.items():
            assert registry.ingest_one(topics.td(device), payload(description(device, tf__arenaBytes=arena)))
            assert registry.ingest_one(topics.status(device), status(model=PROGRAM.model_id))
        model = describe.put_model(store, describe.from_program(PROGRAM, "digits"))
        option = Iri(f"{model}:train:1")
        store.write(
            {
                model: {TF.trainRamBytes: 30_000, TF.trainingOption: option},
                option: {
                    RDF.type: TF.TrainingOption,
                    TF.layersTrained: 1,
                    TF.biasOnly: False,
                    TF.trainRamBytes: PROGRAM.arena_bytes + 8,
                },
            }
        )
    return tmp_path


def tinyfleet(*words: object, data: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "tinyfleet/__main__.py"), *map(str, words), "--data", str(data)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"COLUMNS": "200", "PATH": ""})


def test_the_devices_for_a_model_as_a_table(data: Path) -> None:
    done = tinyfleet("model", "match", "--model", PROGRAM.model_id.hex(), "--explain", data=data)
    assert done.returncode == 0, done.stderr
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    arena, takes = PROGRAM.arena_bytes, f"{PROGRAM.arena_bytes:,}"
    assert lines[0].split() == ["device", "board", "online", "arena", "needs", "free", "trains"]
    assert lines[1].split() == ["roomy", "nano33ble", "yes", "65,536", takes, f"{65_536 - arena:,}", "2", "layers"]
    assert lines[2].split() == ["tight", "nano33ble", "yes", takes, takes, "0"]
    assert lines[3].startswith("2 devices can run urn:tinyfleet:model:")
    short = f"{arena - 2_000:,}"
    because = [line.split(maxsplit=2) for line in lines[6:]]
    assert [
        "small",
        "run",
        f"RAM to run: the model requires {takes} B, {short} more than the 2,000 B of the device",
    ] in because
    assert [
        "tight",
        "train",
        f"RAM to train: the model requires {arena + 8:,} B, 8 more than the {takes} B of the device",
    ] in because


def test_the_devices_for_a_model_as_json(data: Path) -> None:
    done = tinyfleet("model", "match", "--model", PROGRAM.model_id.hex(), "--explain", "--json", data=data)
    said = json.loads(done.stdout)
    assert [(fit["device"], fit["layers"]) for fit in said["matches"]] == [("roomy", 2), ("tight", None)]
    assert {miss["requirement"]: miss["shortfall"] for miss in said["unmet"]["small"]}[
        "RAM to run"
    ] == PROGRAM.arena_bytes - 2_000


def test_a_file_is_described_and_matched(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "large.mote"
    file.write_bytes(LARGE.data)
    done = tinyfleet("model", "match", "--model", file, "--device-id", "roomy", data=data)
    assert done.stdout.startswith(f"roomy cannot run urn:tinyfleet:model:{LARGE.model_id.hex()}")
    assert f"RAM to run: the model requires {LARGE.arena_bytes:,} B, {LARGE.arena_bytes - 65_536:,} more" in done.stdout
    again = tinyfleet("model", "match", "--model", LARGE.model_id.hex(), "--device-id", "small", "--json", data=data)
    assert [miss["requirement"] for miss in json.loads(again.stdout)["unmet"]["small"]] == [
        "RAM to run",
        "RAM to train",
    ]


def test_the_models_for_a_device(data: Path) -> None:
    done = tinyfleet("model", "match", "--device-id", "roomy", data=data)
    assert done.returncode == 0, done.stderr
    _, row, count = done.stdout.splitlines()
    takes, room = f"{PROGRAM.arena_bytes:,}", f"{65_536 - PROGRAM.arena_bytes:,}"
    assert row.split() == [PROGRAM.model_id.hex(), "digits", takes, room, "2,410", "2", "layers"]
    assert count == "1 model can run on roomy"
    none = tinyfleet("model", "match", "--device-id", "small", "--explain", data=data)
    assert none.stdout.startswith("0 models can run on small") and "RAM to run" in none.stdout
    assert json.loads(tinyfleet("model", "match", "--device-id", "roomy", "--json", data=data).stdout)["unmet"] == {}


def test_what_is_described_already_stays_as_it_is(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "digits.mote"
    file.write_bytes(PROGRAM.data)
    tinyfleet("model", "match", "--model", file, data=data)
    with open_store(data) as store:
        rows = store.query(library.text("training-options"), model=model_iri(PROGRAM.model_id))
    assert rows.column("required") == [PROGRAM.arena_bytes + 8]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "give a model with --model, a device with --device-id, or both"),
        (("--model", "0" * 16), "describes no model 0000000000000000; give its file, or see: tinyfleet query models"),
        (("--model", "nothing.mote"), "there is no file nothing.mote"),
        (("--model", __file__), "neither a .tflite nor a .keras file"),
        (("--device-id", "nobody"), "knows no device 'nobody' in the fleet 'home'"),
        (("--device-id", "a b"), "'a b' is not a valid device name"),
        (("--device-id", "roomy", "--fleet", "other"), "knows no device 'roomy' in the fleet 'other'"),
    ],
)
def test_a_mistake_is_one_clear_line(data: Path, words: Sequence[str], reason: str) -> None:
    done = tinyfleet("model", "match", *words, data=data)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and reason in done.stderr and done.stderr.count("\n") == 1
