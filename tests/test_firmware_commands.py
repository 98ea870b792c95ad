"""What a board in an emulator obeys: the keys that its gateway gives it, and attacks on its commands."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from firmware_fixtures import FLEET, ID, LIMIT, NEEDS_TOOLS, TOPICS

from tinyfleet.edge.wire import cose
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.commands import Forget, Reboot, encode_action, encode_command
from tinyfleet.edge.wire.messages import Failure, Reply, Status, Success, decode_reply, decode_status
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.server_info import find_device_brokers
from tinyfleet.firmware_tools.boards import catalogue
from tinyfleet.firmware_tools.firmware import emulate
from tinyfleet.firmware_tools.gateway import Gateway
from tinyfleet.server.authority.fleet_keys import write_root_key
from tinyfleet.server.fleet_server import FleetServer

pytestmark = NEEDS_TOOLS


class Heard:
    """What a board says."""

    def __init__(self, broker: BrokerAddress) -> None:
        self._statuses: queue.Queue[Status] = queue.Queue()
        self._replies: queue.Queue[Reply] = queue.Queue()
        self.session = Session(broker, "listening", on_message=self._receive)
        self.session.subscribe(TOPICS.status(ID))
        self.session.subscribe(TOPICS.reply(ID))

    def _receive(self, topic: str, payload: bytes) -> None:
        if topic == TOPICS.status(ID) and payload:
            self._statuses.put(decode_status(payload))
        elif topic == TOPICS.reply(ID):
            self._replies.put(decode_reply(payload))

    def status(self, wanted: Callable[[Status], bool]) -> Status:
        while not wanted(said := self._statuses.get(timeout=LIMIT)):
            pass
        return said

    def reply(self, id: int) -> Reply:
        while (said := self._replies.get(timeout=LIMIT)).id != id:
            pass
        return said


def test_a_board_obeys_the_server_and_nobody_else(firmware: Callable[[str], Path], tmp_path: Path) -> None:
    """Its image holds no key: the gateway, which holds its identity, gives it the keys over the line."""
    elf, data = firmware("mps2-an386"), tmp_path / "data"
    with FleetServer(data, FLEET, port=0) as server:

        def identity(_fleet: str, name: str) -> BrokerAddress:
            return find_device_brokers([name], None, data)[0]

        (address,) = find_device_brokers([ID], None, data)
        keys, commands = address.keys, server.commands
        assert keys is not None and commands is not None
        image = elf.read_bytes()
        assert not any(key in image for key in (keys.command, keys.current, keys.root))
        heard = Heard(server.broker)
        with emulate.Emulator(catalogue.load_board("mps2-an386"), elf) as board:
            stop, gateway = threading.Event(), Gateway(board.url, identity)
            thread = threading.Thread(target=gateway.run, args=(stop,), daemon=True)
            thread.start()
            try:
                joined = heard.status(lambda status: status.online and status.keys == keys.version)
                assert joined.trial == 0 and joined.refused == 0
                now = time.time_ns() // 1_000_000
                stranger = write_root_key(tmp_path / "stranger.json")
                topic = TOPICS.command(ID)
                forged = encode_command(now + 5000, now + 60_000, joined.nonce, encode_action(Reboot(66)))
                for payload in (
                    forged,  # no seal
                    cose.mac0(forged, bytes(32), topic),  # another key
                    cose.mac0(forged, keys.command, topic),  # the device's key, which may not seal this
                    cose.sign1(forged, stranger, topic),
                    cose.sign1(forged, server.authority.fleet_keys.current, TOPICS.command("other")),
                ):
                    heard.session.publish(topic, payload)
                commands.command(ID, Forget(1))
                assert isinstance(heard.reply(1), Success)
                status = heard.status(lambda status: status.online and status.refused + status.malformed >= 5)
                assert (status.refused, status.malformed) == (4, 1)
                commands.command(ID, Reboot(2))
                assert isinstance(heard.reply(2), Success)
                again = heard.status(lambda status: status.online and status.refused == 0)
                assert again.keys == keys.version, "it has the keys again"
                commands.command(ID, Reboot(3))
                assert not isinstance(heard.reply(3), Failure)
            finally:
                stop.set()
                thread.join(LIMIT)
                heard.session.close()
