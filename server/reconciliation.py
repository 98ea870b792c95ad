"""Compares what devices run with what they were last given, when they come online."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tinyfleet.ontology.store.store import Store
from tinyfleet.ontology.vocabulary.namespaces import device_iri

_DIFFERENT = """PREFIX prov: <http://www.w3.org/ns/prov#>
PREFIX tf: <https://w3id.org/tinyfleet#>
SELECT ?id ?running ?given ?state WHERE {
  VALUES ?device { %s }
  ?deployment tf:confirmedBy|tf:triedBy ?device ; tf:ofModel ?given ; prov:startedAtTime ?since .
  ?device tf:deviceId ?id ; tf:currentModel ?running .
  FILTER(?running != ?given)
  FILTER NOT EXISTS {
    ?later tf:confirmedBy|tf:triedBy ?device ; prov:startedAtTime ?after .
    FILTER(?after > ?since)
  }
  OPTIONAL { ?device tf:trialState ?state }
}
ORDER BY ?id"""


def report_other_models(store: Store, fleet: str, devices: Iterable[str], on_log: Callable[[str, str], None]) -> None:
    """Log each device that runs another model than the one that its last successful deployment gave it.

    Parameters
    ----------
    store
        The graph.
    fleet
        The fleet's name.
    devices
        The devices that have come online.
    on_log
        Called with the kind of line, and the line.
    """
    names = " ".join(f"<{device_iri(fleet, device)}>" for device in devices)
    if not names:
        return
    for row in store.query(_DIFFERENT % names):
        reason = "rolled it back" if row.get("state") == "rolled back" else "does not run it any more"
        on_log(
            "other model",
            f"{row['id']}: was given {row['given']} and {reason}: it runs {row['running']} "
            "(tinyfleet query stale-models)",
        )
