"""Clocks that jump: a server's, whose certificates and states carry times."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from ontology_fixtures import description, payload, status

from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.store.store import EmbeddedStore
from tinyfleet.ontology.vocabulary.namespaces import TF, device_iri
from tinyfleet.server.authority.authority import Authority

TOPICS = Topics("home")
DAY, YEAR = timedelta(days=1), timedelta(days=365)


class Clock:
    """Says what it is told to."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.mark.parametrize("jump", [DAY, -YEAR], ids=["a day ahead", "a year back"])
def test_states_after_a_jump_are_those_that_came_last(jump: timedelta) -> None:
    clock, store = Clock(), EmbeddedStore()
    registry = Registry(store, "home", clock=clock)
    registry.ingest([(TOPICS.td("dev-1"), payload(description())), (TOPICS.status("dev-1"), status(samples=1))])
    clock.now += jump
    for online, samples in ((False, 1), (True, 2), (False, 2), (True, 3)):
        (result,) = registry.ingest([(TOPICS.status("dev-1"), status(online, samples=samples))])
        assert result is not None and result.rejection is None
        device = device_iri("home", "dev-1")
        assert store.values([device], TF.online) == {device: online}
        assert store.values([device], TF.samplesLearned) == {device: samples}


@pytest.mark.parametrize("jump", [DAY, -YEAR], ids=["a day ahead", "a year back"])
def test_a_server_that_starts_after_a_jump_keeps_its_identities(jump: timedelta, tmp_path: Path) -> None:
    clock = Clock()
    first = Authority(tmp_path, clock=clock)
    ca = first.ca_file.read_bytes()
    first.close()
    clock.now += jump
    second = Authority(tmp_path, clock=clock)
    assert second.ca_file.read_bytes() == ca, "devices that are enrolled still trust it"
    second.close()
