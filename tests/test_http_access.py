"""Who may do what over HTTP: every route, every scope, and pages of other origins."""

import http.client
import json
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ontology_fixtures import description, payload, status

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.http.access import COOKIE, SCOPES, Access, Client, Scope
from tinyfleet.ontology.http.endpoint import Endpoint
from tinyfleet.ontology.store.remote_store import RemoteStore
from tinyfleet.ontology.store.store import EmbeddedStore
from tinyfleet.server.authority.identities import Issued
from tinyfleet.server.fleet_server import FleetServer

ORIGIN = "https://dashboard.example"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
ROUTES: list[tuple[str, str, Scope | None, str | None]] = [
    ("GET", "/sparql?query=ASK%7B%7D", "read", None),
    ("POST", "/sparql", "read", "query=ASK%7B%7D"),
    ("POST", "/sparql", "write", "update=INSERT%20DATA%20%7B%20%3Curn%3Aa%3E%20%3Curn%3Ab%3E%201%20%7D"),
    ("GET", "/search/sparql?query=ASK%7B%7D", "read", None),
    ("POST", "/search/sparql", "read", "query=ASK%7B%7D"),
    ("GET", "/things", "read", None),
    ("POST", "/things", "write", "{}"),
    ("GET", "/things/urn:x", "read", None),
    ("PUT", "/things/urn:x", "write", "{}"),
    ("PATCH", "/things/urn:x", "write", "{}"),
    ("DELETE", "/things/urn:x", "write", None),
    ("GET", "/events/nothing", "read", None),
    ("GET", "/.well-known/wot", "read", None),
    ("GET", "/page/about.json", "read", None),
    ("GET", "/metrics", "read", None),
    ("GET", "/identities", "admin", None),
    ("POST", "/identities/tokens", "admin", "{}"),
    ("DELETE", "/identities/nobody", "admin", None),
    ("GET", "/fleet-keys/proposed", "admin", None),
    ("POST", "/fleet-keys", "admin", "{}"),
    ("POST", "/devices/nobody/commands/nothing", "operate", None),
    ("DELETE", "/devices/nobody", "admin", None),
    ("POST", "/login-codes", "admin", None),
    ("POST", "/logout", "read", None),
    ("GET", "/health", None, None),
    ("GET", "/ca.pem", None, None),
    ("GET", "/vocabulary", None, None),
]


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetServer]:
    data = tmp_path_factory.mktemp("server")
    with FleetServer(data, "home", port=0, operator_port=0, cors_origins=[ORIGIN]) as running:
        identities = running.authority.identities
        for serial, scope in enumerate(SCOPES, 1):
            owner = Issued(serial, f"{scope}er", "operator", b"", "", 0)
            identities.put(owner, None, 0)
            identities.add_api_token(f"the {scope} token", owner, scope, 0)
        yield running


def ask(server: FleetServer, method: str, path: str, body: str | None = None, **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", int(server.address.rpartition(":")[2]), timeout=20)
    try:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, (FORM if body and "=" in body else {}) | given)
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read())
    finally:
        connection.close()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(("method", "path", "needed", "body"), ROUTES)
