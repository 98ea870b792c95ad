"""Matches models and devices: the devices that can run or train a model, the models for a device, and why not.

The rules are the library's queries `runnable`, `trainable`, `models-for-device` and `unmet-requirements`; the functions
here run them and return typed results. A value that the graph does not know counts as a requirement that is not met.
The model slot is an exception: a model needs it to be sent to a device, not to run there.
"""

import re
from dataclasses import dataclass
from typing import cast

from tinyfleet.edge.errors import UserError
from tinyfleet.ontology.ingest.describe import ModelDescription, put_model
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.store import Binding, Row, Store, Value, parameters
from tinyfleet.ontology.vocabulary.namespaces import TF, Iri, device_iri, fleet_name, model_iri


@dataclass(frozen=True)
class DeviceMatch:
    """A device that can run a model.

    Attributes
    ----------
    device, board
        IDs of the device and of its board.
    model
        IRI of the model.
    arena, required, free
        Bytes: of the device's arena, of what running the model requires, and of what remains.
    online
        Whether the device is online; None if it has never reported a status.
    layers, biases
        How many layers, counted from the last, the device can train, and how many with their biases only. Both are None
        if it can train none.
    """

    device: str
    board: str
    model: Iri
    arena: int
    required: int
    free: int
    online: bool | None
    layers: int | None = None
    biases: int | None = None


@dataclass(frozen=True)
class ModelMatch:
    """A model that a device can run.

    Attributes
    ----------
    model, name
        IRI and name of the model.
    observed
        How many properties the model's input is known to observe. The device's board has a sensor for each of them.
    required, free
        Bytes: of what running the model requires, and of what remains of the device's arena.
    parameters
        Number of parameters of the model, if known.
    layers, biases
        As in `DeviceMatch`.
    """

    model: Iri
    name: str
    observed: int
    required: int
    free: int
    parameters: int | None
    layers: int | None
    biases: int | None


@dataclass(frozen=True)
class UnmetRequirement:
    """A requirement of a model that a device does not meet.

    Attributes
    ----------
    requirement
        Its name, such as "RAM to run".
    required
        What the model needs; None if the graph does not know it.
    has
        What the device has; None if the graph does not know it.
    shortfall
        Missing bytes, if the requirement is about bytes.
    """

    requirement: str
    required: Value | None
    has: Value | None
    shortfall: int | None

    def __str__(self) -> str:
        if self.requirement == COMPATIBILITY:
            return str(self.has)
        if self.requirement == "sensor":
            return f"its board has no sensor known to observe {str(self.required).rsplit('/', 1)[-1]}"
        if self.required is None:
            return {
                TRAIN: "nothing is known about training it",
                "engine": "the model's engine is not known",
            }.get(self.requirement, f"its {self.requirement} is not known")
        if self.has is None:
            return f"{self.requirement}: the model requires {_count(self.required)}; what the device has is not known"
        if self.shortfall is None:
            return f"{self.requirement}: the model requires {self.required}, and the device has {self.has}"
        return (
            f"{self.requirement}: the model requires {_count(self.required)} B, {_count(self.shortfall)} more than"
            f" the {_count(self.has)} B of the device"
        )


TRAIN = "RAM to train"
UPDATE_MODEL = "model slot"
"""Requirements that a device need not meet to run a model."""
COMPATIBILITY = "compatibility"
"""Requirement that server and device speak the same versions; `has` says why they do not."""

_SMALL_SLOT = f"""PREFIX tf: <{TF.iri}>
SELECT ?id ?model ("{UPDATE_MODEL}" AS ?requirement) (?storage AS ?required) (?slot AS ?has)
       (?storage - ?slot AS ?shortfall) WHERE {{
  VALUES ?id {{ UNDEF }} VALUES ?fleet {{ UNDEF }} VALUES ?model {{ UNDEF }}
  ?device tf:modelSlotBytes ?slot ; tf:engine ?engine ; a tf:Device ; tf:fleet ?fleet ; tf:deviceId ?id .
  ?model tf:storageBytes ?storage ; tf:engine ?engine ; a tf:Model .
  FILTER(?storage > ?slot)
}} ORDER BY ?id ?model"""

_INCOMPATIBLE = f"""PREFIX tf: <{TF.iri}>
SELECT ?id ?model ("{COMPATIBILITY}" AS ?requirement) ?has WHERE {{
  VALUES ?id {{ UNDEF }} VALUES ?fleet {{ UNDEF }} VALUES ?model {{ UNDEF }}
  ?device tf:incompatibility ?has ; a tf:Device ; tf:fleet ?fleet ; tf:deviceId ?id .
  ?model a tf:Model .
}} ORDER BY ?id ?model"""


