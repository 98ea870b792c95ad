"""The process that answers queries of anyone: it may be killed at any time, and takes nothing with it.

A template process imports what is needed once and forks the workers, which takes milliseconds. A worker opens a
checkpoint of the graph, which nobody writes, and sends back one answer for each query. Everything ends when the server
does: the template when its pipe closes, the workers with the template, and a query that still computes by its limit of
processor time.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sys
from multiprocessing.connection import Connection
from typing import IO, Any, NamedTuple, cast

import pyoxigraph as ox

_PR_SET_PDEATHSIG = 1


class Job(NamedTuple):
    """One query.

    Attributes
    ----------
    checkpoint
        Folder of the graph.
    sparql, base, is_update
        The query, the IRI that relative ones are of, and whether it is an update, on a copy of the worker's own.
    default, named
        Its dataset; None for the whole graph.
    rows, graph
        Media types for solutions and booleans, and for triples; None if the client accepts none that there is.
    max_bytes
        Of the result.
    cpu_seconds
        Of processor time.
    """

    checkpoint: str
    sparql: str
    base: str
    is_update: bool
    default: list[str] | None
    named: list[str] | None
    rows: str | None
    graph: str | None
    max_bytes: int
    cpu_seconds: int


class Answer(NamedTuple):
    """Its end: "done" with the result's media type and bytes; or "syntax", "failed", "too long", "rows" or
    "graph" (the media type for these is missing), "boolean" (the media type has no booleans), with a text."""

    kind: str
    media: str
    content: bytes


class _TooLong(Exception):
    pass


class _Output:
    def __init__(self, most: int) -> None:
        self.data = bytearray()
        self._most = most

    def write(self, part: bytes) -> int:
        if len(self.data) + len(part) > self._most:
            raise _TooLong
        self.data += part
        return len(part)

    def flush(self) -> None:
        """Nothing is buffered."""


def _evaluate(store: ox.Store, job: Job) -> Answer:
    try:
        if job.is_update:
            store.update(job.sparql, base_iri=job.base)
            return Answer("done", "", b"")
        dataset: dict[str, Any] = {}
        if job.default is not None and job.named is not None:
            dataset["default_graph"] = [ox.NamedNode(graph) for graph in job.default]
            dataset["named_graphs"] = [ox.NamedNode(graph) for graph in job.named]
        found = store.query(job.sparql, base_iri=job.base, **dataset)
        kind = "graph" if isinstance(found, ox.QueryTriples) else "rows"
        media = job.graph if kind == "graph" else job.rows
        if media is None:
            return Answer(kind, "", b"")
        form: Any = (
            ox.RdfFormat.from_media_type(media) if kind == "graph" else ox.QueryResultsFormat.from_media_type(media)
        )
        if isinstance(found, ox.QueryBoolean) and media in ("text/csv", "text/tab-separated-values"):
            return Answer("boolean", "", b"")
        output = _Output(job.max_bytes)
        found.serialize(cast("IO[bytes]", output), form)
        return Answer("done", media, bytes(output.data))
    except _TooLong:
        return Answer("too long", "", b"")
    except SyntaxError as error:
        return Answer("syntax", "", str(error).encode(errors="replace")[:2000])
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        return Answer("failed", "", str(error).encode(errors="replace")[:2000])


def _serve(pipe: Connection, memory: int) -> None:
    """A worker: job after job, until its pipe closes."""
    os.nice(10)  # whatever anyone asks, ingest goes first
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    opened: tuple[str, ox.Store] | None = None
    while True:
        try:
            job = Job(*json.loads(pipe.recv_bytes()))
        except (EOFError, OSError):
            return
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_CPU, (int(used) + job.cpu_seconds + 1, resource.RLIM_INFINITY))
        try:
            if job.is_update:
                opened = None
                answer = _evaluate(ox.Store(job.checkpoint), job)
            else:
                if opened is None or opened[0] != job.checkpoint:
                    opened = None
                    opened = job.checkpoint, ox.Store.read_only(job.checkpoint)
                answer = _evaluate(opened[1], job)
        except OSError as error:
            answer = Answer("failed", "", str(error).encode(errors="replace")[:2000])
        try:
            pipe.send_bytes(f"{answer.kind}\n{answer.media}\n".encode() + answer.content)
        except OSError:
            return


def _die_with_template() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def template(control: socket.socket, memory: int) -> None:
    """The template: for each socket that it gets, it forks a worker that serves on it, and says its process ID."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while True:
        message, sockets, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        child = os.fork()
        if child == 0:
            _die_with_template()
            control.close()
            with contextlib.suppress(KeyboardInterrupt):
                _serve(Connection(sockets[0]), memory)
            os._exit(0)
        os.close(sockets[0])
        control.sendall(child.to_bytes(4, "big"))


if __name__ == "__main__":
    template(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
