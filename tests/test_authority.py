"""Identities on a real secured broker: who may do what, who gets in, and who is put out."""

import dataclasses
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.private_files import write_private
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.enrolment_token import EnrolmentToken
from tinyfleet.edge.wire.identity import Identity, _request, enrol, identity_folder
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.server_info import find_broker, find_device_brokers, find_server, fleet_of, use_token
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.store.data_folder import remote_store
from tinyfleet.server.authority import certificates
from tinyfleet.server.authority.authority import LIFE, SERVER, Authority
from tinyfleet.server.authority.identities import Issued, Role
from tinyfleet.server.broker import Broker, Secured
from tinyfleet.server.fleet_server import FleetServer

TOPICS = Topics("home")
URL = "http://127.0.0.1:1"
ECHO = "tinyfleet/home/devices/kitchen/echo"


class Place(NamedTuple):
    """A secured broker, its authority, and a folder for identities."""

    authority: Authority
    broker: Broker
    folder: Path

    def join(self, name: str, role: Role = "device") -> BrokerAddress:
        """Enrol a name with a key of its own; the broker as it shows itself there."""
        key = certificates.new_key()
        token = self.authority.open_token([name], role, URL, replace=True)
        done = self.authority.enrol(token.secret, name, _request(key, name))
        files = self.folder / f"{name}.key", self.folder / f"{name}.crt"
        write_private(files[0], certificates.key_pem(key))
        files[1].write_text(done.certificate)
        address = self.broker.device_address if role == "device" else self.broker.address
        return dataclasses.replace(address, key=files[0], cert=files[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("fleet")
    authority = Authority(folder / "authority")
    with Broker(0, folder / "broker", secured=Secured(authority, "home")) as broker:
        yield Place(authority, broker, folder)
    authority.close()


class Client:
    """A session, and what it hears."""

    def __init__(self, broker: BrokerAddress, id: str = "any") -> None:
        self.heard: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.session = Session(broker, id, on_message=lambda *message: self.heard.put(message))

    def subscribe(self, topic: str, sync: str = "tinyfleet/home/runs/9/9/9") -> None:
        """Returns once the broker has the subscription: it then knows the later one to `sync`, too."""
        self.session.subscribe(topic)
        self.session.subscribe(sync)
        self.session.publish(sync, b"synchronised")
        while self.heard.get(timeout=20) != (sync, b"synchronised"):
            pass

    def hears(self, topic: str, payload: bytes) -> bool:
        """Whether this message comes, before the marker that is sent after it."""
        heard = False
        while (message := self.heard.get(timeout=20))[1] != b"marker":
            heard |= message == (topic, payload)
        return heard


# Each topic, and whether the device "kitchen" may write and read it.
ACCESS = [
    (TOPICS.td("kitchen"), True, False),
    (TOPICS.status("kitchen"), True, False),
    (TOPICS.reply("kitchen"), True, False),
    ("tinyfleet/home/devices/kitchen/event", True, False),
    (ECHO, True, True),
    (TOPICS.command("kitchen"), False, True),
    (TOPICS.weights(5, 1, 0), False, True),
    (TOPICS.program(bytes(8), 0), False, True),
    (TOPICS.td("hall"), False, False),
    (TOPICS.status("hall"), False, False),
    (TOPICS.command("hall"), False, False),
    (TOPICS.reply("hall"), False, False),
    ("tinyfleet/home/devices/hall/echo", False, False),
    (TOPICS.driver("run", 5, "a"), False, False),
    ("tinyfleet/home/time", False, True),
    (TOPICS.group_command("all"), False, True),
    (TOPICS.submission("kitchen"), False, False),
    (TOPICS.refused("kitchen"), False, False),
    ("tinyfleet/other/devices/kitchen/status", False, False),
    ("anything", False, False),
    ("$SYS/broker/uptime", False, False),
]


@pytest.mark.parametrize(("topic", "may_write", "may_read"), ACCESS)
def test_what_a_device_may_write_and_read(place: Place, topic: str, may_write: bool, may_read: bool) -> None:
    operator = Client(place.broker.address)
    device = Client(place.join("kitchen"))
    operator.subscribe(topic)
    operator.subscribe(TOPICS.reply("kitchen"))
    device.session.publish(topic, b"from the device")
    device.session.publish(TOPICS.reply("kitchen"), b"marker")  # which it may write
    assert operator.hears(topic, b"from the device") is may_write
    device.subscribe(topic, ECHO)
    device.subscribe(TOPICS.command("kitchen"), ECHO)
    operator.session.publish(topic, b"for the device")
    operator.session.publish(TOPICS.command("kitchen"), b"marker")  # which it may read
    assert device.hears(topic, b"for the device") is may_read
    device.session.close()
    operator.session.close()


def test_a_filter_with_wildcards_shows_a_device_no_more(place: Place) -> None:
    device, operator = Client(place.join("kitchen")), Client(place.broker.address)
    device.subscribe("#", ECHO)
    for topic, _, may_read in ACCESS:
        operator.session.publish(topic, b"for all")
        operator.session.publish(TOPICS.command("kitchen"), b"marker")
        assert device.hears(topic, b"for all") is may_read, topic
    device.session.close()
    operator.session.close()


def test_nobody_takes_a_devices_session_with_its_client_id(place: Place) -> None:
    kitchen, operator = Client(place.join("kitchen"), "kitchen"), Client(place.broker.address)
    thief = Client(place.join("hall"), "kitchen")
    kitchen.subscribe(TOPICS.command("kitchen"), ECHO)
    operator.session.publish(TOPICS.command("kitchen"), b"still here")
    assert kitchen.heard.get(timeout=10) == (TOPICS.command("kitchen"), b"still here")
    for client in (kitchen, thief, operator):
        client.session.close()


def refused(broker: BrokerAddress) -> str:
    with pytest.raises(UserError) as error:
        Session(broker, "x")
    return str(error.value)


def test_only_the_fleets_own_get_in(place: Place, tmp_path: Path) -> None:
    device, operator = place.join("kitchen"), place.join("anna", "operator")
    assert "asks for a client certificate" in refused(place.broker.device_address)
    swapped = dataclasses.replace(place.broker.address, cert=device.cert, key=device.key)
    assert "does not know the authority" in refused(swapped)
    swapped = dataclasses.replace(place.broker.device_address, cert=operator.cert, key=operator.key)
    assert "does not know the authority" in refused(swapped)
    plain = BrokerAddress(device.host, device.port, tls=False)
    assert "write mqtts://" in refused(plain)
    other = Authority(tmp_path / "other")
    assert "cannot be trusted" in refused(dataclasses.replace(device, ca=other.ca_file))
    foreign = Place(other, place.broker, tmp_path).join("kitchen")  # signed by another fleet's authority of that name
    assert "does not know the authority" in refused(dataclasses.replace(foreign, ca=place.authority.ca_file))
    other.close()


def test_an_expired_certificate_is_named(place: Place) -> None:
    address = place.join("old")
    key = certificates.new_key()
    long_ago = datetime.now(UTC) - 2 * LIFE["device"]
    pair = place.authority._clients["device"]
    old = certificates.client_certificate(pair, "old", key.public_key(), long_ago, LIFE["device"])
    assert address.key is not None and address.cert is not None
    write_private(address.key, certificates.key_pem(key))
    address.cert.write_bytes(certificates.certificate_pem(old))
    assert "has expired" in refused(address)


def wait_until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


def test_a_revoked_device_is_out_at_once_and_stays_out(place: Place) -> None:
    lost, other = Client(place.join("lost")), Client(place.join("other"))
    address = place.join("lost")
    lost.session.close()
    lost = Client(address)
    gone = threading.Event()
    lost.session._on_lost = gone.set
    lost.session._since -= 60  # as if it had been connected for a while
    assert place.authority.revoke("lost") == "device"
    assert gone.wait(20)
    wait_until(lambda: lost.session._retry >= 4)  # it tries again less and less often, and does not flood the broker
    assert "is revoked" in refused(address)
    assert other.session.connected
    assert place.authority.identities.command_key("lost") is None
    other.session.close()
    lost.session.close()


def test_an_operator_commands_through_the_server_alone(place: Place) -> None:
    anna, kitchen = Client(place.join("anna", "operator")), Client(place.join("kitchen"))
    owner = Client(place.broker.address)
    for topic in (TOPICS.command("kitchen"), TOPICS.group_command("all"), TOPICS.time):
        kitchen.subscribe(topic, ECHO)
        anna.session.publish(topic, b"from an operator")
        anna.session.flush(10)
        owner.session.publish(topic, b"marker")
        assert not kitchen.hears(topic, b"from an operator")
    for client in (anna, kitchen, owner):
        client.session.close()


def test_an_operator_does_not_hear_what_another_submits(place: Place) -> None:
    anna, owner = Client(place.join("anna", "operator"), "anna"), Client(place.broker.address, "owner")
    anna.subscribe("#")
    owner.subscribe(TOPICS.submission("+"))
    for client in (anna, owner):  # a submission holds a token
        client.session.publish(TOPICS.submission("a"), b"a submission")
        client.session.flush(10)
        owner.session.publish(TOPICS.reply("kitchen"), b"marker")
        assert not anna.hears(TOPICS.submission("a"), b"a submission")
    assert [owner.heard.get(timeout=10) for _ in range(2)] == 2 * [(TOPICS.submission("a"), b"a submission")]
    for client in (anna, owner):
        client.session.close()


@pytest.mark.parametrize(
    "topic",
    [
        TOPICS.time,
        TOPICS.refused("anna"),
        TOPICS.status("kitchen"),
        TOPICS.command("kitchen"),
        TOPICS.reply("kitchen"),
        TOPICS.group_command("keys"),
        TOPICS.weights(5, 1, 0),
        TOPICS.program(bytes(8), 0),
        TOPICS.driver("run", 5, "a"),
    ],
)
def test_an_operator_reads_what_a_run_and_a_deployment_need(place: Place, topic: str) -> None:
    anna, owner = Client(place.join("anna", "operator"), "anna"), Client(place.broker.address, "owner")
    anna.subscribe(topic)
    owner.session.publish(topic, b"for all")
    owner.session.publish(topic, b"marker")
    assert anna.hears(topic, b"for all")
    for client in (anna, owner):
        client.session.close()


def test_a_revoked_operators_session_can_do_nothing_any_more(place: Place) -> None:
    anna, kitchen = Client(place.join("anna", "operator")), Client(place.join("kitchen"))
    kitchen.subscribe(TOPICS.weights(5, 1, 0), ECHO)
    anna.session.publish(TOPICS.weights(5, 1, 0), b"before")
    assert kitchen.heard.get(timeout=10)[1] == b"before"
    place.authority.revoke("anna")
    anna.session.publish(TOPICS.weights(5, 1, 0), b"after")
    anna.session.flush(10)
    owner = Client(place.broker.address)
    owner.session.publish(TOPICS.weights(5, 1, 0), b"marker")
    assert not kitchen.hears(TOPICS.weights(5, 1, 0), b"after")
    for client in (anna, kitchen, owner):
        client.session.close()


def test_an_operators_old_session_gets_nothing_back_with_its_name(place: Place) -> None:
    thief, kitchen = Client(place.join("eve", "operator"), "thief"), Client(place.join("kitchen"))
    kitchen.subscribe(TOPICS.weights(5, 1, 0), ECHO)
    thief.subscribe(TOPICS.reply("kitchen"))
    owner = Client(place.join("eve", "operator"))  # enrolled again, with a key of its own
    for client, payload in ((thief, b"from the thief"), (owner, b"marker")):
        client.session.publish(TOPICS.weights(5, 1, 0), payload)
        client.session.flush(10)
    assert not kitchen.hears(TOPICS.weights(5, 1, 0), b"from the thief")
    kitchen.session.publish(TOPICS.reply("kitchen"), b"a reply")
    kitchen.session.flush(10)
    thief.session.publish(TOPICS.weights(5, 1, 0), b"one more")
    thief.session.flush(10)  # the acknowledgement comes after what the broker had for this session before
    assert (TOPICS.reply("kitchen"), b"a reply") not in thief.heard.queue
    for client in (thief, kitchen, owner):
        client.session.close()


# Tokens


def test_a_token_is_for_its_names_once_each(place: Place) -> None:
    authority = place.authority
    token = authority.open_token(["t-0", "t-1"], "device", URL)
    first, second = certificates.new_key(), certificates.new_key()
    done = authority.enrol(token.secret, "t-0", _request(first, "t-0"))
    again = authority.enrol(token.secret, "t-0", _request(first, "t-0"))  # the answer was lost
    assert again.certificate == done.certificate and again.command_key == done.command_key
    with pytest.raises(UserError, match="has been used"):
        authority.enrol(token.secret, "t-0", _request(second, "t-0"))
    with pytest.raises(UserError, match="not for that name, but for t-0 and others"):
        authority.enrol(token.secret, "t-2", _request(second, "t-2"))
    with pytest.raises(UserError, match="does not know this enrolment token"):
        authority.enrol("A" * 32, "t-1", _request(second, "t-1"))
    assert authority.enrol(token.secret, "t-1", _request(second, "t-1")).role == "device"


def test_two_keys_that_use_a_token_at_once_get_one_identity(place: Place) -> None:
    token = place.authority.open_token(["race"], "device", URL)
    outcomes: list[str] = []
    keys = [certificates.new_key() for _ in range(8)]

    def use(i: int) -> None:
        try:
            outcomes.append(place.authority.enrol(token.secret, "race", _request(keys[i], "race")).certificate)
        except UserError:
            outcomes.append("refused")

    threads = [threading.Thread(target=use, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("refused") == 7


def test_time_ends_tokens_and_brings_new_certificates(tmp_path: Path) -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    authority = Authority(tmp_path / "a", ["fleet.example"], clock=lambda: now)
    token = authority.open_token(["late"], "device", URL)
    first = certificates.server_names(
        certificates.x509.load_pem_x509_certificate(authority.server_files[0].read_bytes())
    )
    assert {"fleet.example", "localhost", "127.0.0.1"} <= first
    before = authority.server_files[0].read_bytes()
    authority.close()
    now += timedelta(days=300)
    authority = Authority(tmp_path / "a", clock=lambda: now)  # two thirds of its certificate's life are over
    assert authority.server_files[0].read_bytes() != before
    with pytest.raises(UserError, match="has expired"):
        authority.enrol(token.secret, "late", _request(certificates.new_key(), "late"))
    authority.close()


def test_a_server_that_runs_for_years_renews_its_own_certificates(tmp_path: Path) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    authority = Authority(tmp_path / "authority", clock=lambda: now)
    with Broker(0, tmp_path / "broker", secured=Secured(authority, "home")) as broker:
        assert not authority.renew_own()
        before = [file.read_bytes() for file in (authority.server_files[0], authority.client_files[0])]
        now -= timedelta(days=300)  # so that those made then are of the past, and these of their future
        assert authority.renew_own()
        now += timedelta(days=300)
        assert authority.renew_own()
        after = [file.read_bytes() for file in (authority.server_files[0], authority.client_files[0])]
        assert before[0] != after[0]
        Session(broker.address, "owner").close()
    authority.close()


@pytest.mark.parametrize("name", ["", "a/b", "a+", "#", "x" * 33, SERVER, "ü", "a b", "a\nb"])
def test_a_name_that_cannot_be_a_topic_or_is_the_servers_is_refused(place: Place, name: str) -> None:
    with pytest.raises(UserError, match="cannot be a name"):
        place.authority.open_token([name], "device", URL)


def test_a_name_is_taken_once_over_all_roles(place: Place) -> None:
    place.join("both", "operator")
    with pytest.raises(UserError, match="there is an operator both already"):
        place.authority.open_token(["both"], "device", URL, replace=True)


def test_a_token_made_before_a_name_was_taken_does_not_take_it_over(place: Place) -> None:
    authority = place.authority
    first, second = authority.open_token(["twice"], "device", URL), authority.open_token(["twice"], "operator", URL)
    key, other = certificates.new_key(), certificates.new_key()
    device = authority.enrol(first.secret, "twice", _request(key, "twice"))
    with pytest.raises(UserError, match="does not know this enrolment token"):
        authority.enrol(second.secret, "twice", _request(other, "twice"))
    assert authority.identities.role("twice") == "device"
    assert authority.enrol(first.secret, "twice", _request(key, "twice")).certificate == device.certificate


def test_an_identity_replaced_or_revoked_meanwhile_gets_no_certificate_and_no_api_token(place: Place) -> None:
    """What another request has done between the check and the last step of a renewal or an enrolment."""
    identities = place.authority.identities
    old = Issued(10, "meanwhile", "operator", b"old key", "", 2**40)
    new = Issued(11, "meanwhile", "operator", b"new key", "", 2**40)
    identities.put(old, None, 0)
    identities.put(new, None, 0)
    with pytest.raises(UserError, match="meanwhile has been revoked"):
        identities.renew(old._replace(serial=12), old.public_key)
    with pytest.raises(UserError, match="meanwhile has been revoked"):
        identities.add_api_token("late", old, "operate", 0)
    assert identities.scope_of("late") is None
    assert identities.public_keys("meanwhile", 0) == [new.public_key]
    identities.revoke("meanwhile", 0)
    with pytest.raises(UserError, match="meanwhile has been revoked"):
        identities.add_api_token("late", new, "operate", 0)
    assert identities.scope_of("late") is None


# Over HTTP, and on disk


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetServer]:
    data = tmp_path_factory.mktemp("server")
    with FleetServer(data, "home", port=0, operator_port=0) as running:
        yield running


def test_enrolment_over_http_and_renewal(server: FleetServer, tmp_path: Path) -> None:
    token = server.authority.open_token(["pi"], "device", server.address)
    identity = enrol(token, "pi", tmp_path)
    assert Identity.load(identity.folder) == identity
    assert (identity.role, identity.fleet, len(identity.command_key or "")) == ("device", "home", 64)
    Session(identity.broker, "x").close()
    for path in identity.folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(identity.folder.stat().st_mode) == 0o700
    assert identity.renew_if_due() is identity
    before = identity.cert.read_text()
    renewed = identity.renew_if_due(now=identity.issued + 0.7 * (identity.expires - identity.issued))
    assert renewed.cert.read_text() != before
    Session(renewed.broker, "x").close()
    stranger = certificates.new_key()
    write_private(identity.key, certificates.key_pem(stranger))
    with pytest.raises(UserError, match="not signed by a valid key"):
        renewed.renew_if_due(now=identity.expires)


def test_an_interrupted_enrolment_goes_on_with_the_same_key(server: FleetServer, tmp_path: Path) -> None:
    token = server.authority.open_token(["cut"], "device", server.address)
    identity = enrol(token, "cut", tmp_path)
    folder = identity_folder(tmp_path, "cut")
    (folder / "identity.json").unlink()  # as if the process had been killed before the last write
    identity.key.rename(folder / "new-key.pem")
    assert Identity.load(folder) is None
    assert enrol(token, "cut", tmp_path).cert.read_text() == identity.cert.read_text()


def test_a_server_that_is_not_the_tokens_gets_nothing(server: FleetServer, tmp_path: Path) -> None:
    token = server.authority.open_token(["x"], "device", server.address)
    with pytest.raises(UserError, match="not the one that this token is of"):
        enrol(dataclasses.replace(token, fingerprint=bytes(32)), "x", tmp_path)
    with pytest.raises(UserError, match="not encrypted"):
        enrol(dataclasses.replace(token, url="http://192.0.2.1:1"), "x", tmp_path)
    assert not identity_folder(tmp_path, "x").exists()


def test_an_operator_on_another_machine(server: FleetServer, tmp_path: Path) -> None:
    token = server.authority.open_token(["bob"], "operator", server.address)
    use_token(token.text, tmp_path, [])
    use_token(token.text, tmp_path, [])  # the same command again
    Session(find_broker(None, tmp_path), "any").close()
    graph = remote_store(find_server(tmp_path))
    assert graph.ask("ASK { }")
    server.authority.revoke("bob")
    with pytest.raises(UserError, match="does not know this token"):
        graph.ask("ASK { }")
    assert "is revoked" in refused(find_broker(None, tmp_path))


def test_a_device_takes_its_fleet_from_its_identity(server: FleetServer, tmp_path: Path) -> None:
    assert fleet_of(None, tmp_path) == "home"  # the default, which is also this server's
    use_token(server.authority.open_token(["far"], "device", server.address).text, tmp_path, ["far"])
    folder = identity_folder(tmp_path, "far")
    text = (folder / "identity.json").read_text()
    (folder / "identity.json").write_text(text.replace('"fleet": "home"', '"fleet": "green"'))
    assert fleet_of(None, tmp_path) == "green"
    (address,) = find_device_brokers(["far"], None, tmp_path)
    Session(address, "any").close()
    with pytest.raises(UserError, match="near has no identity"):
        find_device_brokers(["near"], None, tmp_path)


@pytest.mark.parametrize(
    "text", ["", "x", "tinyfleet1.", "tinyfleet1.AAAA", "tinyfleet1." + "A" * 3000, "tinyfleet1.\x00"]
)
def test_what_is_no_token_is_said(text: str) -> None:
    with pytest.raises(UserError, match="no enrolment token"):
        EnrolmentToken.parse(text)


def test_the_authority_is_its_owners_and_stays_the_same(tmp_path: Path) -> None:
    first = Authority(tmp_path / "authority")
    fingerprint, client = first.fingerprint, first.client_files[0].read_bytes()
    for path in (tmp_path / "authority").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((tmp_path / "authority").stat().st_mode) == 0o700
    first.close()
    (tmp_path / "authority" / "operator-ca.crt").unlink()  # an interrupted first start
    second = Authority(tmp_path / "authority")
    assert second.fingerprint == fingerprint and second.client_files[0].read_bytes() == client
    second.close()
    (tmp_path / "authority" / "fleet-ca.key").write_text("damaged")
    with pytest.raises(UserError, match=r"authority in .* is damaged"):
        Authority(tmp_path / "authority")
