"""The query page in a real browser: Chromium, driven by selenium. It asks nobody but its own server."""

import http.server
import json
import shutil
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ontology_fixtures import MODEL, TOKEN, description, payload, status

from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.http import endpoint as endpoint_module
from tinyfleet.ontology.http.access import Access, Client
from tinyfleet.ontology.http.endpoint import PAGE, Endpoint
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.store import EmbeddedStore, parameters

TOPICS = Topics("home")
WAIT = 60.0


@pytest.fixture(scope="module")
def served() -> Iterator[Endpoint]:
    """A fleet of twelve devices, four of them offline."""
    with EmbeddedStore() as store:
        registry = Registry(store, "home")
        for i in range(12):
            td = description(f"dev-{i:02}", title=f"Device {i}", tf__engineVersion=f"0.{1 + i % 2}.0")
            assert registry.ingest_one(TOPICS.td(f"dev-{i:02}"), payload(td))
            assert registry.ingest_one(TOPICS.status(f"dev-{i:02}"), status(online=i % 3 != 0))
        model = f"<urn:tinyfleet:model:{MODEL.hex()}>"
        store.update(
            "PREFIX tf: <https://w3id.org/tinyfleet#> INSERT DATA { "
            f"{model} a tf:Model ; tf:engine 'mote' ; "
            "tf:runRamBytes 9936 ; tf:trainRamBytes 12000 ; tf:storageBytes 9000 }"
        )
        with Endpoint(store, Access.of_token(TOKEN, "read"), registry=registry) as endpoint:
            yield endpoint


def fetch(url: str) -> tuple[Any, bytes]:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=20) as answer:
        return answer.headers, answer.read()


def test_the_page_knows_the_fleet_and_the_library(served: Endpoint) -> None:
    about = json.loads(fetch(f"{served.address}/page/about.json")[1])
    assert about["fleet"] == "home"
    assert about["prefixes"]["tf"] == "https://w3id.org/tinyfleet#"
    assert [query["name"] for query in about["queries"]] == library.names()
    for query in about["queries"]:
        assert query["text"] == library.text(query["name"])
        assert query["about"], query["name"]
        assert [parameter["name"] for parameter in query["parameters"]] == parameters(query["text"])
        assert all(parameter["about"] for parameter in query["parameters"]), query["name"]
    assert "https://w3id.org/tinyfleet#Device" in about["classes"]
    assert "https://w3id.org/tinyfleet#ramBytes" in about["properties"]