def test_a_route_needs_its_scope(
    server: FleetServer, method: str, path: str, needed: Scope | None, body: str | None
) -> None:
    if needed is None:
        assert ask(server, method, path, body).status == 200
        return
    nobody = ask(server, method, path, body)
    assert (nobody.status, nobody.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert ask(server, method, path, body, **bearer("wrong")).status == 401
    for scope in SCOPES:
        answer = ask(server, method, path, body, **bearer(f"the {scope} token"))
        allowed = SCOPES.index(scope) >= SCOPES.index(needed)
        assert (answer.status not in (401, 403)) is allowed or "identities/nobody" in path, (scope, answer)
        if not allowed:
            assert f"needs the scope '{needed}'".encode() in answer.body


def test_every_route_of_the_server_is_in_the_table(server: FleetServer) -> None:
    """So that a new route is not forgotten here; those that enrol have tests of their own."""
    known = {(method, re.sub(r"\?.*|urn:x|nobody|nothing", "", path)) for method, path, _, _ in ROUTES}
    known |= {("POST", "/enrol"), ("POST", "/renew"), ("GET", "/login"), ("GET", "/"), ("GET", "/events")}
    known |= {("GET", "/sparql/"), ("POST", "/sparql/")}
    for route in server.http.routes:
        for method in (getattr(route, "methods", None) or set()) - {"HEAD"}:
            assert (method, re.sub(r"\{[^}]*\}", "", route.path)) in known, (method, route.path)


# The page's session


class Browser:
    """Sends what a browser sends that is logged in: the cookie with everything, and where the request is from."""

    def __init__(self, server: FleetServer) -> None:
        self.server = server
        path = server.login_address().removeprefix(server.address)
        logged_in = ask(server, "GET", path)
        assert logged_in.status == 200
        self.set_cookie = logged_in.headers["Set-Cookie"]
        self.cookie = self.set_cookie.partition(";")[0]
        self.login = path
        self.csrf = json.loads(self("GET", "/page/about.json", site="same-origin").body)["csrf"]

    def __call__(
        self, method: str, path: str, body: str | None = None, site: str | None = None, **headers: str
    ) -> Answer:
        said = {} if site is None else {"Sec-Fetch-Site": site}
        return ask(self.server, method, path, body, Cookie=self.cookie, **said, **headers)


@pytest.fixture
def browser(server: FleetServer) -> Browser:
    return Browser(server)


def test_the_cookie_is_for_this_server_alone(server: FleetServer, browser: Browser) -> None:
    assert browser.cookie.startswith(COOKIE.format(port=server.address.rpartition(":")[2]) + "=")
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(browser.set_cookie.split("; "))
    assert ask(server, "GET", browser.login).status == 403  # its address works once
    assert ask(server, "GET", "/login?code=guessed").status == 403
    assert ask(server, "GET", "/").status in (401, 404)  # 404: the page is not built here
    assert ask(server, "GET", "/page/about.json", Cookie=COOKIE.format(port=1) + "=x").status == 401


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_of_another_origin_can_neither_read_nor_act(browser: Browser, site: str) -> None:
    origin = "http://127.0.0.1:1"
    for method, path, needed, body in ROUTES:
        if needed is not None:
            for headers in ({}, {"Origin": origin}, {"X-CSRF-Token": browser.csrf}):
                assert browser(method, path, body, site, **headers).status == 403, (method, path)
    answer = browser("GET", "/things", site="same-origin")
    assert answer.status == 200
    assert not any(name.lower().startswith("access-control") for name in answer.headers)


def test_a_browser_without_fetch_metadata_is_judged_by_the_origin(browser: Browser) -> None:
    assert browser("GET", "/things", Origin="http://evil.example").status == 403
    assert browser("GET", "/things", Origin=browser.server.address).status == 200
    assert browser("GET", "/things", Origin="null").status == 403


def test_changes_need_the_sessions_csrf_token(browser: Browser) -> None:
    update = "update=INSERT%20DATA%20%7B%20%3Curn%3Aa%3E%20%3Curn%3Ab%3E%202%20%7D"
    assert browser("POST", "/sparql", update, "same-origin").status == 403
    assert browser("POST", "/sparql", update, "same-origin", X_CSRF_Token="wrong").status == 403
    assert browser("POST", "/sparql", update, "same-origin", X_CSRF_Token=Browser(browser.server).csrf).status == 403
    assert browser("POST", "/sparql", update, "same-origin", X_CSRF_Token=browser.csrf).status == 204
    assert browser("POST", "/logout", site="same-origin", X_CSRF_Token=browser.csrf).status == 204
    assert browser("GET", "/things", site="same-origin").status == 401


def test_sessions_and_login_codes_end() -> None:
    now = [0.0]
    access = Access({}.get, clock=lambda: now[0])
    code = access.new_login(Client("owner", "admin"))
    now[0] = 601
    assert access.log_in(code) is None
    cookie = access.log_in(access.new_login(Client("owner", "admin")))
    assert access._session(cookie) is not None
    now[0] += 12 * 3600 + 1
    assert access._session(cookie) is None


def test_only_configured_origins_may_use_a_token(server: FleetServer) -> None:
    asked = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "authorization"}
    allowed = ask(server, "OPTIONS", "/things", Origin=ORIGIN, **asked)
    assert (allowed.status, allowed.headers["Access-Control-Allow-Origin"]) == (204, ORIGIN)
    assert "Access-Control-Allow-Credentials" not in allowed.headers
    other = ask(server, "OPTIONS", "/things", Origin="https://evil.example", **asked)
    assert "Access-Control-Allow-Origin" not in other.headers
    answer = ask(server, "GET", "/things", Origin=ORIGIN, **bearer("the read token"))
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, ORIGIN)
    assert ask(server, "GET", "/things", Origin=ORIGIN).status == 401


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::1", "localhost.", "192.168.1.5"])
def test_a_name_that_is_not_this_servers_is_refused(server: FleetServer, host: str) -> None:
    """DNS rebinding: a page gives its own name this machine's address, to be of the same origin."""
    answer = ask(server, "GET", "/health", Host=host)
    assert answer.status == 400
    assert ask(server, "GET", "/health", Host="localhost:5").status == 200


