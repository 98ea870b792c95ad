"""Links that stall, break, delay, double or fall silent: rounds and reports end in time, and nothing is lost."""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import free_port, plain_broker, start_mosquitto
from fleet import ROOT, Fleet
from members import LIMIT, TOPICS
from ontology_fixtures import status
from proxy import Fault, Proxy

from tinyfleet.edge.wire import mqtt_session
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.server_info import find_device_brokers
from tinyfleet.ontology.vocabulary.namespaces import TF, device_iri
from tinyfleet.server.fleet_server import FleetServer

SAMPLES = f"SELECT ?d ?n WHERE {{ ?d <{TF.samplesLearned}> ?n }}"


@pytest.mark.parametrize(
    "fault", ["cut", "delay", *(pytest.param(f, marks=pytest.mark.slow) for f in ("stall", "hold"))]
)
def test_a_round_over_bad_links_ends_and_the_next_is_whole(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt_session, "KEEPALIVE", 2)  # of the devices, which are in this process
    with Fleet(tmp_path, "links") as fleet:
        assert fleet.settle() == []
        assert fleet.proxy is not None
        fleet.proxy.set(fault)
        began = time.monotonic()
        try:
            fleet.round()
        except Exception as error:  # nobody replied in time
            assert "\n" not in str(error), "one line"
        assert time.monotonic() - began < LIMIT
        assert fleet.proxy.faults
        fleet.probe.learn()
        fleet.proxy.set("none")
        assert fleet.settle() == []


@pytest.mark.parametrize("fault", ["stall", "cut", "delay", "double", "hold"])
def test_what_devices_report_over_a_bad_link_to_the_server_is_not_lost(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt_session, "KEEPALIVE", 2)
    port = free_port()
    broker = start_mosquitto(tmp_path, port)
    try:
        with (
            Proxy(port, seed=1, on_packet=lambda when, kind: None) as proxy,
            FleetServer(tmp_path / "data", "home", broker=plain_broker(proxy.port)) as server,
        ):
            device = Session(plain_broker(port), "devices")
            proxy.set(fault)
            for number in range(1, 401):
                device.publish(TOPICS.status(f"d{number % 20}"), status(samples=number), retain=True)
            assert device.flush(LIMIT)
            wait_until(lambda: proxy.faults > 0)
            proxy.set("none")
            wanted = {device_iri("home", f"d{number % 20}"): number for number in range(381, 401)}

            def found() -> dict[object, object]:
                return {row["d"]: row["n"] for row in server.store.query(SAMPLES)}

            wait_until(lambda: found() == wanted, found)
            device.close()
    finally:
        broker.kill()
        broker.wait()


def test_a_graph_that_is_loaded_beside_a_running_server_goes_through_it(tmp_path: Path) -> None:
    triples = tmp_path / "more.ttl"
    triples.write_text('<urn:lamp> <http://schema.org/name> "lamp" .\n')
    with FleetServer(tmp_path / "data", "home", port=0, operator_port=0) as server:
        command = [sys.executable, "-m", "tinyfleet", "graph", "load", str(triples), "--data", str(server.data)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
        assert server.store.ask("ASK { <urn:lamp> ?p ?o }")


@pytest.mark.slow
def test_five_hundred_devices_that_join_at_once_and_are_cut_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crowd(tmp_path, 500, capsys)


def test_fifty_devices_that_join_at_once_and_are_cut_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crowd(tmp_path, 50, capsys)


def crowd(folder: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """That many sessions through a proxy that ends them all at once."""
    with FleetServer(folder / "data", "home", port=0, operator_port=0) as server, capsys.disabled():
        names = [f"d{number}" for number in range(count)]
        began = time.monotonic()
        addresses = find_device_brokers(names, None, server.data)
        enrolled = time.monotonic()
        with Proxy(server.device_broker.port) as proxy:
            devices = [_Member(name, address, proxy.port) for name, address in zip(names, addresses, strict=True)]
            wait_for_all(server, count)
            joined = time.monotonic()
            proxy.set("refuse")
            proxy.cut()
            wait_for_all(server, 0)
            gone = time.monotonic()
            proxy.set("none")
            wait_for_all(server, count)
            back = time.monotonic()
            memory = next(
                int(line.split()[1]) // 1024
                for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmRSS")
            )
            print(
                f"\n{count} devices: enrolled in {enrolled - began:.1f} s, joined in {joined - enrolled:.1f} s, "
                f"offline {gone - joined:.1f} s after all links were cut, online again {back - gone:.1f} s after that; "
                f"{memory} MiB in the process of server and devices"
            )
            for device in devices:
                device.close()


class _Member:
    """A device that says that it is there, in each new session."""

    def __init__(self, name: str, address: BrokerAddress, port: int) -> None:
        self._name = name
        self.session: Session | None = None
        will = (TOPICS.status(name), status(False))
        self.session = Session(dataclasses.replace(address, port=port), name, on_connect=self._announce, will=will)
        self._announce()

    def _announce(self) -> None:
        if self.session is not None:
            self.session.publish(TOPICS.status(self._name), status(), retain=True)

    def close(self) -> None:
        """End the session."""
        if self.session is not None:
            self.session.close()


def wait_for_all(server: FleetServer, count: int) -> None:
    """Until that many devices are online."""
    query = f"SELECT (COUNT(?d) AS ?n) WHERE {{ ?d <{TF.online}> true }}"
    wait_until(lambda: server.store.query(query)[0]["n"] == count, limit=5 * LIMIT)


def wait_until(condition: Callable[[], bool], state: Callable[[], object] = lambda: "", limit: float = LIMIT) -> None:
    """Ask again and again, for at most `limit` seconds; then fail with the state."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, state()
        time.sleep(0.02)
