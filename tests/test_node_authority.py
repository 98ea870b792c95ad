"""What a device obeys: attacks on its commands, each on the C node natively. None changes what it runs or sends, and
after each it does what the fleet's server says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from command_fixtures import (
    AFTER,
    COMMAND_KEY,
    CURRENT,
    ID,
    KEYS,
    NEXT,
    ROOT,
    STRANGER,
    MemoryStore,
    device,
    said,
    sealed,
    send,
    status,
)
from hypothesis import given
from hypothesis import strategies as st
from node_fixtures import (
    HEAD_ONLY,
    NOW,
    PROGRAM,
    TOPICS,
    WEIGHTS,
    broadcast,
    carried,
    data_of,
    deliver,
    dense,
    expected,
    mote,
    replies,
    update,
    work,
)

from tinyfleet.edge._mote import ffi, lib
from tinyfleet.edge.device.node import Node, Reboot, Subscribe
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire import cose
from tinyfleet.edge.wire.commands import (
    Forget,
    NewKeys,
    Phase,
    encode_action,
    encode_command,
    encode_time,
)
from tinyfleet.edge.wire.commands import Reboot as RebootCommand
from tinyfleet.edge.wire.messages import ErrorCode, Failure, Success
from tinyfleet.edge.wire.topics import Topics

REBOOT = RebootCommand(4)
ALL = TOPICS.group_command("all")


def obeys(node: Node, counter: int = NOW + 100_000) -> bool:
    """Whether it still does what the server says."""
    return len(said(send(node, sealed(RebootCommand(99), counter)))) == 1


def is_unmoved(node: Node, payload: bytes, topic: str = TOPICS.command(ID)) -> bool:
    """Whether a message changes nothing but a count, and the server is obeyed afterwards."""
    before = node.model, node.parameters.tobytes(), status(node).ceiling
    silent = send(node, payload, topic) == []
    while node.step():
        pass
    return silent and (node.model, node.parameters.tobytes(), status(node).ceiling) == before and obeys(node)


def test_sealed_commands_are_obeyed() -> None:
    node, order = device(), work()
    assert Subscribe(TOPICS.weights(5, 1)) in send(node, sealed(order))
    (done,) = replies(deliver(node, broadcast(order)))
    assert isinstance(done, Success) and (dense([done]) == expected(order)[0].parameters).all()
    assert send(node, sealed(REBOOT, NOW + 1001))[-1] == Reboot()
    assert send(node, sealed(REBOOT, NOW + 1002, key=NEXT))[-1] == Reboot(), "the next key counts already"
    assert node.counters.refused == node.counters.malformed == node.counters.stale == 0


def test_weights_in_the_command_are_learned_from_at_once() -> None:
    order = work(weights=data_of(WEIGHTS))
    node = device()
    send(node, sealed(order))
    (done,) = replies(deliver(node, []))
    assert isinstance(done, Success) and (dense([done]) == expected(order)[0].parameters).all()
    (failed,) = said(send(node, sealed(replace(order, id=8, weights=data_of(WEIGHTS)[4:]), NOW + 1001)))
    assert failed == Failure(8, ErrorCode.ENGINE, -1)


STRANGE: dict[str, Callable[[], bytes]] = {
    "no seal": lambda: encode_command(NOW + 1000, NOW + 60_000, None, encode_action(work())),
    "a stranger's code": lambda: sealed(work(), key=bytes(32)),
    "a stranger's signature": lambda: sealed(REBOOT, key=STRANGER),
    "a stranger's signature under the fleet's key id": lambda: sealed(REBOOT, key=STRANGER).replace(
        cose.key_id(cose.public_key(STRANGER)), cose.key_id(KEYS.current)
    ),
    "the root key for what is no change of keys": lambda: sealed(REBOOT, key=ROOT),
    "a code for what outlives a round: reboot": lambda: sealed(REBOOT, key=COMMAND_KEY),
    "a code for what outlives a round: model": lambda: sealed(update(3, HEAD_ONLY), key=COMMAND_KEY),
    "a code for what outlives a round: forget": lambda: sealed(Forget(3), key=COMMAND_KEY),
    "new keys by the fleet's key": lambda: sealed(NewKeys(3, 2, cose.public_key(STRANGER))),
    "new keys by a stranger": lambda: sealed(NewKeys(3, 2, cose.public_key(STRANGER)), key=STRANGER),
    "another device's command": lambda: sealed(work(), topic=TOPICS.command("two")),
    "a group's command": lambda: sealed(REBOOT, topic=ALL),
    "another fleet's command": lambda: sealed(REBOOT, topic=Topics("other").command(ID)),
    "the time": lambda: cose.sign1(encode_time(NOW + 5), CURRENT, TOPICS.command(ID)),
    "expired": lambda: sealed(REBOOT, expires=NOW),
    "expires in a year": lambda: sealed(REBOOT, expires=NOW + 365 * 86_400_000),
    "a counter that would be the last": lambda: sealed(REBOOT, 2**64 - 1),
    "a counter far ahead": lambda: sealed(work(), NOW + 2**22 + 1),
    "the counter of the time before it started": lambda: sealed(REBOOT, NOW),
    "a nonce of another start": lambda: sealed(REBOOT, nonce=b"anything"),
    "weights for gradient inversion": lambda: sealed(
        work(phases=(Phase(0xFFFFFFFF, 1, 1.0),), weights=data_of(WEIGHTS)), key=bytes(range(1, 33))
    ),
}


@pytest.mark.parametrize("attack", STRANGE)
def test_what_the_server_did_not_say_changes_nothing(attack: str) -> None:
    assert is_unmoved(device(), STRANGE[attack]())


def test_a_damaged_seal_changes_nothing() -> None:
    for command in (sealed(work()), sealed(REBOOT)):
        for byte in range(len(command)):
            node = device()
            assert send(node, command[:byte] + bytes([command[byte] ^ 1]) + command[byte + 1 :]) == [], byte
        assert is_unmoved(node, command[:-1]) and obeys(node, NOW + 100_001)


def test_a_replayed_command_is_not_obeyed_twice() -> None:
    node = device()
    first, second = sealed(REBOOT, NOW + 1000), sealed(RebootCommand(5), NOW + 1001)
    assert send(node, first)[-1] == Reboot() and send(node, second)[-1] == Reboot()
    assert send(node, first) == [] and node.counters.stale == 1
    assert [reply.id for reply in said(send(node, second))] == [5], "the last one is answered again"
    assert Reboot() not in send(node, second), "and not obeyed again"
    assert obeys(node)


def test_a_reordered_command_is_not_obeyed() -> None:
    node = device()
    send(node, sealed(REBOOT, NOW + 1001))
    assert is_unmoved(node, sealed(RebootCommand(5), NOW + 1000)) and node.counters.stale == 1


@pytest.mark.parametrize("store", [True, False], ids=["a store", "no store"])
@pytest.mark.parametrize("clock", [True, False], ids=["a clock", "no clock"])
def test_a_retained_reboot_is_obeyed_once(store: bool, clock: bool) -> None:
    """The broker sends it again to the device that starts."""
    options = {"store": MemoryStore() if store else None}
    now = [NOW]
    clock_ = (lambda: now[0]) if clock else None
    node = device(clock=clock_, **options)
    command = sealed(REBOOT, nonce=status(node).nonce)
    assert send(node, command)[-1] == Reboot()
    for _ in range(3):
        now[0] += 2000
        node = device(clock=clock_, **options)
        assert send(node, command) == [] and said(send(node, command)) == []
        counter = max(status(node).ceiling, now[0]) + 10
        again = sealed(RebootCommand(7), counter, expires=now[0] + 60_000, nonce=status(node).nonce)
        assert [reply.id for reply in said(send(node, again))] == [7]


def test_after_a_reset_a_device_refuses_up_to_what_it_stored() -> None:
    store = MemoryStore()
    node = device(store=store, groups=["all"])
    before = store.writes
    for counter in range(NOW + 1000, NOW + 1200):
        assert said(send(node, sealed(RebootCommand(counter & 0xFFFF), counter)))
    send(node, sealed(REBOOT, NOW + 5000, topic=ALL), ALL)
    assert store.writes == before + 2, "one write for all commands of minutes, on each topic"
    node = device(store=store, groups=["all"])
    ceiling = status(node).ceiling
    assert NOW + 1199 <= ceiling <= NOW + 1199 + 2**18 and status(node).boots == 2
    assert send(node, sealed(REBOOT, ceiling)) == []
    assert said(send(node, sealed(REBOOT, ceiling + 1)))
    assert send(node, sealed(REBOOT, NOW + 5001, topic=ALL), ALL) == [], "and so on the group's topic"


def test_a_store_that_fails_stops_commands_not_the_device() -> None:
    store = MemoryStore()
    node = device(store=store)
    store.fails = True
    order = work(weights=data_of(WEIGHTS))
    assert said(send(node, sealed(order))) == [Failure(7, ErrorCode.STORE, lib.MOTE_ERR_STORE)]
    store.fails = False
    send(node, sealed(order, NOW + 1001))
    assert len(replies(deliver(node, []))) == 1


# Without a clock


def time_message(now: int, key: object = CURRENT, topic: str = TOPICS.time) -> bytes:
    return cose.sign1(encode_time(now), key, topic)  # type: ignore[arg-type]


def test_a_device_that_does_not_know_the_time_obeys_what_echoes_its_nonce() -> None:
    node = device(clock=None, groups=["all"])
    nonce = status(node).nonce
    assert nonce is not None and nonce != status(device(clock=None)).nonce
    assert send(node, sealed(REBOOT)) == [] and send(node, sealed(REBOOT, nonce=bytes(8))) == []
    assert send(node, sealed(REBOOT, topic=ALL, nonce=nonce), ALL) == [], "no group command at all"
    assert node.counters.refused == 3
    assert said(send(node, sealed(REBOOT, nonce=nonce)))


def test_the_time_is_taken_from_the_server_and_goes_forwards() -> None:
    node = device(clock=None, groups=["all"])
    for forged in (
        time_message(NOW, STRANGER),
        time_message(NOW, ROOT),
        time_message(NOW, topic=ALL),
        encode_time(NOW),
    ):
        assert send(node, forged, TOPICS.time) == [] and status(node).nonce is not None
    assert send(node, time_message(2**62), TOPICS.time) == [] and status(node).nonce is not None
    send(node, time_message(NOW), TOPICS.time)
    assert status(node).nonce is None and said(send(node, sealed(REBOOT)))
    assert said(send(node, sealed(RebootCommand(5), topic=ALL), ALL))
    send(node, time_message(NOW + 70_000), TOPICS.time)
    assert send(node, sealed(RebootCommand(6), NOW + 2000)) == [], "it has expired"
    assert send(node, time_message(NOW), TOPICS.time) == [] and node.counters.stale == 1
    assert send(node, sealed(RebootCommand(6), NOW + 2001)) == [], "the time does not go back"


def test_a_group_command_of_before_the_start_is_not_obeyed() -> None:
    node = device(clock=None, groups=["all"])
    send(node, time_message(NOW), TOPICS.time)
    assert send(node, sealed(REBOOT, NOW - 1, topic=ALL), ALL) == []
    assert said(send(node, sealed(REBOOT, NOW + 1, topic=ALL), ALL))


def test_a_wrong_clock_is_corrected_forwards_by_the_server() -> None:
    node = device(clock=lambda: 1000)
    assert send(node, sealed(REBOOT)) == [] and node.counters.refused == 1
    send(node, time_message(NOW), TOPICS.time)
    assert said(send(node, sealed(REBOOT)))


def test_a_nonce_comes_from_key_and_boots_where_nothing_is_random() -> None:
    def started(store: MemoryStore | None, clock: bool = False) -> tuple[int, bytes]:
        good = device(store=store, clock=(lambda: NOW) if clock else None)
        config = ffi.new("mote_node_config_t *", good._node.config)
        config.nonce = bytes(8)
        node = ffi.new("mote_node_t *")
        return int(lib.mote_node_init(node, config)), bytes(node.nonce)

    store = MemoryStore()
    (first, one), (second, two) = started(store), started(store)
    assert first == second == lib.MOTE_OK and one != two and bytes(8) not in (one, two)
    assert started(None)[0] == lib.MOTE_ERR_ARGUMENT, "it could not tell old commands from new ones"
    assert started(None, clock=True)[0] == lib.MOTE_OK


# Keys


def test_keys_rotate() -> None:
    store = MemoryStore()
    node = device(store=store, groups=["keys"])
    change = NewKeys(3, 2, KEYS.next or b"", cose.public_key(AFTER))
    topic = TOPICS.group_command("keys")
    command = sealed(change, 1, topic=topic, expires=1, key=ROOT)  # retained for months
    assert isinstance(said(send(node, command, topic))[0], Success) and status(node).keys == 2
    assert send(node, sealed(REBOOT)) == [], "the old key does not count any more"
    assert said(send(node, sealed(REBOOT, NOW + 1001, key=NEXT)))
    assert said(send(node, sealed(RebootCommand(5), NOW + 1002, key=AFTER)))
    node = device(store=store, groups=["keys"])
    assert status(node).keys == 2
    ceiling = status(node).ceiling
    assert send(node, sealed(REBOOT, ceiling + 1)) == [] and said(send(node, sealed(REBOOT, ceiling + 2, key=AFTER)))


def test_keys_do_not_go_back() -> None:
    node = device()
    newest = NewKeys(3, 5, cose.public_key(AFTER))
    assert isinstance(said(send(node, sealed(newest, key=ROOT)))[0], Success)
    for version in (1, 4, 5):
        old = NewKeys(4 + version, version, KEYS.current, KEYS.next)
        assert said(send(node, sealed(old, key=ROOT))) == [Failure(4 + version, ErrorCode.DOWNGRADE)]
    assert status(node).keys == 5 and send(node, sealed(REBOOT)) == []
    assert said(send(node, sealed(REBOOT, NOW + 1001, key=AFTER)))


def test_new_keys_that_cannot_be_kept_are_not_taken() -> None:
    store = MemoryStore()
    node = device(store=store)
    store.fails = True
    assert send(node, sealed(NewKeys(3, 2, cose.public_key(AFTER)), key=ROOT)) != []
    store.fails = False
    assert status(node).keys == 1 and obeys(node)


def test_an_enrolment_anew_counts_more_than_kept_keys() -> None:
    store = MemoryStore()
    send(device(store=store), sealed(NewKeys(3, 2, cose.public_key(AFTER)), key=ROOT))
    again = replace(KEYS, root=cose.public_key(STRANGER), version=1)
    node = device(store=store, keys=again)
    assert status(node).keys == 1
    assert status(device(store=store, keys=replace(KEYS, version=7))).keys == 7


# Without keys


def test_a_device_without_keys_says_so_and_takes_no_sealed_command() -> None:
    node = mote()
    assert status(node).keys == 0
    assert send(node, sealed(REBOOT)) == [] and node.counters.malformed == 1
    plain = encode_command(NOW + 1000, NOW + 60_000, None, encode_action(REBOOT))
    assert said(send(node, plain))
    (refused,) = said(send(node, encode_command(NOW + 1001, NOW + 9000, None, encode_action(NewKeys(3, 2, bytes(32))))))
    assert refused == Failure(3, ErrorCode.ENGINE, lib.MOTE_ERR_UNSUPPORTED)


def test_a_configuration_without_what_keys_need_is_refused() -> None:
    good = device()
    for change in ("verify", "groups"):
        config = ffi.new("mote_node_config_t *", good._node.config)
        name = ffi.new("char[]", b"a/b")
        if change == "verify":
            config.verify.verify = ffi.NULL
        else:
            config.groups[2] = name
        assert lib.mote_node_init(ffi.new("mote_node_t *"), config) == lib.MOTE_ERR_ARGUMENT
    with pytest.raises(UserError, match="at most 4 groups"):
        device(groups=["a", "b", "c", "d", "e"])


# While something is under way


def test_a_flood_of_half_transfers_leaves_nothing_stuck() -> None:
    node = device()
    for i in range(200):
        order = work(id=i, round=i) if i % 2 else update(i, HEAD_ONLY)
        send(node, sealed(order, NOW + 1000 + i))
        messages = broadcast(order) if i % 2 else carried(HEAD_ONLY)  # type: ignore[arg-type]
        deliver(node, messages[:-1])
    order = work(id=900, round=900)
    send(node, sealed(order, NOW + 2000))
    assert len(replies(deliver(node, broadcast(order)))) == 1 and node.model == PROGRAM.model_id


def test_a_task_ends_when_its_command_expires() -> None:
    now = [NOW]
    node = device(clock=lambda: now[0])
    send(node, sealed(work(phases=(Phase(0xFFFFFFFF, 2**32 - 1, 0.0),), weights=data_of(WEIGHTS))))
    for _ in range(1000):
        assert node.step()
    now[0] += 60_000
    assert not node.step()
    assert said(list(node.poll())) == [Failure(7, ErrorCode.EXPIRED)]
    assert said(send(node, sealed(REBOOT, now[0] + 1, expires=now[0] + 10)))


def test_an_endless_task_gives_way_to_the_next_command() -> None:
    node = device()
    send(node, sealed(work(phases=(Phase(0xFFFFFFFF, 2**32 - 1, 0.0),), weights=data_of(WEIGHTS))))
    for _ in range(1000):
        assert node.step()
    assert obeys(node)


@pytest.mark.parametrize("change", ["swapped", "another round's", "truncated", "extra"])
def test_weights_that_are_not_the_commands_are_not_learned_from(change: str) -> None:
    node, order = device(), work()
    chunks = broadcast(order)
    other = broadcast(order, WEIGHTS * 2)
    messages = {
        "swapped": [(chunks[0][0], chunks[1][1]), (chunks[1][0], chunks[0][1])],
        "another round's": [chunks[0], other[1]],
        "truncated": [chunks[0], (chunks[1][0], chunks[1][1][:-4])],
        "extra": [chunks[0], (chunks[1][0][:-1] + "2", chunks[1][1])],
    }[change]
    send(node, sealed(order))
    outs = deliver(node, messages)
    if change == "another round's":
        assert replies(outs) == [Failure(7, ErrorCode.DAMAGED)]
    else:
        assert replies(outs) == [] and node.counters.malformed
        assert len(replies(deliver(node, chunks))) == 1, "what is right is taken after that"
    assert node.counters.samples == (0 if change == "another round's" else 20)
    assert obeys(node)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.booleans()), max_size=60))
def test_counters_only_rise_whatever_arrives(history: list[tuple[int, int, bool]]) -> None:
    """After a reset nothing is obeyed that was obeyed before, on no topic."""
    store, obeyed = MemoryStore(), set()
    node = device(store=store, groups=["all"])
    for kind, step, reset in history:
        topic = ALL if kind % 2 else TOPICS.command(ID)
        counter = NOW + step * 20_000
        if said(send(node, sealed(RebootCommand(step + 100 * kind), counter, topic=topic), topic)):
            obeyed.add((topic, counter))
        if reset:
            highest = max((c for t, c in obeyed if t == TOPICS.command(ID)), default=0)
            node = device(store=store, groups=["all"])
            assert status(node).ceiling >= highest
            assert all(not said(send(node, sealed(REBOOT, c, topic=t), t)) for t, c in obeyed)
