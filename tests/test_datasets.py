"""Downloads that fail: one line names the file and its address, and no incomplete file is used."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tinyfleet.edge import datasets
from tinyfleet.edge.errors import UserError

WHOLE = bytes(range(256)) * 800
SHA256 = hashlib.sha256(WHOLE).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves WHOLE, or what `sent` says is sent of its length, or in its place."""

    sent = WHOLE


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(WHOLE)))
        self.end_headers()
        self.wfile.write(self.server.sent)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("sent", "why"),
    [(WHOLE[:70_000], "Connection broken"), (bytes(len(WHOLE)), "does not match")],
    ids=["cut", "wrong"],
)
def test_a_broken_download_is_told_and_leaves_nothing_behind(
    sent: bytes, why: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = f"http://127.0.0.1:{server.server_port}/data.zip"
    server.sent = sent
    with pytest.raises(UserError) as told:
        datasets.download(url, SHA256, "Omniglot", "omniglot.npz")
    said = str(told.value)
    assert said.startswith(f"Omniglot could not be downloaded from {url} (") and why in said and "\n" not in said
    assert said.endswith("; try again, or set TINYFLEET_DATA to a folder that has omniglot.npz")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "no half file"
    server.sent = WHOLE
    path = datasets.download(url, SHA256, "Omniglot", "omniglot.npz")
    assert path.read_bytes() == WHOLE and tmp_path in path.parents


def test_a_file_that_was_damaged_in_the_cache_is_fetched_anew(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = f"http://127.0.0.1:{server.server_port}/data.zip"
    path = datasets.download(url, SHA256, "Omniglot", "omniglot.npz")
    path.write_bytes(WHOLE[:1000])
    assert datasets.download(url, SHA256, "Omniglot", "omniglot.npz").read_bytes() == WHOLE
