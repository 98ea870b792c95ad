"""What many tests share: which of them are thorough, a real broker on a free loopback port, and more fixtures."""

import contextlib
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tinyfleet.edge.wire.broker_address import BrokerAddress

if TYPE_CHECKING:
    from directory_fixtures import Here

    from tinyfleet.ontology.ingest.registry import Registry
    from tinyfleet.ontology.store.store import Store

# tflite-runtime only opens an interpreter in a process that imported it before tensorflow, whichever test comes first.
with contextlib.suppress(ImportError):
    import tflite_runtime.interpreter  # noqa: F401

settings.register_profile("tinyfleet", deadline=None)  # a busy machine is no error
settings.load_profile("tinyfleet")

#: The files whose tests compile, emulate, or start TensorFlow, brokers or servers. `make test-fast` leaves them out.
THOROUGH = {
    "test_authority", "test_broker_check", "test_c_library", "test_compiler", "test_compiler_commands",
    "test_data_folder", "test_demo", "test_deploy", "test_device", "test_directory_events", "test_docs",
    "test_engine_native", "test_exactness", "test_examples", "test_export_library", "test_features", "test_firmware",
    "test_firmware_commands", "test_firmware_fleet", "test_flower_transports", "test_fuzz", "test_gradients",
    "test_graph_crash",
    "test_grid_fleet", "test_hostile_queries", "test_house", "test_housekeeping", "test_how_to", "test_http_access",
    "test_http_limits",
    "test_kills", "test_links", "test_litert", "test_match", "test_meta", "test_node_native",
    "test_ontology_boards", "test_ontology_describe",
    "test_ontology_index", "test_ontology_selocml", "test_ontology_shapes", "test_plan", "test_quantized_training",
    "test_query_library", "test_query_page", "test_robust", "test_server_bounds", "test_session",
    "test_file_store", "test_server_commands",
    "test_sparql_protocol", "test_supervision", "test_task_devices", "test_tflite_models", "test_wheel",
}  # fmt: skip
#: The longest test of all: it comes first, or else one worker is still busy with it when the others have finished.
LONGEST = "test_no_program_and_no_message_makes_it_read_or_write_outside"


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in THOROUGH:
            item.add_marker("thorough")
    items.sort(key=lambda item: item.name != LONGEST)


def free_port() -> int:
    """A TCP port on loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def mosquitto_program() -> str:
    """Where mosquitto is."""
    program = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/sbin")
    if program is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    return program


def start_mosquitto(
    folder: Path, port: int, options: Sequence[str] = ("allow_anonymous true",), listener: Sequence[str] = ()
) -> "subprocess.Popen[str]":
    """Starts mosquitto and returns once it takes connections."""
    config = folder / "mosquitto.conf"
    general = ["persistence false", "max_queued_messages 0", "set_tcp_nodelay true"]
    config.write_text("\n".join([*general, *options, f"listener {port} 127.0.0.1", *listener, ""]))
    broker = subprocess.Popen([mosquitto_program(), "-c", str(config)], stderr=subprocess.PIPE, text=True)
    assert broker.stderr is not None
    for line in broker.stderr:
        if " running" in line:
            break
    else:
        raise RuntimeError(f"mosquitto ended with {broker.wait()}")
    threading.Thread(target=broker.stderr.read, daemon=True).start()  # a full pipe must not stop it
    return broker


def plain_broker(port: int) -> BrokerAddress:
    """The address of a broker on this machine without TLS."""
    return BrokerAddress("127.0.0.1", port, tls=False)


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[BrokerAddress]:
    """A fresh mosquitto with TLS and access control; the address shows it a certificate."""
    from broker_fixtures import secured_broker  # only here: it needs the server's packages

    with secured_broker(tmp_path / "broker") as address:
        yield address


@pytest.fixture
def broker(own_broker: BrokerAddress) -> Iterator[BrokerAddress]:
    """The same, with what commands devices without keys there."""
    from broker_fixtures import command_services

    with command_services(own_broker):
        yield own_broker


@pytest.fixture
def directory() -> Iterator["Here"]:
    """A Thing Description Directory that is served in this process, and a client of it."""
    from directory_fixtures import open_directory  # only here: it needs the graph's packages

    with open_directory() as here:
        yield here


@pytest.fixture(scope="session")
def firmware(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The firmware of one device for a board, built once in each process."""
    from firmware_fixtures import build_firmware

    built: dict[str, Path] = {}

    def get(board: str) -> Path:
        if board not in built:
            built[board] = build_firmware(board, tmp_path_factory.mktemp(board))
        return built[board]

    return get


@pytest.fixture(params=["memory", "indexed", "oxigraph"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator["Store"]:
    """A fresh store of the graph, of each kind that keeps it in a way of its own."""
    from ontology_fixtures import open_store

    with open_store(request.param, tmp_path) as opened:
        yield opened


@pytest.fixture
def registry(store: "Store") -> "Registry":
    """The registry of fleet "home" on that store, at a fixed time."""
    from ontology_fixtures import NOW

    from tinyfleet.ontology.ingest.registry import Registry

    return Registry(store, "home", clock=lambda: NOW)
