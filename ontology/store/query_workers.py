"""Answers anyone's queries in processes that can be killed, on checkpoints of the graph.

A query first gets a short time slice, so that many slow ones cannot keep a quick one waiting; one that needs more time
is stopped and begun again in the slow lane, which has few workers and a queue of limited length.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from tinyfleet.ontology.store import worker_process
from tinyfleet.ontology.store.store import BASE, Dataset, EmbeddedStore, StoreError
from tinyfleet.ontology.store.worker_process import Answer, Job

SLICE = 0.3
"""Seconds that a query may take at first."""
UPDATE_SECONDS = 2.0
"""Seconds that an update of a client that may only write can take."""
_CORES = os.cpu_count() or 1
QUICK_WORKERS, SLOW_WORKERS = max(2, _CORES), max(1, _CORES // 2)
QUICK_QUEUE, SLOW_QUEUE = 64, 8
"""Queries that may wait for a worker."""
MAX_WAIT = 20.0
"""Seconds that they may wait."""
MEMORY = 2 << 30
"""Bytes of address space of a worker, the mapped files of the graph included."""
CHECKPOINT_INTERVAL = 0.25
"""Seconds between two checkpoints at least: making one costs the writer some 20 ms."""


class QueryStopped(StoreError):
    """A query was stopped: it took too long, or its process needed too much memory or ended."""


class QueryTimeout(QueryStopped):
    """It took too long."""


class Busy(StoreError):
    """Too many queries wait already."""


class _Slice(Exception):
    """The time slice is over."""


@dataclass
class _Checkpoint:
    folder: Path
    version: int
    users: int = 0


class Checkpoints:
    """Copies of a graph that nobody writes: hard links to its files.

    Parameters
    ----------
    store
        The graph.
    """

    def __init__(self, store: EmbeddedStore) -> None:
        self._store = store
        own = None if store.folder is None else store.folder.parent / "checkpoints"
        if own is None:
            own = Path(tempfile.mkdtemp(prefix="tinyfleet-"))
        else:
            shutil.rmtree(own, ignore_errors=True)  # of a server that was killed
            own.mkdir(mode=0o700)
        self._folder = own
        self._names = itertools.count()
        self._lock = threading.Lock()  # of the next two
        self._current: _Checkpoint | None = None
        self._making = threading.Lock()
        self._made = 0.0

    @contextmanager
    def use(self) -> Iterator[Path]:
        """A checkpoint with everything that was written before the call."""
        checkpoint = self._fresh(self._store.version)
        try:
            yield checkpoint.folder
        finally:
            with self._lock:
                checkpoint.users -= 1
            self._drop(checkpoint)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A copy to write into."""
        with self._making:
            folder = self._folder / str(next(self._names))
            self._store.backup(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Remove all."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _fresh(self, version: int) -> _Checkpoint:
        if (found := self._take(version)) is not None:
            return found
        with self._making:
            if (found := self._take(version)) is not None:  # another query has made it meanwhile
                return found
            time.sleep(max(0.0, self._made + CHECKPOINT_INTERVAL - time.monotonic()))
            new = _Checkpoint(self._folder / str(next(self._names)), self._store.version, users=1)
            self._store.backup(new.folder)
            self._made = time.monotonic()
            with self._lock:
                old, self._current = self._current, new
            if old is not None:
                self._drop(old)
            return new

    def _take(self, version: int) -> _Checkpoint | None:
        with self._lock:
            if self._current is None or self._current.version < version:
                return None
            self._current.users += 1
            return self._current

    def _drop(self, checkpoint: _Checkpoint) -> None:
        """Remove a checkpoint that is not needed any more."""
        with self._lock:
            if checkpoint.users or checkpoint is self._current:
                return
        shutil.rmtree(checkpoint.folder, ignore_errors=True)


class _Template:
    """The process that forks workers; started when it is first needed, and again if it has died."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def fork(self) -> _Worker:
        for attempt in (1, 2):
            with self._lock:
                try:
                    return self._fork()
                except OSError as error:
                    self._end()
                    if attempt == 2:
                        raise StoreError(f"no process for queries can be started: {error}") from None
        raise AssertionError

    def _fork(self) -> _Worker:
        if self._process is None or self._process.poll() is not None:
            self._end()
            ours, theirs = socket.socketpair()
            command = [sys.executable, "-m", worker_process.__name__, str(theirs.fileno()), str(self._memory)]
            with theirs:
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
            self._control = ours
        assert self._control is not None
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"w"], [theirs.fileno()])
            number = self._control.recv(4)
        if len(number) < 4:
            ours.close()
            raise OSError("its template has ended")
        return _Worker(int.from_bytes(number, "big"), Connection(ours.detach()))

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._control = None

    def close(self) -> None:
        with self._lock:
            self._end()


@dataclass
class _Worker:
    pid: int
    pipe: Connection

    def ask(self, job: Job, seconds: float) -> Answer:
        """The answer. After an error the worker is gone.

        Raises
        ------
        _Slice
            If it takes longer.
        QueryStopped
            If its process ends.
        """
        try:
            self.pipe.send_bytes(json.dumps(job).encode())
            if not self.pipe.poll(seconds):
                self.kill()
                raise _Slice
            kind, media, content = self.pipe.recv_bytes().split(b"\n", 2)
            return Answer(kind.decode(), media.decode(), content)
        except (EOFError, OSError):
            self.kill()
            raise QueryStopped(
                "the query needs too much memory, or is too complex; ask for less of it at a time"
            ) from None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.pipe.close()


@dataclass
class _Lane:
    """Workers, and the queries that wait for one of them in the order of their arrival."""

    template: _Template
    size: int
    queue: int
    idle: list[_Worker] = field(default_factory=list)
    waiting: int = 0

    def __post_init__(self) -> None:
        self._free = threading.Semaphore(self.size)
        self._lock = threading.Lock()

    def run(self, job: Job, seconds: float) -> Answer:
        with self._lock:
            if self.waiting >= self.queue:
                raise Busy("the server is busy with other queries; try again later")
            self.waiting += 1
        got = self._free.acquire(timeout=MAX_WAIT)
        with self._lock:
            self.waiting -= 1
        if not got:
            raise Busy("the server is busy with other queries; try again later")
        try:
            with self._lock:
                worker = self.idle.pop() if self.idle else None
            if worker is None:
                worker = self.template.fork()
            answer = worker.ask(job, seconds)
            with self._lock:
                self.idle.append(worker)
            return answer
        finally:
            self._free.release()

    def close(self) -> None:
        with self._lock:
            for worker in self.idle:
                worker.kill()
            self.idle.clear()


class QueryWorkers:
    """The processes that answer queries on a graph. They are started when they are needed.

    Parameters
    ----------
    store
        The graph.
    timeout
        Seconds that a query may take.
    memory
        Bytes of address space of a worker.

    Attributes
    ----------
    stopped : int
        Queries that were stopped so far.
    """

    def __init__(self, store: EmbeddedStore, timeout: float, memory: int = MEMORY) -> None:
        self._checkpoints = Checkpoints(store)
        self._template = _Template(memory)
        self._timeout = timeout
        self._quick = _Lane(self._template, QUICK_WORKERS, QUICK_QUEUE)
        self._slow = _Lane(self._template, SLOW_WORKERS, SLOW_QUEUE)
        self.stopped = 0

    def evaluate(
        self, sparql: str, dataset: Dataset | None, rows: str | None, graph: str | None, max_bytes: int
    ) -> Answer:
        """Answer a query that `check_query` has passed.

        Parameters
        ----------
        sparql, dataset
            The query, and its dataset if it is not the whole graph.
        rows, graph
            Media types of the result for solutions and booleans, and for triples; None if the client accepts none.
        max_bytes
            Of the result.

        Returns
        -------
        Answer

        Raises
        ------
        QueryTimeout, QueryStopped
            If it took too long, needed too much memory, or crashed.
        Busy
            If too many queries are waiting.
        """
        try:
            with self._checkpoints.use() as folder:
                job = Job(
                    str(folder), sparql, BASE, False, None if dataset is None else [*map(str, dataset.default)],
                    None if dataset is None else [*map(str, dataset.named)], rows, graph, max_bytes,
                    int(self._timeout) + 1,
                )  # fmt: skip
                try:
                    return self._quick.run(job, min(SLICE, self._timeout))
                except _Slice:
                    pass
                try:
                    return self._slow.run(job, self._timeout)
                except _Slice:
                    raise QueryTimeout("the query takes too long; make it more selective or add a LIMIT") from None
        except QueryStopped:
            self.stopped += 1
            raise

    def try_update(self, sparql: str) -> Answer:
        """Carry out an update on a copy of the graph: it will not hold up the graph itself for longer than this took.

        Parameters
        ----------
        sparql
            An update that `check_update` has passed.

        Returns
        -------
        Answer

        Raises
        ------
        QueryTimeout, QueryStopped, Busy
            As for a query.
        """
        try:
            with self._checkpoints.scratch() as folder:
                job = Job(str(folder), sparql, BASE, True, None, None, None, None, 0, int(UPDATE_SECONDS) + 1)
                return self._quick.run(job, UPDATE_SECONDS)
        except _Slice:
            self.stopped += 1
            raise QueryTimeout(f"the update takes longer than {UPDATE_SECONDS:g} s; change less at a time") from None
        except QueryStopped:
            self.stopped += 1
            raise

    def close(self) -> None:
        """End the processes and remove the checkpoints."""
        self._quick.close()
        self._slow.close()
        self._template.close()
        self._checkpoints.close()