def test_answers_carry_headers_that_protect_them(server: FleetServer) -> None:
    answer = ask(server, "GET", "/things", **bearer("the read token"))
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-store"
    assert "Server" not in answer.headers
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert ask(server, "GET", path).status == 404


# Health and figures


def test_health_and_metrics(tmp_path: Path) -> None:
    topics = Topics("home")
    with FleetServer(tmp_path, "home", port=0, operator_port=0) as server:
        server.registry.ingest_one(topics.td("dev-1"), payload(description()))
        server.registry.ingest_one(topics.status("dev-1"), status())
        assert json.loads(ask(server, "GET", "/health").body) == {"status": "ok", "problems": []}
        answer = ask(server, "GET", "/metrics", **bearer(server.token))
        assert answer.headers.get_content_type() == "text/plain"
        lines = answer.body.decode().splitlines()
        assert {
            'tinyfleet_messages_total{outcome="accepted"} 2.0',
            'tinyfleet_devices{state="online"} 1.0',
            "tinyfleet_broker_connected 1.0",
            "tinyfleet_broker_restarts_total 0.0",
            'tinyfleet_http_answers_total{status="200"} 1.0',
        } <= set(lines)
        assert any(line.startswith("process_resident_memory_bytes ") for line in lines)


# Beyond this machine


def test_https_with_the_fleets_own_authority(tmp_path: Path) -> None:
    from tinyfleet.server.authority.authority import Authority

    authority = Authority(tmp_path / "authority", ["127.0.0.2"])
    with (
        EmbeddedStore() as store,
        Endpoint(
            store, Access.of_token("token"), listen="127.0.0.2", certificate=authority.server_files,
            host_names=["127.0.0.2"],
        ) as endpoint,
    ):  # fmt: skip
        assert endpoint.address.startswith("https://127.0.0.2:")
        assert RemoteStore(endpoint.url, "token", ca=authority.ca_file).ask("ASK { }")
        with pytest.raises(UserError, match="certificate verify failed"):
            RemoteStore(endpoint.url, "token").ask("ASK { }")
        old = ssl.create_default_context(cafile=str(authority.ca_file))
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with socket.create_connection(("127.0.0.2", endpoint.port)) as plain, pytest.raises(ssl.SSLError):
            old.wrap_socket(plain, server_hostname="127.0.0.2")
    authority.close()


def test_without_a_certificate_it_stays_on_this_machine() -> None:
    with EmbeddedStore() as store, pytest.raises(UserError, match="without a certificate"):
        Endpoint(store, Access.open(), listen="0.0.0.0")


def test_a_server_without_security_stays_on_this_machine(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must not listen on 0\.0\.0\.0"):
        FleetServer(tmp_path, "home", listen="0.0.0.0", insecure=True)


def test_a_wrong_scope_is_no_scope() -> None:
    owners: dict[str, tuple[str, Any]] = {"t": ("x", "read")}
    with EmbeddedStore() as store, Endpoint(store, Access(owners.get)) as endpoint:
        assert RemoteStore(endpoint.url, "t").ask("ASK { }")
        with pytest.raises(UserError, match="needs the scope 'write'"):
            RemoteStore(endpoint.url, "t").update("CLEAR ALL")
