"""What a killed command leaves behind is tidied up by the server, and what it does not know it does not say."""

import queue
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import free_port, plain_broker, start_mosquitto
from ontology_fixtures import description, payload, status

from tinyfleet.edge import tasks
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.server_info import find_broker
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.queries import library
from tinyfleet.server.fleet_server import FleetServer

TOPICS = Topics("home")
PREFIXES = "PREFIX tf: <https://w3id.org/tinyfleet#> PREFIX prov: <http://www.w3.org/ns/prov#> "


@pytest.fixture
def broker(own_broker: BrokerAddress) -> BrokerAddress:
    """Without a command service: the server that each test starts is one."""
    return own_broker


class Lines(queue.Queue[str]):
    """What a server logs."""

    def until(self, part: str) -> None:
        while part not in self.get(timeout=30):
            pass


def retained(broker: BrokerAddress) -> set[str]:
    """The topics with a retained message, but for the server's own; a message of our own marks the end of them."""
    came: queue.Queue[tuple[str, bytes]] = queue.Queue()
    session = Session(broker, "looking", on_message=lambda *message: came.put(message))
    session.subscribe("tinyfleet/#")
    session.publish(TOPICS.command("marker"), b"over")
    topics = set()
    while (message := came.get(timeout=20))[0] != TOPICS.command("marker"):
        topics.add(message[0])
    session.close()
    return {topic for topic in topics if topic != TOPICS.time and not topic.endswith("/command")}


def test_a_run_that_is_killed_leaves_nothing_and_has_failed(tmp_path: Path) -> None:
    data, lines = tmp_path / "data", Lines()
    select = tmp_path / "select.rq"
    select.write_text("SELECT ?id { VALUES ?id { 'deaf' } }")
    with FleetServer(data, "home", port=0, operator_port=0, on_log=lines.put) as server:
        chunks: queue.Queue[str] = queue.Queue()

        def hear(topic: str, _payload: bytes) -> None:
            if TOPICS.parse(topic) is not None:  # not one with which the run checks the broker
                chunks.put(topic)

        device = Session(find_broker(None, data), "deaf", on_message=hear)
        device.publish(TOPICS.td("deaf"), payload(description("deaf")), retain=True)
        device.publish(TOPICS.status("deaf"), status(model=tasks.load("digits").program.model_id), retain=True)
        device.subscribe(TOPICS.every("runs"))
        command = [sys.executable, "-m", "tinyfleet", "run", "start", "--select", str(select), "--data", str(data)]
        run = subprocess.Popen([*command, "--rounds", "1"], stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
        try:
            chunks.get(timeout=60)
        finally:
            run.kill()
            run.wait()
        lines.until("ended without tidying up")
        device.close()
        assert retained(server.broker) == {TOPICS.td("deaf"), TOPICS.status("deaf")}
        ended = server.store.query(
            PREFIXES + "SELECT ?failed ?at { ?run a tf:Run ; tf:failed ?failed ; prov:endedAtTime ?at }"
        )
        assert ended.column("failed") == [True]


def test_a_server_closes_what_it_finds_open_at_its_start(tmp_path: Path) -> None:
    data, lines = tmp_path / "data", Lines()
    with FleetServer(data, "home", port=0, operator_port=0) as server:
        server.store.update(
            PREFIXES + "INSERT DATA { <urn:tinyfleet:home:run:7> a tf:Run ; tf:fleet 'home' ; tf:runNumber 7 }"
        )
    with FleetServer(data, "home", port=0, operator_port=0, on_log=lines.put) as server:
        lines.until("run 7 ended without tidying up")
        assert server.store.ask(PREFIXES + "ASK { ?run tf:runNumber 7 ; tf:failed true ; prov:endedAtTime ?at }")


def test_what_is_driven_is_left_alone(broker: BrokerAddress, tmp_path: Path) -> None:
    driver = Session(broker, "driver", will=(TOPICS.driver("run", 5, "a"), b""))
    driver.publish(TOPICS.driver("run", 5, "a"), b"\x01", retain=True)
    driver.publish(TOPICS.weights(5, 1, 0), b"weights", retain=True)
    driver.publish(TOPICS.weights(6, 1, 0), b"nobody's", retain=True)
    assert driver.flush(10)
    lines = Lines()
    with FleetServer(tmp_path / "data", "home", broker=broker, on_log=lines.put):
        lines.until("run 6 ended without tidying up: 1 retained")
        assert retained(broker) == {TOPICS.driver("run", 5, "a"), TOPICS.weights(5, 1, 0)}
        driver.publish(TOPICS.driver("run", 5, "a"), b"", retain=True)
        lines.until("run 5 ended without tidying up: 1 retained")
        assert retained(broker) == set()
    driver.close()


def test_while_the_broker_is_away_devices_are_unknown(tmp_path: Path) -> None:
    port, lines = free_port(), Lines()
    process = start_mosquitto(tmp_path, port)
    try:
        with FleetServer(tmp_path / "data", "home", broker=plain_broker(port), on_log=lines.put) as server:
            device = Session(plain_broker(port), "dev-1")
            device.publish(TOPICS.td("dev-1"), payload(description()), retain=True)
            device.publish(TOPICS.status("dev-1"), status(), retain=True)
            lines.until("dev-1: online")
            assert server.store.query(library.text("devices")).column("online") == [True]
            device.close()
            process.kill()
            process.wait()
            lines.until("the broker is away")
            assert server.store.query(library.text("devices")).column("online") == []
            assert not server.store.ask(PREFIXES + "ASK { ?device tf:offlineSince ?t }")  # nor is it offline
            process = start_mosquitto(tmp_path, port)
            device = Session(plain_broker(port), "dev-1")
            device.publish(TOPICS.status("dev-1"), status(), retain=True)
            lines.until("dev-1: online")
            assert server.store.query(library.text("devices")).column("online") == [True]
            device.close()
    finally:
        process.kill()
        process.wait()


def test_a_device_that_does_not_come_back_is_offline(tmp_path: Path) -> None:
    data, lines = tmp_path / "data", Lines()
    with FleetServer(data, "home", port=0, insecure=True, on_log=lines.put) as server:
        device = Session(server.broker, "dev-1")
        device.publish(TOPICS.td("dev-1"), payload(description()), retain=True)
        device.publish(TOPICS.status("dev-1"), status(), retain=True)
        lines.until("dev-1: online")
        device.close()
    with FleetServer(data, "home", port=0, insecure=True, on_log=lines.put, grace=1000) as server:
        assert server.store.query(library.text("devices")).column("online") == []
    with FleetServer(data, "home", port=0, insecure=True, on_log=lines.put, grace=0.1):
        lines.until("devices have not come back: they count as offline")
        assert server.fleet == "home"