def test_where_the_page_is_not_built_one_line_says_how(
    served: Endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(endpoint_module, "PAGE", tmp_path)
    with pytest.raises(urllib.error.HTTPError) as error:
        fetch(f"{served.address}/")
    with error.value:
        said = error.value.read().decode()
    assert "make page" in said
    assert "\n" not in said


needs_page = pytest.mark.skipif(not (PAGE / "index.html").exists(), reason="the query page is not built: make page")


@needs_page
def test_the_page_may_talk_to_its_own_server_alone(served: Endpoint) -> None:
    policy = fetch(f"{served.address}/")[0]["Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["connect-src"] == "'self'"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1400,1000",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    running = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield running
    running.quit()


class Page:
    """What a person does on the page, and sees."""

    def __init__(self, browser: Any, served: Endpoint) -> None:
        self.browser = browser
        for kind in ("performance", "browser"):
            browser.get_log(kind)  # what other tests left
        browser.get(f"{served.address}/page/about.json")
        browser.execute_script("localStorage.clear()")  # the tabs that were open
        browser.get(f"{served.address}/")
        self.until(lambda: self.all("#library li"))

    def until(self, there: Any) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, WAIT).until(lambda _: there())

    def all(self, css: str) -> list[Any]:
        return list(self.browser.find_elements("css selector", css))

    def choose(self, query: str) -> Any:
        """Clicks a query of the library. Its entry in the list."""
        (item,) = (
            item for item in self.all("#library li") if item.find_element("css selector", "strong").text == query
        )
        item.find_element("css selector", "button").click()
        return item

    def text(self) -> str:
        """The query in the open tab."""
        return str(
            self.browser.execute_script(
                "return document.querySelector('.tabPanel.active .CodeMirror').CodeMirror.getValue()"
            )
        )

    def run(self) -> list[list[str]]:
        """Presses the button, and waits for the rows."""
        self.all(".tabPanel.active .yasqe_queryButton")[0].click()
        self.until(lambda: self.all(".tabPanel.active .yasr table tbody tr td"))
        rows = self.all(".tabPanel.active .yasr table tbody tr")
        return [[cell.text for cell in row.find_elements("css selector", "td")] for row in rows]


@pytest.fixture
def page(browser: Any, served: Endpoint) -> Page:
    return Page(browser, served)


@needs_page
def test_a_query_of_the_library_is_chosen_and_answers(page: Page, served: Endpoint) -> None:
    assert "home" in page.browser.title
    item = page.choose("clients")
    assert page.text() == library.text("clients")
    assert "chosen" in item.get_attribute("class")
    rows = page.run()
    assert sorted(cell for row in rows for cell in row if cell.startswith("dev-")) == [
        f"dev-{i:02}" for i in range(12) if i % 3 != 0
    ]


@needs_page
def test_parameters_are_filled_in_beside_the_query(page: Page) -> None:
    item = page.choose("runnable")
    names = [field.get_attribute("name") for field in item.find_elements("css selector", "input")]
    assert names == parameters(library.text("runnable"))
    field = item.find_element("css selector", "input[name=model]")
    field.send_keys(f"urn:tinyfleet:model:{MODEL.hex()}")
    assert f"VALUES ?model {{ <urn:tinyfleet:model:{MODEL.hex()}> }}" in page.text()
    item.find_element("css selector", "input[name=fleet]").send_keys("home")
    assert 'VALUES ?fleet { "home" }' in page.text()
    assert len(page.run()) == 12
    field.clear()
    field.send_keys("x\b")
    assert "VALUES ?model { UNDEF }" in page.text()


@needs_page
def test_the_first_query_shows_the_devices(page: Page) -> None:
    assert page.text().startswith("# The devices of the fleet")
    assert len(page.run()) == 12


@needs_page
def test_the_library_is_searched(page: Page) -> None:
    page.all("#search")[0].send_keys("lineage")
    shown = [
        item.find_element("css selector", "strong").text for item in page.all("#library li") if item.is_displayed()
    ]
    assert shown
    assert all("lineage" in f"{name} {library.text(name)}" for name in shown)


@needs_page
def test_the_page_asks_nobody_but_its_own_server(page: Page, served: Endpoint) -> None:
    """Not while it loads, nor while somebody types what other pages complete with a server's help."""
    page.choose("clients")
    page.run()
    page.browser.execute_script(
        "const editor = document.querySelector('.tabPanel.active .CodeMirror').CodeMirror;"
        "editor.setValue('SELECT * { ?s  }'); editor.setCursor(0, 14); editor.focus()"
    )
    active = page.browser.switch_to.active_element
    active.send_keys("tf:ram")
    active.send_keys("\ue009 ")  # control and space: complete
    page.until(lambda: page.all(".CodeMirror-hints li"))
    assert "ramBytes" in page.all(".CodeMirror-hints")[0].text
    asked = set()
    for entry in page.browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(urllib.parse.urlsplit(message["params"]["request"]["url"]))
    assert {url.netloc for url in asked if url.scheme not in ("data", "blob")} == {
        urllib.parse.urlsplit(served.address).netloc
    }
    refused = [entry["message"] for entry in page.browser.get_log("browser") if "Content Security" in entry["message"]]
    assert refused == []


ATTACK = """<!doctype html><title>waiting</title><img id="image" src="{target}/things">
<script>
const asked = [
  fetch("{target}/things", {{ credentials: "include" }}).then((answer) => answer.text()),
  fetch("{target}/sparql", {{
    method: "POST", credentials: "include", body: "update=INSERT%20DATA%20%7B%3Curn%3Aa%3E%20%3Curn%3Ab%3E%201%7D",
    headers: {{ "Content-Type": "application/x-www-form-urlencoded" }},
  }}).then((answer) => answer.text()),
  new Promise((resolve, reject) => {{
    const events = new EventSource("{target}/events", {{ withCredentials: true }});
    events.onopen = () => resolve("events");
    events.onerror = () => reject(new Error("no events"));
  }}),
];
Promise.allSettled(asked).then((all) => {{ document.title = "done: " + all.map((each) => each.status).join(" "); }});
</script>"""


@needs_page
def test_a_browser_logs_in_once_and_pages_of_other_origins_gain_nothing(browser: Any) -> None:
    """One on another port of the same host, whose requests carry the cookie, and one on another name of it."""
    with EmbeddedStore() as store:
        registry = Registry(store, "home")
        assert registry.ingest_one(TOPICS.td("dev-1"), payload(description("dev-1", title="A secret lamp")))
        access = Access.of_token(TOKEN)
        with Endpoint(store, access, registry=registry) as endpoint:
            login = f"{endpoint.address}/login?code={access.new_login(Client('owner', 'admin'))}"
            browser.get(endpoint.address)
            assert "tinyfleet server login" in browser.page_source
            browser.get(login)
            page = Page(browser, endpoint)
            assert len(page.run()) == 1
            with other_origin(ATTACK.format(target=endpoint.address).encode()) as port:
                for host in ("127.0.0.1", "localhost"):
                    browser.get(f"http://{host}:{port}/")
                    page.until(lambda: browser.title.startswith("done"))
                    assert browser.title == "done: rejected rejected rejected"
                    assert browser.execute_script("return document.getElementById('image').naturalWidth") == 0
            assert not store.ask("ASK { <urn:a> ?p ?o }")
            browser.get(login)
            assert "was used before" in browser.page_source


@contextmanager
def other_origin(content: bytes) -> Iterator[int]:
    """A server of another origin that answers everything with this page; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()
