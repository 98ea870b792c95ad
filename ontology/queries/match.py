"""What fits where: which devices can run a model, and train how much of it; which models fit a device; why not.

The rules are the library's queries `runnable`, `trainable`, `models-for-device` and `why-not`; here they are asked, and
what they answer gets types. What the graph does not know counts as not met; but not of the room for a program over the
air, which a model needs to get to a device, and not to run there.
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
    """A device that can run a model. arena, takes and room are bytes: what it has, what running takes, what is left.

    layers: how many layers it can train, counted from the last; biases: of how many it can train the biases alone; both
    None if it can train none. online None: it has not said so.
    """

    device: str
    board: str
    model: Iri
    arena: int
    required: int
    room: int
    online: bool | None
    layers: int | None = None
    biases: int | None = None


@dataclass(frozen=True)
class ModelMatch:
    """A model that a device can run. observed: how many of the properties that its input observes are known (they are
    all observed by the device's board, or it would not fit); for the rest see Fit."""

    model: Iri
    name: str
    observed: int
    required: int
    room: int
    parameters: int | None
    layers: int | None
    biases: int | None


@dataclass(frozen=True)
class UnmetRequirement:
    """A need of a model that a device does not meet. takes None: the graph does not know what the model needs; has
    None: it does not know what the device has; short: how many bytes are missing, if it is about bytes."""

    requirement: str
    required: Value | None
    has: Value | None
    shortfall: int | None

    def __str__(self) -> str:
        if self.requirement == "sensor":
            return f"its board has no sensor known to observe {str(self.required).rsplit('/', 1)[-1]}"
        if self.required is None:
            return {
                "RAM to train": "nothing is known that trains in it",
                "engine": "no engine is known for it",
            }.get(self.requirement, f"its {self.requirement} is not known")
        if self.has is None:
            return f"{self.requirement}: it takes {_count(self.required)}, and what the device has is not known"
        if self.shortfall is None:
            return f"{self.requirement}: it is made for {self.required}, and the device has {self.has}"
        return (
            f"{self.requirement}: it takes {_count(self.required)} B, {_count(self.shortfall)} more than"
            f" the {_count(self.has)} there"
        )


TRAIN = "RAM to train"
UPDATE_MODEL = "room for a program over the air"
"""The needs that a device need not meet to run a model."""

_NO_ROOM = f"""PREFIX tf: <{TF.iri}>
SELECT ?id ?model (?storage AS ?takes) (?room AS ?has) (?storage - ?room AS ?short) WHERE {{
  VALUES ?id {{ UNDEF }} VALUES ?fleet {{ UNDEF }} VALUES ?model {{ UNDEF }}
  ?device tf:modelSlotBytes ?room ; tf:engine ?engine ; a tf:Device ; tf:fleet ?fleet ; tf:deviceId ?id .
  ?model tf:storageBytes ?storage ; tf:engine ?engine ; a tf:Model .
  FILTER(?storage > ?room)
}} ORDER BY ?id ?model"""


def match_devices(store: Store, model: Iri, fleet: str) -> list[DeviceMatch]:
    """The devices of a fleet that can run a model, the best first: by how much of it they can train, then by room."""
    trains = {str(row["id"]): row for row in store.query(library.text("trainable"), model=model, fleet=fleet)}
    fits = []
    for row in store.query(library.text("runnable"), model=model, fleet=fleet):
        more = trains.get(str(row["id"]), {})
        fits.append(
            DeviceMatch(
                device=str(row["id"]),
                board=str(row["board"]),
                model=model,
                arena=_int(row["arena"]),
                required=_int(row["takes"]),
                room=_int(row["room"]),
                online=cast("bool | None", row.get("online")),
                layers=_optional(more, "layers"),
                biases=_optional(more, "biases"),
            )
        )
    place = {device: i for i, device in enumerate(trains)}
    return sorted(fits, key=lambda fit: place.get(fit.device, len(place)))  # stable: the rest stay by room


def match_models(store: Store, device: str, fleet: str) -> list[ModelMatch]:
    """The models that fit a device, the best first (see the query models-for-device)."""
    return [
        ModelMatch(
            model=Iri(str(row["model"])),
            name=str(row["name"]),
            observed=_int(row["observed"]),
            required=_int(row["takes"]),
            room=_int(row["room"]),
            parameters=_optional(row, "parameters"),
            layers=_int(row["layers"]) if row["layers"] or row["biases"] else None,
            biases=_int(row["biases"]) if row["layers"] or row["biases"] else None,
        )
        for row in store.query(library.text("models-for-device"), id=device, fleet=fleet)
    ]


def unmet_requirements(
    store: Store, fleet: str, *, model: Iri | None = None, device: str | None = None
) -> dict[tuple[str, Iri], list[UnmetRequirement]]:
    """For each pair of a device and a model of which some need is not met, these needs; for one model, for one device,
    or for both."""
    given: dict[str, Binding] = {"fleet": fleet}
    if model is not None:
        given["model"] = model
    if device is not None:
        given["id"] = device
    found: dict[tuple[str, Iri], list[UnmetRequirement]] = {}
    for row in (*store.query(library.text("why-not"), **given), *store.query(_NO_ROOM, **given)):
        pair = str(row["id"]), Iri(str(row["model"]))
        miss = UnmetRequirement(
            str(row.get("need", UPDATE_MODEL)), row.get("takes"), row.get("has"), _optional(row, "short")
        )
        found.setdefault(pair, []).append(miss)
    return found


def known_model(store: Store, name: str) -> Iri | None:
    """The model of the graph with this id (16 hexadecimal digits, or its IRI); None if the name is of another form.

    Raises UserError if the graph knows no such model.
    """
    digits = name.removeprefix("urn:tinyfleet:model:")
    if not re.fullmatch("[0-9a-fA-F]{16}", digits):
        return None
    model = model_iri(digits)
    if not store.ask(f"ASK {{ <{model}> a <{TF.Model}> }}"):
        raise UserError(f"the graph describes no model {digits}; give its file, or see: tinyfleet query models")
    return model


def known_device(store: Store, device: str, fleet: str) -> Iri:
    """The device of this fleet. Raises UserError if the graph knows no such device."""
    about = device_iri(fleet, device)
    if not store.ask(f"ASK {{ <{about}> a <{TF.Device}> }}"):
        raise UserError(
            f"the graph knows no device {device!r} in the fleet '{fleet}'; see: tinyfleet query devices, or name "
            "another fleet with --fleet"
        )
    return about


def describe(store: Store, model: ModelDescription) -> Iri:
    """Describes a model in the graph, unless it is described there with what it takes to run."""
    if not store.ask(f"ASK {{ <{model.iri}> <{TF.runRamBytes}> ?known }}"):
        put_model(store, model)
    return model.iri


def select(store: Store, sparql: str, model: Iri, fleet: str) -> list[str]:
    """The device ids that a query selects: its column ?id. It may have the parameters ?model and ?fleet.

    Raises UserError if the query has no such column, or other things than ids in it.
    """
    given: dict[str, Binding] = {"model": model, "fleet": fleet_name(fleet)}
    known = parameters(sparql)
    rows = store.query(sparql, **{name: term for name, term in given.items() if name in known})
    if "id" not in rows.variables:
        raise UserError("a query that selects devices has a column ?id, the devices' ids; add it to its SELECT")
    chosen = rows.column("id")
    for one in chosen:
        if not isinstance(one, str) or isinstance(one, Iri):
            raise UserError(f"the column ?id of the query has {one}, which is no device's id; take its tf:deviceId")
    return list(dict.fromkeys(str(one) for one in chosen))


def _int(value: Value) -> int:
    assert isinstance(value, int)
    return value


def _optional(row: Row, name: str) -> int | None:
    value = row.get(name)
    return None if value is None else _int(value)


def _count(value: Value) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
