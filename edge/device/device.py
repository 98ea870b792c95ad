"""A device of the fleet: a node, its session with the broker, and the loop between them, in one thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tinyfleet.edge.device.node import (
    ARENA_BYTES,
    PROGRAM_BYTES,
    Node,
    Publish,
    Reboot,
    Subscribe,
    Unsubscribe,
)
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.device.thing_description import VIRTUAL, Board, thing_description
from tinyfleet.edge.errors import UserError, printable
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import ClientData
from tinyfleet.edge.versions import ENGINE_VERSION
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.broker_check import device_client_id, release_name
from tinyfleet.edge.wire.messages import ResetReason
from tinyfleet.edge.wire.mqtt_session import Message, Session

log = logging.getLogger(__name__)

STEPS = 64
"""Samples learned from between two checks of the network."""
IDLE = 0.5
"""Seconds to wait for a message, and so at most until `stop` is seen."""
GOODBYE = 5.0
"""Seconds to wait until the broker has the last messages."""


class Device:
    """Runs a node against a broker: announces it, carries out commands, reconnects, and publishes its will at the end.

    Parameters
    ----------
    make_node
        Called for the node at the start, and again after each reboot.
    broker
        The broker.
    fleet
        The fleet's name.

    Raises
    ------
    UserError
        If no broker answers.

    Attributes
    ----------
    node
        The node; another one after each reboot.
    error
        Why its thread ended, if that was an error.
    """

    def __init__(self, make_node: Callable[[], Node], broker: BrokerAddress, fleet: str) -> None:
        self._make_node = make_node
        self._broker = broker
        self._fleet = fleet
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.error: Exception | None = None
        self._last_bug, self._bugs = "", 0
        self.node = make_node()
        self.node.set_reset_reason(ResetReason.POWER)
        self._session = self._open()

    def run(self) -> None:
        """Serve until `stop` is called, from another thread or a signal handler."""
        while self._serve():
            self.node = self._make_node()
            self.node.set_reset_reason(ResetReason.COMMAND)
            while not self._stopping.is_set():
                try:
                    self._session = self._open()
                    break
                except UserError:  # the broker was there before: wait for it
                    self._stopping.wait(IDLE)

    def start(self) -> None:
        """Run in a new thread. What ends that is in `error`."""
        self._thread = threading.Thread(target=self._run, name=self.node.id, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.run()
        except Exception as error:
            self.error = error
            log.error("%s has ended: %s", self.node.id, printable(f"{type(error).__name__}: {error}", 300))
            log.debug("where it ended", exc_info=True)
            with suppress(Exception):  # it may be the session that failed
                self._say_goodbye()

    def stop(self) -> None:
        """End `run`. Any thread may call it, more than once."""
        self._stopping.set()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until `run` has ended.

        Parameters
        ----------
        timeout
            Seconds to wait at most; None waits indefinitely.

        Returns
        -------
        bool
            Whether it has ended.
        """
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()

    def _open(self) -> Session:
        will = self.node.will()
        return Session(
            self._broker,
            device_client_id(self._fleet, self.node.id),
            on_message=self._receive,
            on_connect=self.node.connected,
            will=(will.topic, will.payload),
            background=False,
        )

    def _serve(self) -> bool:
        """Serve until `stop` or a reboot. True if the node asks for a reboot."""
        busy, alive = False, self._send()
        while alive and not self._stopping.is_set():
            self._session.pump(0.0 if busy else IDLE)
            busy = self._learn()
            alive = self._send()
        self._say_goodbye()
        return not alive

    def _say_goodbye(self) -> None:
        goodbye = self.node.will()
        self._session.publish(goodbye.topic, goodbye.payload, retain=True)
        release_name(self._session, self._fleet, self.node.id)
        if self._session.connected:
            self._session.flush(GOODBYE)
        self._session.close()

    @contextmanager
    def _logging_bugs(self) -> Iterator[None]:
        """Log what the source or the learner raises: the node has replied with an error, and goes on.

        An error that comes again and again is logged each time that its number has doubled.
        """
        try:
            yield
        except Exception as error:
            said = printable(f"{type(error).__name__}: {error}", 300)
            self._last_bug, self._bugs = said, self._bugs + 1 if said == self._last_bug else 1
            if self._bugs.bit_count() == 1:
                log.exception("an error in the source or the learner of %s, %d in a row", self.node.id, self._bugs)

    def _receive(self, topic: str, payload: bytes) -> None:
        with self._logging_bugs():
            self.node.receive(topic, payload)

    def _learn(self) -> bool:
        """Learn from some samples. True if there are more to learn from now."""
        with self._logging_bugs():
            return all(self.node.step() for _ in range(STEPS))
        return False

    def _send(self) -> bool:
        """Send the node's messages. False if it wants to reboot."""
        for out in self.node.poll():
            match out:
                case Publish(topic, payload, True):
                    self._session.publish(topic, payload, True)
                case Publish() as reply:  # one that is lost with a connection is asked for again
                    self._session.send([Message(*reply)])
                case Subscribe(filter):
                    self._session.subscribe(filter)
                case Unsubscribe(filter):
                    self._session.unsubscribe(filter)
                case Reboot():
                    return False
        return True


def groups_of(board: Board) -> tuple[str, ...]:
    """The groups whose commands a device obeys: of all, of the fleet's keys, and of its board."""
    return "all", "keys", board.id[:32]


def virtual_device(
    broker: BrokerAddress, fleet: str, id: str, program: Program, data: ClientData, board: Board = VIRTUAL
) -> Device:
    """Make a virtual device: a microcontroller's node and engine in this process. It connects, and runs once started.

    Parameters
    ----------
    broker
        The broker.
    fleet, id
        Names of the fleet and the device.
    program
        The built-in model.
    data
        The samples that it learns from.
    board
        The board that it describes itself as.

    Returns
    -------
    Device

    Raises
    ------
    UserError
        If no broker answers, or the samples or the memory do not fit the model.
    ProtocolError
        If a name is not valid.
    """
    arena = max(ARENA_BYTES, program.arena_bytes)
    td = thing_description(fleet, id, board, "mote", ENGINE_VERSION, arena, program.model_id, PROGRAM_BYTES)

    def node() -> Node:
        return Node(
            fleet,
            id,
            td,
            program,
            DatasetStream(data),
            arena_bytes=arena,
            model_slot_bytes=PROGRAM_BYTES,
            keys=broker.keys,
            groups=groups_of(board),
        )

    return Device(node, broker, fleet)