def match_devices(store: Store, model: Iri, fleet: str) -> list[DeviceMatch]:
    """Return the devices of a fleet that can run a model, best first: by the layers they can train, then free RAM."""
    trains = {str(row["id"]): row for row in store.query(library.text("trainable"), model=model, fleet=fleet)}
    matches = []
    for row in store.query(library.text("runnable"), model=model, fleet=fleet):
        more = trains.get(str(row["id"]), {})
        matches.append(
            DeviceMatch(
                device=str(row["id"]),
                board=str(row["board"]),
                model=model,
                arena=_int(row["arena"]),
                required=_int(row["required"]),
                free=_int(row["free"]),
                online=cast("bool | None", row.get("online")),
                layers=_optional(more, "layers"),
                biases=_optional(more, "biases"),
            )
        )
    rank = {device: i for i, device in enumerate(trains)}
    return sorted(matches, key=lambda match: rank.get(match.device, len(rank)))  # stable: the rest stay by free RAM


def match_models(store: Store, device: str, fleet: str) -> list[ModelMatch]:
    """Return the models that a device can run, best first (see the query models-for-device)."""
    return [
        ModelMatch(
            model=Iri(str(row["model"])),
            name=str(row["name"]),
            observed=_int(row["observed"]),
            required=_int(row["required"]),
            free=_int(row["free"]),
            parameters=_optional(row, "parameters"),
            layers=_int(row["layers"]) if row["layers"] or row["biases"] else None,
            biases=_int(row["biases"]) if row["layers"] or row["biases"] else None,
        )
        for row in store.query(library.text("models-for-device"), id=device, fleet=fleet)
    ]


def unmet_requirements(
    store: Store, fleet: str, *, model: Iri | None = None, device: str | None = None
) -> dict[tuple[str, Iri], list[UnmetRequirement]]:
    """Return the unmet requirements of each pair of a device and a model; of one model, one device, or both."""
    given: dict[str, Binding] = {"fleet": fleet}
    if model is not None:
        given["model"] = model
    if device is not None:
        given["id"] = device
    unmet: dict[tuple[str, Iri], list[UnmetRequirement]] = {}
    for sparql in (library.text("unmet-requirements"), _SMALL_SLOT, _INCOMPATIBLE):
        for row in store.query(sparql, **given):
            requirement = str(row["requirement"])
            unmet.setdefault((str(row["id"]), Iri(str(row["model"]))), []).append(
                UnmetRequirement(requirement, row.get("required"), row.get("has"), _optional(row, "shortfall"))
            )
    return unmet


def require_model(store: Store, name: str) -> Iri | None:
    """Return the model of the graph with this ID (16 hexadecimal digits, or its IRI); None for a name of another form.

    Raises UserError if the graph does not know the model.
    """
    digits = name.removeprefix("urn:tinyfleet:model:")
    if not re.fullmatch("[0-9a-fA-F]{16}", digits):
        return None
    model = model_iri(digits)
    if not store.ask(f"ASK {{ <{model}> a <{TF.Model}> }}"):
        raise UserError(f"the graph describes no model {digits}; give its file, or see: tinyfleet query models")
    return model


def require_device(store: Store, device: str, fleet: str) -> Iri:
    """Return the IRI of a device of the fleet. Raises UserError if the graph does not know the device."""
    about = device_iri(fleet, device)
    if not store.ask(f"ASK {{ <{about}> a <{TF.Device}> }}"):
        raise UserError(
            f"the graph knows no device {device!r} in the fleet '{fleet}'; see: tinyfleet query devices, or name "
            "another fleet with --fleet"
        )
    return about


def describe(store: Store, model: ModelDescription) -> Iri:
    """Describe a model in the graph, unless the graph already knows what running it requires; return its IRI."""
    if not store.ask(f"ASK {{ <{model.iri}> <{TF.runRamBytes}> ?known }}"):
        put_model(store, model)
    return model.iri


def select_devices(store: Store, sparql: str, model: Iri, fleet: str) -> list[str]:
    """Run a query that selects devices, and return their IDs without those of incompatible devices.

    Parameters
    ----------
    store
        The graph.
    sparql
        A SELECT with a column `?id`. It may have the parameters `?model` and `?fleet`.
    model, fleet
        Values of these parameters.

    Raises
    ------
    UserError
        If the query has no column `?id`, or other values than device IDs in it.
    """
    given: dict[str, Binding] = {"model": model, "fleet": fleet_name(fleet)}
    known = parameters(sparql)
    rows = store.query(sparql, **{name: term for name, term in given.items() if name in known})
    if "id" not in rows.variables:
        raise UserError("a query that selects devices has a column ?id with their IDs; add it to its SELECT")
    ids = rows.column("id")
    for id in ids:
        if not isinstance(id, str) or isinstance(id, Iri):
            raise UserError(f"the column ?id of the query has {id}, which is not a device ID; use its tf:deviceId")
    incompatible = store.query(_INCOMPATIBLE_IDS, fleet=fleet).column("id")
    return list(dict.fromkeys(str(id) for id in ids if id not in incompatible))


_INCOMPATIBLE_IDS = f"""PREFIX tf: <{TF.iri}>
SELECT ?id WHERE {{
  VALUES ?fleet {{ UNDEF }} ?device tf:incompatibility ?reason ; tf:fleet ?fleet ; tf:deviceId ?id
}}"""


def _int(value: Value) -> int:
    assert isinstance(value, int)
    return value


def _optional(row: Row, name: str) -> int | None:
    value = row.get(name)
    return None if value is None else _int(value)


def _count(value: Value) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
