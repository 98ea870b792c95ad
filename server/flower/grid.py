"""Flower's Grid over MQTT: every Flower strategy runs on microcontrollers.

A round's parameters are published once, however many devices take part (`broadcast`). Each device is sent a command of
its own, and sent it again until it replies (`requests`). Replies are put together from parts (`replies`). A device that
fails or disappears costs its own reply and no other.
"""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import NamedTuple

from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import MAX_NORM_RATIO
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.commands import Kind, Refusal, Submitted, TrainTask, encode_action, sealed_size
from tinyfleet.edge.wire.errors import ProtocolError, WireVersionError
from tinyfleet.edge.wire.flower_records import single_records
from tinyfleet.edge.wire.messages import Failure, decode_reply, decode_status, error_text
from tinyfleet.edge.wire.mqtt_session import Message as MqttMessage
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.round_config import RoundConfig, parse_round_config
from tinyfleet.edge.wire.topics import ANNOUNCEMENT, Topics
from tinyfleet.server.commands.client import CommandClient
from tinyfleet.server.commands.service import MAX_LIFE
from tinyfleet.server.flower.broadcast import Broadcast, Broadcasts, SentParameters
from tinyfleet.server.flower.devices import DeviceTable, node_id
from tinyfleet.server.flower.internals import NO_REPLY, NODE_FAILED, NODE_UNAVAILABLE, Run, log, new_run, stamp
from tinyfleet.server.flower.replies import ReplyError, encoding, is_valid_part, reply_content
from tinyfleet.server.flower.reply_bounds import NormBound
from tinyfleet.server.flower.requests import Request, RequestScheduler, RoundEvent

MAX_CLEARING = 256
"""Messages that wait to be taken back with others; a round of a large model is taken back at once."""


@dataclass
class Traffic:
    """Payload bytes since the grid was opened, and messages that it discarded. A broadcast counts once, a command as
    the server seals it."""

    bytes_down: int = 0
    bytes_up: int = 0
    malformed: int = 0  # replies that did not decode
    refused: int = 0  # replies that are out of bounds
    stale: int = 0  # replies to no open request


class _DeviceRequest(NamedTuple):
    """What one message asks of a device."""

    device: str
    kind: Kind
    round_config: RoundConfig
    server_round: int


class RunGrid(Grid):
    """What our grids share: the run, and how its messages are made."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def set_run(self, run: Run) -> None:
        """Takes part in a run that Flower started."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run record."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message of this run."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


