"""Whether the server is healthy, and its figures for Prometheus."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinyfleet.ontology.http.access import Served
from tinyfleet.ontology.http.endpoint import Endpoint
from tinyfleet.ontology.http.request_handling import in_thread
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.store.store import Store

STATES_INTERVAL = 15.0
"""Seconds for which the number of devices by state is kept: with many devices, counting takes a moment."""


class Observed(Protocol):
    """What a server tells about itself; see `FleetServer`."""

    dropped: int
    disk_is_full: bool

    @property
    def waiting(self) -> int: ...
    @property
    def broker_restarts(self) -> int: ...
    @property
    def is_connected(self) -> bool: ...


def problems(server: Observed) -> list[str]:
    """What keeps the server from its work now; empty if it is healthy."""
    found = [] if server.is_connected else ["there is no connection to the broker"]
    return [*found, "the disk is full"] if server.disk_is_full else found


class Monitoring:
    """The routes /health, for everyone, and /metrics.

    Parameters
    ----------
    server, registry, store
        Whose figures they are.
    endpoint
        Returns the HTTP server, once there is one.
    """

    def __init__(self, server: Observed, registry: Registry, store: Store, endpoint: Callable[[], Endpoint]) -> None:
        self._server = server
        self._figures = CollectorRegistry()
        ProcessCollector(registry=self._figures)
        self._figures.register(_Figures(server, registry, store, endpoint))
        self.served = [Served("GET", "/health", None, self._health), Served("GET", "/metrics", "read", self._metrics)]

    async def _health(self, _request: Request) -> Response:
        found = problems(self._server)
        return JSONResponse({"status": "degraded" if found else "ok", "problems": found}, 503 if found else 200)

    async def _metrics(self, _request: Request) -> Response:
        content = await in_thread(lambda: generate_latest(self._figures))
        return Response(content, media_type=CONTENT_TYPE_PLAIN_0_0_4)


class _Figures(Collector):
    def __init__(self, server: Observed, registry: Registry, store: Store, endpoint: Callable[[], Endpoint]) -> None:
        self._server, self._registry, self._store, self._endpoint = server, registry, store, endpoint
        self._states: Mapping[str, int] = {}
        self._counted = float("-inf")

    def describe(self) -> Iterable[Metric]:
        """Nothing: the figures are the server's alone, so no names can clash."""
        return ()

    def collect(self) -> Iterable[Metric]:
        server, registry, endpoint = self._server, self._registry, self._endpoint()
        messages = CounterMetricFamily("tinyfleet_messages", "Messages of devices, by outcome.", labels=["outcome"])
        for outcome, n in (
            ("accepted", registry.accepted), ("rejected", registry.rejected), ("dropped", server.dropped)
        ):  # fmt: skip
            messages.add_metric([outcome], n)
        yield messages
        yield GaugeMetricFamily("tinyfleet_messages_waiting", "Messages that are not written yet.", server.waiting)
        devices = GaugeMetricFamily("tinyfleet_devices", "Devices by state.", labels=["state"])
        for state, n in self._by_state().items():
            devices.add_metric([state], n)
        yield devices
        yield GaugeMetricFamily("tinyfleet_broker_connected", "1 with a connection to the broker.", server.is_connected)
        yield CounterMetricFamily(
            "tinyfleet_broker_restarts", "Restarts of the server's broker.", server.broker_restarts
        )
        yield GaugeMetricFamily("tinyfleet_disk_full", "1 while there is no room to write.", server.disk_is_full)
        answers = CounterMetricFamily("tinyfleet_http_answers", "HTTP answers by status.", labels=["status"])
        for status, n in sorted(endpoint.answers.items()):
            answers.add_metric([str(status)], n)
        yield answers
        yield CounterMetricFamily(
            "tinyfleet_http_connections_refused", "Connections over a limit.", endpoint.limits.refused
        )
        yield CounterMetricFamily("tinyfleet_queries_stopped", "Queries over a limit.", endpoint.queries.stopped)

    def _by_state(self) -> Mapping[str, int]:
        if time.monotonic() - self._counted > STATES_INTERVAL:
            rows = self._store.query(
                """PREFIX tf: <https://w3id.org/tinyfleet#>
                SELECT ?online (COUNT(?device) AS ?n) WHERE {
                  VALUES ?fleet { UNDEF } ?device a tf:Device ; tf:fleet ?fleet . OPTIONAL { ?device tf:online ?online }
                } GROUP BY ?online""",
                fleet=self._registry.fleet,
            )
            found: Counter[str] = Counter(online=0, offline=0, unknown=0)
            names = {True: "online", False: "offline", None: "unknown"}
            for row in rows:
                online = row.get("online")
                found[names[online if isinstance(online, bool) else None]] += int(str(row["n"]))
            self._states, self._counted = found, time.monotonic()
        return self._states
