"""Runs a command of TinyFleet that kills itself by SIGKILL, before or after one of the things that it sends or stores.

    python tests/faults/launcher.py --points FILE -- server start ...                    appends each point to FILE
    python tests/faults/launcher.py --points FILE --kill "commit:3:after" -- server start ...

A point is a call of a function through which everything of one kind passes; nothing in the program itself knows of it.
`commit:3:after` is the moment after the third commit to the graph.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tinyfleet.__main__ import main as tinyfleet


class Point(NamedTuple):
    """A moment: before or after the `number`-th call of a kind. The first has number 1."""

    kind: str
    number: int
    when: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.number}:{self.when}"

    @classmethod
    def parse(cls, text: str) -> Point:
        """The point that `str` wrote."""
        kind, number, when = text.rsplit(":", 2)
        return cls(kind, int(number), when)


class _Points:
    """Counts the calls of each kind, writes them down, and kills this process at one of them."""

    def __init__(self, file: Path, kill: Point | None) -> None:
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._kill = kill
        self._count: Counter[str] = Counter()
        self._lock = threading.Lock()

    def begin(self, kind: str) -> Point:
        """A call begins."""
        with self._lock:
            self._count[kind] += 1
            point = Point(kind, self._count[kind], "before")
            os.write(self._file, f"{point}\n".encode())
        if point == self._kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return point

    def end(self, point: Point) -> None:
        """It has returned."""
        if point._replace(when="after") == self._kill:
            os.kill(os.getpid(), signal.SIGKILL)


def _wrap(owner: Any, name: str, kind: Callable[..., str | None], points: _Points) -> None:
    """Make each call of a method a point; `kind` gets the call's arguments and names it, or returns None: no point."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        named = kind(*args, **kwargs)
        if named is None:
            return inner(*args, **kwargs)
        point = points.begin(named)
        try:
            return inner(*args, **kwargs)
        finally:
            points.end(point)

    setattr(owner, name, wrapper)


def _topic_kind(topic: str) -> str:
    """The last part of a topic but for numbers: "status", "command", "runs"; "drivers" of one with a random name."""
    if "/drivers/" in topic:
        return "drivers"
    parts = [part for part in topic.split("/") if not re.fullmatch(r"[0-9]+|[0-9a-f]{16}|\+|#", part)]
    return parts[-1]


def install(points: _Points) -> None:
    """Wrap what sends and what stores."""
    from tinyfleet.edge.wire import mqtt_session

    _wrap(mqtt_session.Session, "publish", lambda _self, topic, *_a, **_k: f"publish {_topic_kind(topic)}", points)
    _wrap(mqtt_session.Session, "subscribe", lambda _self, filter: f"subscribe {_topic_kind(filter)}", points)
    _wrap(mqtt_session.Session, "received", lambda *_: "acknowledge", points)
    _wrap(mqtt_session._Wire, "_flush", lambda wire: "socket write" if wire.unsent else None, points)
    _wrap(mqtt_session.Session, "send", lambda *_: "send", points)
    _wrap(Path, "replace", lambda path, _to: f"replace {_file_kind(path)}", points)
    words = sys.argv[1:]
    if words[0] == "server":
        import uvicorn.protocols.http.httptools_impl as http

        from tinyfleet.ontology.store.store import EmbeddedStore

        _wrap(EmbeddedStore, "_apply", lambda _self, change: "commit" if any(change) else None, points)
        _wrap(EmbeddedStore, "backup", lambda *_: "checkpoint", points)
        _wrap(EmbeddedStore, "close", lambda *_: "close graph", points)
        _wrap_reply(http.RequestResponseCycle, points)
    elif words[0] in ("run", "deploy"):
        from tinyfleet.ontology.store.remote_store import RemoteStore

        _wrap(RemoteStore, "update", lambda *_: "update", points)
    elif words[0] == "gateway":
        import serial.urlhandler.protocol_socket as line

        _wrap(line.Serial, "write", lambda *_: "serial write", points)
    elif words[0] == "agent":
        from tinyfleet.edge.device.node import Node

        _wrap(Node, "_publish", lambda *_: "node output", points)


def _wrap_reply(cycle: Any, points: _Points) -> None:
    """The HTTP server's replies are coroutines."""
    inner = cycle.send

    async def send(self: Any, message: Any) -> None:
        point = points.begin("http reply")
        await inner(self, message)
        points.end(point)

    cycle.send = send


def _file_kind(path: Path) -> str:
    """A file's name without what is random in it."""
    return re.sub(r"\.[0-9a-f]{8}$", "", path.name).lstrip(".")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=Path, required=True)
    parser.add_argument("--kill", type=Point.parse)
    parser.add_argument("words", nargs="+")
    given = parser.parse_args()
    sys.argv = ["tinyfleet", *given.words]
    install(_Points(given.points, given.kill))
    tinyfleet()


if __name__ == "__main__":
    main()