class MqttGrid(RunGrid):
    """A Flower Grid whose nodes are the devices of one fleet.

    Close it when the run is over, or use it in a ``with``: it then removes from the broker what it published.

    Parameters
    ----------
    host, port
        The MQTT broker.
    fleet
        The fleet's name.
    program
        The model that the fleet learns. Devices that run another model are not nodes.
    select_devices
        Returns the ids of the devices that may take part, such as the result of a query of the graph; called in every
        round. Default: all devices.
    on_event
        Called with each event of a round, by the thread that waits for the round.
    resend_interval
        Seconds until a device that has not replied is asked again. The interval doubles each time, up to 16 times this.
    offline_grace
        Seconds that a device may be offline in a round and still take part.
    wait
        Seconds to wait for a first node when there are none, as after a restart of the broker.
    max_norm_ratio
        A device's change may be this many times as long as the median; see `NormBound`.

    Attributes
    ----------
    program : Program
        The model.
    traffic : Traffic
        Payload bytes and discarded messages so far.

    Raises
    ------
    UserError
        If no broker listens there, or the ratio is less than 1.

    Examples
    --------
    With a broker and devices running (``tinyfleet server start``, ``tinyfleet device simulate``), any of Flower's
    strategies runs on them::

        from flwr.serverapp.strategy import FedAvg

        with MqttGrid(tinyfleet.find_broker(Path(".tinyfleet")), "home", program) as grid:
            result = FedAvg(fraction_evaluate=0.0).start(grid, initial_arrays, num_rounds=10)

    Without a broker it says what to do:

    >>> from tinyfleet.edge.model.layers import Dense, build
    >>> nowhere = BrokerAddress("127.0.0.1", 1, tls=False)
    >>> MqttGrid(nowhere, "home", build([Dense(2)], (3,), "mse"))  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    ...
    tinyfleet.edge.errors.UserError: no MQTT broker answers at mqtt://127.0.0.1:1 ...

    Notes
    -----
    Devices see Flower's run number modulo 2**32.
    """

    def __init__(
        self,
        broker: BrokerAddress,
        fleet: str,
        program: Program,
        select_devices: Callable[[], Iterable[str]] | None = None,
        *,
        on_event: Callable[[RoundEvent], None] | None = None,
        resend_interval: float = 2.0,
        offline_grace: float = 2.0,
        wait: float = 0.0,
        max_norm_ratio: float = MAX_NORM_RATIO,
    ) -> None:
        super().__init__(new_run(secrets.randbits(32)))
        self.program = program
        self.traffic = Traffic()
        self._select_devices = select_devices
        self._on_event = on_event
        self._wait = wait
        self._norm_bound = NormBound(max_norm_ratio)
        self._topics = Topics(fleet)
        self._requests = RequestScheduler(resend_interval, offline_grace)
        self._changed = self._requests.changed  # guards the requests, and the next two
        self._devices = DeviceTable()
        self._broadcasts = Broadcasts(self._topics)
        self._session: Session | None = None
        self._clearing: list[MqttMessage] = []  # what is to be taken back with the next messages
        name = f"tinyfleet-grid-{secrets.token_hex(4)}"
        self._commands = CommandClient(self._topics, name, broker.api_token, self._on_refusal)
        self._driver = self._topics.driver("run", self.run.run_id & 0xFFFFFFFF, name)
        self._session = Session(
            broker, name, on_message=self._receive, on_connect=self._connected, will=(self._driver, b"")
        )
        self._connected()
        try:
            self._commands.require_server(broker)
        except UserError:
            self._session.close()
            raise

    def __enter__(self) -> "MqttGrid":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes from the broker what is still published, and disconnects."""
        self._requests.close("the grid was closed")
        with self._changed:
            broadcasts = self._broadcasts.current()
        for broadcast in broadcasts:
            self._end_broadcast(broadcast)
        if self._session is not None:
            submitted = [Submitted(device, 0, payload) for device, payload in self._requests.withdrawn()]
            self._send(self._clearing, self._commands.messages(submitted))
            self._session.publish(self._driver, b"", retain=True)
            if self._session.connected:
                self._session.flush(2)  # so that nothing of the run stays at the broker
            self._session.close()

    # Flower's Grid

    def get_node_ids(self) -> list[int]:
        """The selected devices that are online and run this grid's program.

        Returns
        -------
        list of int
            Flower's node ids, ascending.
        """
        return self.wait_for_nodes(1, self._wait)

    def wait_for_nodes(self, count: int, timeout: float) -> list[int]:
        """Waits until a number of nodes is there.

        Parameters
        ----------
        count
            How many nodes to wait for.
        timeout
            Seconds to wait at most.

        Returns
        -------
        list of int
            The nodes that are there then, ascending; fewer than `count` after a timeout.
        """
        deadline = time.monotonic() + timeout
        while True:
            nodes = self._nodes()
            left = deadline - time.monotonic()
            if len(nodes) >= count or left <= 0:
                return nodes
            with self._changed:  # a selection can change without a message, so look again now and then
                self._changed.wait(min(left, 0.5))

    def _nodes(self) -> list[int]:
        selected = None if self._select_devices is None else set(self._select_devices())
        with self._changed:
            online = self._devices.online(self.program.model_id)
        return sorted(node_id(device) for device in online if selected is None or device in selected)

    def device(self, node: int) -> str:
        """The id of the device behind a node id.

        Raises
        ------
        KeyError
            If no device with that node id has reported a status.
        """
        with self._changed:
            return self._devices.name(node)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Publishes the parameters, once for all messages that carry the same ones, and sends every device its command.

        Parameters
        ----------
        messages
            Each with one ArrayRecord and one ConfigRecord.

        Returns
        -------
        list of str
            The messages' ids.

        Raises
        ------
        ValueError
            Before anything is published: if a message has other records, if its arrays are not the program's, if its
            config asks for what no device can do, or if there is no such node.
        """
        by_record: dict[int, SentParameters] = {}  # most strategies give all messages the same record
        checked = []
        for message in messages:
            record, config = single_records(message)
            if id(record) not in by_record:
                by_record[id(record)] = SentParameters.from_record(record, self.program)
            checked.append((message, self._device_request(message, config), by_record[id(record)]))
        keys = [(parameters.data, *parameters.record) for _, _, parameters in checked]
        devices = Counter(keys)
        broadcasts: dict[tuple[bytes | str, ...], Broadcast] = {}
        message_ids = []
        for (message, device_request, parameters), same in zip(checked, keys, strict=True):
            if same not in broadcasts:
                broadcasts[same] = self._broadcast(parameters, device_request.server_round, devices[same])
            message_ids.append(self._open_request(message, device_request, broadcasts[same]))
        self._transmit([chunk for broadcast in broadcasts.values() for chunk in broadcast.chunks])
        self._requests.deliver_events(self._on_event)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that have arrived.

        Parameters
        ----------
        message_ids
            Of messages that were pushed.

        Returns
        -------
        list of Message
            Each reply once. A device that failed, stays offline or ran out of time has an error for a reply, and so has
            one whose reply is out of bounds. Changes are compared with those that are pulled together.
        """
        message_ids = list(message_ids)
        self._transmit()
        with self._changed:
            self._refuse_long_changes(message_ids)
            replies, over = self._requests.collect_replies(message_ids)
        for broadcast in over:
            self._end_broadcast(broadcast)
        self._requests.deliver_events(self._on_event)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Pushes messages, waits for the replies, and pulls them.

        Parameters
        ----------
        messages
            As for `push_messages`.
        timeout
            Seconds to wait at most. Default: until every message has a reply.

        Returns
        -------
        list of Message
            A reply to every message, if only an error, ordered by node id.
        """
        waiting = set(self.push_messages(messages))
        until = float("inf") if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        try:
            while not self._all_have_replied(waiting):
                self._transmit()
                self._requests.deliver_events(self._on_event)
                self._wait_for_all(waiting, until, f"no reply within {timeout:g} s" if timeout is not None else "")
            replies = self.pull_messages(waiting)
            waiting = set()
        finally:  # after an interrupt too, nothing stays at the broker
            self.give_up(waiting, "interrupted")
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)  # so that sums do not depend on timing

    def _all_have_replied(self, waiting: Iterable[str]) -> bool:
        with self._changed:
            return all(request.reply is not None for _, request in self._requests.of(waiting))

    def _wait_for_all(self, waiting: Iterable[str], until: float, reason: str) -> None:
        """Waits until a reply arrives or something is due, unless all have replied. After `until` the requests fail."""
        with self._changed:
            requests = [request for _, request in self._requests.of(waiting) if request.reply is None]
            if time.monotonic() >= until:
                for request in requests:
                    self._requests.fail(request, NO_REPLY, reason)
            elif requests:
                self._requests.wait(requests, until)

    def _refuse_long_changes(self, message_ids: Iterable[str]) -> None:
        """Makes errors of the replies whose change is too long beside the others'. The caller holds the lock."""
        requests = {r.device: r for _, r in self._requests.of(message_ids) if r.change_norm is not None}
        norms = {device: r.change_norm for device, r in requests.items() if r.change_norm is not None}
        for device, reason in self._norm_bound.too_long(norms).items():
            self._refuse(requests[device], reason)

    def wait_for_one(self, message_ids: Iterable[str]) -> str:
        """Waits for the first reply to any of these messages.

        Parameters
        ----------
        message_ids
            Of messages that were pushed and not yet pulled.

        Returns
        -------
        str
            The id of a message that has a reply, if only an error because its time was up.
        """
        waiting = list(message_ids)
        while True:
            self._transmit()
            with self._changed:
                requests = self._requests.of(waiting)
                for message_id, request in requests:
                    if request.reply is not None:
                        return message_id
                self._requests.wait(request for _, request in requests)

    def give_up(self, message_ids: Iterable[str], reason: str) -> None:
        """Stops waiting for these messages. A reply that arrives later counts as stale; parameters that only they
        needed are removed from the broker."""
        waiting = list(message_ids)
        with self._changed:
            for _, request in self._requests.of(waiting):
                self._requests.fail(request, NO_REPLY, reason)
        if waiting:
            self.pull_messages(waiting)

    # To the devices

    def _device_request(self, message: Message, config: ConfigRecord) -> _DeviceRequest:
        """What a message asks of its device. Raises ValueError if no device can be asked that."""
        try:
            device = self.device(message.metadata.dst_node_id)
        except KeyError:
            raise ValueError(f"no device has the node id {message.metadata.dst_node_id}") from None
        kind: Kind = "evaluate" if message.metadata.message_type.startswith(MessageType.EVALUATE) else "train"
        value = config.get("server-round", 0)
        round_config = parse_round_config(config, kind, message.metadata.dst_node_id)
        return _DeviceRequest(device, kind, round_config, value if isinstance(value, int) else 0)

    def _broadcast(self, parameters: SentParameters, server_round: int, devices: int) -> Broadcast:
        with self._changed:
            broadcast = self._broadcasts.add(self._run.run_id, parameters, devices)
            self._requests.report(RoundEvent("broadcast", server_round))
        return broadcast

    def _open_request(self, message: Message, asked: _DeviceRequest, broadcast: Broadcast) -> str:
        train_task = TrainTask(
            id=self._requests.new_id(),
            kind=asked.kind,
            run=broadcast.run,
            round=broadcast.number,
            model=self.program.model_id,
            seed=asked.round_config.seed,
            phases=asked.round_config.phases,
            query=asked.round_config.query,
            update=asked.round_config.update,
            weights=broadcast.weights,
        )
        now, message_id = time.monotonic(), stamp(message)
        with self._changed:
            request = Request(
                message=message,
                device=asked.device,
                server_round=asked.server_round,
                broadcast=broadcast,
                train_task=train_task,
                payload=encode_action(train_task),
                expires=now + message.metadata.ttl,
                resend_at=now,
                offline_since=None if self._devices.is_online(asked.device) else now,
            )
            self._requests.add(message_id, request)
        return message_id

    def _transmit(self, before: Sequence[MqttMessage] = ()) -> None:
        """Sends the messages `before`, and submits the commands that are due. What is not needed any longer is taken
        back with them: a message of its own would cost as much as a command."""
        due = self._requests.due()
        withdrawn = self._requests.withdrawn()
        submitted = [Submitted(device, 0, payload) for device, payload in withdrawn]
        submitted += [Submitted(each.device, _life(each), each.payload) for each in due]
        if before or submitted:  # not under the lock: the session's thread may wait for it
            with self._changed:
                clearing, self._clearing = self._clearing, []
            self.traffic.bytes_down += sum(sealed_size(each.payload) for each in due)
            self._send([*before, *clearing], self._commands.messages(submitted))

    def _end_broadcast(self, broadcast: Broadcast) -> None:
        with self._changed:
            self._broadcasts.end(broadcast)
            self._clearing += broadcast.clearing  # a connection that breaks may lose these: see `_connected`
            if len(self._clearing) <= MAX_CLEARING:
                return
            clearing, self._clearing = self._clearing, []
        self._send(clearing)

    def _send(self, messages: Sequence[MqttMessage], submissions: Sequence[MqttMessage] = ()) -> None:
        assert self._session is not None
        self._session.send([*messages, *submissions])
        self.traffic.bytes_down += sum(len(message.payload) for message in messages)

    # From the devices; called by the session's thread

    def _connected(self) -> None:
        """A new connection has no subscriptions, a new broker has no parameters, and what was sent on the last
        connection may have been lost."""
        if self._session is None:
            return
        self._session.publish(self._driver, ANNOUNCEMENT, retain=True)
        self._session.subscribe(self._topics.status("+"))
        self._session.subscribe(self._topics.reply("+"))
        self._commands.subscribe(self._session)
        with self._changed:
            current, ended = self._broadcasts.current(), self._broadcasts.ended()
        for broadcast in ended:
            self._send(broadcast.clearing)
        for broadcast in current:
            self._send(broadcast.chunks)
            with self._changed:
                over = not self._broadcasts.is_current(broadcast)
            if over:  # it ended meanwhile
                self._send(broadcast.clearing)
        self._requests.resend_all()

    def _receive(self, topic: str, payload: bytes) -> None:
        match self._topics.parse(topic):
            case "status", (str(device),):
                self._on_status(device, payload)
            case "reply", (str(device),):
                self._on_reply(device, payload)
            case None:
                self._commands.receive(topic, payload)

    def _on_refusal(self, refusal: Refusal) -> None:
        with self._changed:
            request = self._requests.find(refusal.id)
            if request is not None and request.device == refusal.to:
                self._requests.fail(request, NODE_UNAVAILABLE, refusal.reason)

    def _on_status(self, device: str, payload: bytes) -> None:
        try:
            status = decode_status(payload) if payload else None  # an empty one: the device was removed
        except WireVersionError as error:
            log(WARNING, "%s is left out: %s", device, error)
            status = None
        except ProtocolError:
            with self._changed:
                self.traffic.malformed += 1
            return
        with self._changed:
            self._requests.on_status(device, self._devices.update(device, status))

    def _on_reply(self, device: str, payload: bytes) -> None:
        with self._changed:
            self.traffic.bytes_up += len(payload)
            try:
                reply = decode_reply(payload)
            except ProtocolError:
                self.traffic.malformed += 1
                return
            request = self._requests.find(reply.id)
            if request is None:
                self.traffic.stale += 1
            elif request.device != device:
                self.traffic.malformed += 1
            elif isinstance(reply, Failure):
                self._requests.fail(request, NODE_FAILED, error_text(reply))
            elif not is_valid_part(reply, self.program):
                self._refuse(request, "replied with something that does not fit the model")
            elif not request.parts.add(reply, payload):
                self.traffic.stale += 1
            elif request.parts.is_complete:
                self._finish(request)

    def _refuse(self, request: Request, reason: str) -> None:
        self.traffic.refused += 1
        self._requests.refuse(request, reason)

    def _finish(self, request: Request) -> None:
        """Turns a complete reply into a Flower message."""
        update = request.parts.in_order()[0].update
        try:
            content, norm = reply_content(request.parts, request.train_task, request.broadcast.parameters, self.program)
        except ReplyError as error:
            self._refuse(request, str(error))
            return
        request.change_norm = norm
        metrics = content["metrics"]
        assert isinstance(metrics, MetricRecord)
        self._requests.succeed(request, content, metrics, encoding(update))


def _life(request: Request) -> int:
    """Milliseconds until a request expires."""
    return min(MAX_LIFE, max(1, int(1000 * (request.expires - time.monotonic()))))
