"""Tidies up after runs and deployments that ended without doing so: a killed command leaves retained messages at the
broker, and activities in the graph without an end.

Each of them announces itself at the broker; its session's will takes the announcement back. What no announced session
drives is cleared, and its activity marked as failed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.store.store import Store, StoreError
from tinyfleet.ontology.vocabulary.namespaces import PROV, TF, Iri

SETTLE = 3.0
"""Seconds after the start of a session in which the broker sends what it retains."""
SWEEP = 5.0
"""Seconds for which the server listens for what may be left of a run or a deployment."""

Driven = tuple[str, int | str]
"""("run", its number) or ("model", its id in hexadecimal digits)."""

log = logging.getLogger(__name__)


class Housekeeper:
    """Watches who drives what; a thread of its own clears what nobody drives any more.

    Parameters
    ----------
    topics
        The fleet's topics.
    store
        The graph.
    on_log
        Called with a line for each run or deployment that was tidied up.
    """

    def __init__(self, topics: Topics, store: Store, on_log: Callable[[str], None] = lambda line: None) -> None:
        self._topics = topics
        self._store = store
        self._on_log = on_log
        self._session: Session | None = None
        self._changed = threading.Condition()  # guards the next four
        self._drivers: Counter[Driven] = Counter()
        self._sessions: dict[str, Driven] = {}
        self._due: dict[Driven | None, float] = {}  # when to sweep for what; None: for everything
        self._sweeping_until = 0.0
        self._cleared: Counter[Driven] = Counter()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)

    def start(self, session: Session) -> None:
        """Begin. The session must hand every message to `receive`, and call `connected` when it is new."""
        self._session = session
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def connected(self, session: Session) -> None:
        """A new session: whatever was announced is announced again now."""
        with self._changed:
            self._drivers.clear()
            self._sessions.clear()
            self._due[None] = time.monotonic() + SETTLE
            self._changed.notify_all()
        session.subscribe(self._topics.driver("+", "+"))

    def receive(self, topic: str, payload: bytes) -> bool:
        """Take a message, if it is one for the housekeeping. Called by the session's thread."""
        match self._topics.parse(topic):
            case "driver", (kind, id):
                self._on_driver(topic, (kind, id), bool(payload))
            case "weights", (run, _, _):
                self._on_retained(topic, ("run", run), payload)
            case "program", (model, _):
                self._on_retained(topic, ("model", model.hex()), payload)
            case _:
                return False
        return True

    def _on_driver(self, topic: str, driven: Driven, there: bool) -> None:
        with self._changed:
            if there and topic not in self._sessions:
                self._sessions[topic] = driven
                self._drivers[driven] += 1
                self._due.pop(driven, None)
            elif not there and self._sessions.pop(topic, None) is not None:
                self._drivers[driven] -= 1
                if not self._drivers[driven]:
                    del self._drivers[driven]
                    self._due[driven] = time.monotonic()
                    self._changed.notify_all()

    def _on_retained(self, topic: str, driven: Driven, payload: bytes) -> None:
        with self._changed:
            idle = bool(payload) and driven not in self._drivers and time.monotonic() < self._sweeping_until
        if idle and self._session is not None:
            self._session.publish(topic, b"", retain=True)
            with self._changed:
                self._cleared[driven] += 1

    def _run(self) -> None:
        while True:
            with self._changed:
                due = min(self._due.values(), default=None)
                wait = None if due is None else due - time.monotonic()
                if self._ending:
                    return
                if wait is None or wait > 0:
                    self._changed.wait(wait)
                    continue
                swept = [driven for driven, at in self._due.items() if at <= time.monotonic()]
                for driven in swept:
                    del self._due[driven]
                self._sweeping_until = time.monotonic() + SWEEP
            try:
                self._sweep(swept)
            except StoreError as error:  # said there; the next session tries again
                log.error("activities without an end could not be closed: %s", error)

    def _sweep(self, swept: list[Driven | None]) -> None:
        assert self._session is not None
        filters = [self._filter(driven) for driven in swept if driven is not None]
        if None in swept:
            filters = [self._topics.every("runs"), self._topics.every("models")]
        for each in filters:
            self._session.subscribe(each)
        failed = self._close_activities(None if None in swept else [each for each in swept if each is not None])
        with self._changed:
            self._changed.wait_for(lambda: self._ending, SWEEP)
            cleared, self._cleared = self._cleared, Counter()
        for each in filters:
            self._session.unsubscribe(each)
        for driven in {*cleared, *failed}:
            what = "run" if driven[0] == "run" else "deployment of"
            self._on_log(f"{what} {driven[1]} ended without tidying up: {cleared[driven]} retained messages removed")

    def _filter(self, driven: Driven) -> str:
        kind, id = driven
        return self._topics.every(f"{'runs' if kind == 'run' else 'models'}/{id}")

    def _close_activities(self, ended: list[Driven] | None) -> list[Driven]:
        """Mark as failed the activities without an end that nobody drives: those of `ended`, or all."""
        failed: list[Driven] = []
        for activity, driven in self._open_activities():
            with self._changed:
                idle = driven not in self._drivers
            if idle and (ended is None or driven in ended):
                self._store.write({activity: {PROV.endedAtTime: datetime.now(UTC), TF.failed: True}})
                failed.append(driven)
        return failed

    def _open_activities(self) -> list[tuple[Iri, Driven]]:
        rows: Any = self._store.query(
            """PREFIX tf: <https://w3id.org/tinyfleet#>
            PREFIX prov: <http://www.w3.org/ns/prov#>
            SELECT ?activity ?run ?model WHERE {
              VALUES ?fleet { UNDEF }
              ?activity tf:fleet ?fleet .
              { ?activity a tf:Run ; tf:runNumber ?run } UNION { ?activity a tf:Deployment ; tf:ofModel ?model }
              FILTER NOT EXISTS { ?activity prov:endedAtTime ?ended }
            }""",
            fleet=self._topics.fleet,
        )
        return [
            (row["activity"], ("run", row["run"]) if "run" in row else ("model", str(row["model"]).rpartition(":")[2]))
            for row in rows
        ]
