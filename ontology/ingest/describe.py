"""Boards and models as facts of the graph, from their own files.

A model becomes a `ModelDescription`, whatever its file's form, and that becomes facts. What a file cannot tell (the
memory that a planner would compute, the shape of an operator that we do not know) is None, and is then left unsaid;
what no file can tell (the sensor, the meaning of the classes) comes from the model card beside it.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Protocol

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.graph import Layer, ModelGraph, Shape
from tinyfleet.edge.model.program import Program
from tinyfleet.ontology.ingest.model_card import ModelCard
from tinyfleet.ontology.store.store import Binding, Facts, Store, Value, bind, each, triples
from tinyfleet.ontology.vocabulary import entailment, shapes
from tinyfleet.ontology.vocabulary.namespaces import (
    DCTERMS,
    MLS,
    NNET,
    RDF,
    SCHEMA,
    SOSA,
    SSN,
    TD,
    TF,
    Iri,
    board_iri,
    dataset_iri,
    measurement_iri,
    model_iri,
    option_iri,
    part_iri,
    property_iri,
)


class BoardLike(Protocol):
    """The public facts of a kind of board: `edge.device.thing_description.Board`."""

    @property
    def id(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def mcu(self) -> str: ...
    @property
    def clock_hz(self) -> int | None: ...
    @property
    def ram_bytes(self) -> int: ...
    @property
    def flash_bytes(self) -> int: ...
    @property
    def sensors(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class TrainingOption:
    """One way of training a model: its last layers with weights, from the one named on, or only their biases."""

    train_from: str
    layers_trained: int
    bias_only: bool
    ram_bytes: int
    """Of arena, parameters included."""
    parameters: int
    """Those that train."""


@dataclass(frozen=True)
class ModelDescription:
    """What is known of a model, whatever the form of its file.

    run_ram_bytes and train_ram_bytes are bytes of arena, parameters included; storage_bytes of flash on a device. They
    come from the code that plans the model for an engine, and are None until then.
    """

    name: str
    format: str
    """mote, tflite or keras."""
    sha256: str
    file_bytes: int
    layers: tuple[Layer, ...]
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    engine: str | None = None
    """The engine that the file is made for."""
    run_ram_bytes: int | None = None
    train_ram_bytes: int | None = None
    storage_bytes: int | None = None
    training_options: tuple[TrainingOption, ...] = ()
    card: ModelCard | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What could not be told from the file, for the person who asked."""

    @property
    def iri(self) -> Iri:
        return model_iri(self.sha256[:16])

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of one inference; None if some layer's are not known."""
        return _total([layer.macs for layer in self.layers])

    @property
    def parameters(self) -> int | None:
        """Learned numbers; None if some layer's are not known."""
        return _total([layer.parameters for layer in self.layers])

    @property
    def trainable_parameters(self) -> int | None:
        """Those of the trainable layers; None if it is not known which layers are."""
        learned = [layer for layer in self.layers if layer.parameters != 0]
        if any(layer.trainable is None for layer in learned):
            return None
        return _total([layer.parameters for layer in learned if layer.trainable])

    @property
    def trainable_layers(self) -> int | None:
        """How many layers can be trained; None if that is not known."""
        learned = [layer for layer in self.layers if layer.parameters != 0]
        if any(layer.trainable is None for layer in learned):
            return None
        return sum(1 for layer in learned if layer.trainable)

    @property
    def quantizations(self) -> tuple[str, ...]:
        """The number types of the weights, each once."""
        return tuple(sorted({layer.quantization for layer in self.layers if layer.quantization is not None}))

    @property
    def quantized_storage_bytes(self) -> int | None:
        """An estimate: weights as int8, biases (one for each output channel of a layer) as int32. None if some layer's
        figures are not known, or nothing in the model is float."""
        learned = [layer for layer in self.layers if layer.parameters != 0]
        if not self._float or any(layer.parameters is None or not layer.output_shape for layer in learned):
            return None
        return sum((layer.parameters or 0) + 3 * (layer.output_shape or (0,))[-1] for layer in learned)

    @property
    def quantized_run_ram_bytes(self) -> int | None:
        """An estimate: the largest input and output of one layer as int8. None if a shape is not known, or nothing in
        the model is float."""
        shapes_ = [(layer.input_shape, layer.output_shape) for layer in self.layers]
        if not self._float or any(source is None or result is None for source, result in shapes_):
            return None
        return max(math.prod(source or ()) + math.prod(result or ()) for source, result in shapes_)

    @property
    def _float(self) -> bool:
        return bool(self.quantizations) and all(kind.startswith(("float", "bfloat")) for kind in self.quantizations)


def _total(numbers: Sequence[int | None]) -> int | None:
    known = [n for n in numbers if n is not None]
    return sum(known) if len(known) == len(numbers) else None


def board_facts(
    board: BoardLike, parts: Facts | None = None, more: Mapping[Iri, Binding | None] | None = None
) -> dict[Iri, dict[Iri, Binding | None]]:
    """The facts about a board, more of them, and what they imply. parts: what is known of the sensors that it names
    (part_facts)."""
    flat: Facts = {
        board_iri(board.id): {
            RDF.type: TF.Board,
            TD.title: board.title,
            TF.boardId: board.id,
            TF.mcu: board.mcu,
            TF.clockHz: board.clock_hz,
            TF.ramBytes: board.ram_bytes,
            TF.flashBytes: board.flash_bytes,
            TF.sensor: tuple(board.sensors),
            **(more or {}),
        }
    }
    return entailment.with_entailments(flat, parts)


def part_facts(part: str, observes: Sequence[str]) -> dict[Iri, dict[Iri, Binding | None]]:
    """The facts about a kind of sensor: its part name, and the names of the properties that it observes."""
    return {
        part_iri(part): {
            RDF.type: TF.SensorPart,
            TF.partName: part.lower(),
            SOSA.observes: [property_iri(name) for name in observes],
        }
    }


def known_parts(store: Store, sensors: Sequence[str]) -> Facts:
    """What the graph knows of these sensors as parts."""
    rows = store.query(
        """PREFIX sosa: <http://www.w3.org/ns/sosa/>
        PREFIX tf: <https://w3id.org/tinyfleet#>
        SELECT ?part ?name ?property { VALUES ?name { UNDEF } ?part tf:partName ?name ; sosa:observes ?property }""",
        name=[sensor.lower() for sensor in sensors],
    )
    facts: dict[Iri, dict[Iri, list[Value]]] = {}
    for row in rows:
        about = facts.setdefault(Iri(str(row["part"])), {TF.partName: [row["name"]], SOSA.observes: []})
        about[SOSA.observes].append(row["property"])
    return facts


def put_board(store: Store, board: BoardLike) -> Iri:
    """Writes a board into the graph, in place of what was said of it; what its sensors observe is looked up among the
    parts that the graph knows. ShapeError if it cannot be right."""
    iri, facts = board_iri(board.id), board_facts(board, known_parts(store, board.sensors))
    shapes.check(f"board {board.id!r}", triples(facts))
    _replace_board(store, iri, facts)
    return iri


def _replace_board(store: Store, iri: Iri, facts: Facts) -> None:
    """As `_replace`; the devices on the board then have the subsystems that it has."""
    had = set(store.query(_SUBSYSTEMS, board=iri).column("system"))
    _replace(store, iri, facts)
    has = set(each(facts[iri][SSN.hasSubSystem]))
    if had != has:
        store.update(bind(_PASS_ON, {"board": iri, "old": had - has, "new": has}))


def put_facts(store: Store, facts: Facts) -> None:
    """Writes the facts of a file, checked already: each board and model in place of what was said of it, the rest as
    it is."""
    things: dict[Iri, dict[Iri, Mapping[Iri, Binding | None]]] = {
        s: {} for s, said in facts.items() if {TF.Board, TF.Model} & set(each(said.get(RDF.type)))
    }
    known = store.query("SELECT DISTINCT ?thing { VALUES ?thing { UNDEF } ?thing ?p ?o }", thing=list(things))
    things = {Iri(str(thing)): {} for thing in known.column("thing")}
    rest: dict[Iri, Mapping[Iri, Binding | None]] = {}
    for subject, said in facts.items():
        whole = subject.partition("#")[0].partition(":train:")[0]
        things.get(Iri(whole), rest)[subject] = said
    for some in _batches(rest):
        store.write(some)
    for iri, about in things.items():
        if TF.Board in each(about[iri][RDF.type]):
            _replace_board(store, iri, about)
        else:
            _replace(store, iri, about)


def _batches(facts: Facts, subjects: int = 2000) -> Iterator[Facts]:
    """The facts about so many subjects at a time: no request to a server is then too long."""
    left = iter(facts.items())
    while some := dict(islice(left, subjects)):
        yield some


_SUBSYSTEMS = """PREFIX ssn: <http://www.w3.org/ns/ssn/>
SELECT ?system { VALUES ?board { UNDEF } ?board ssn:hasSubSystem ?system }"""
_PASS_ON = """PREFIX ssn: <http://www.w3.org/ns/ssn/>
PREFIX tf: <https://w3id.org/tinyfleet#>
DELETE { ?device ssn:hasSubSystem ?old }
WHERE { VALUES ?board { UNDEF } VALUES ?old { UNDEF } ?device tf:board ?board ; ssn:hasSubSystem ?old } ;
INSERT { ?device ssn:hasSubSystem ?new }
WHERE { VALUES ?board { UNDEF } VALUES ?new { UNDEF } ?device tf:board ?board }"""


def _replace(store: Store, iri: Iri, facts: Facts) -> None:
    """Writes facts in place of all that is said of the thing and of its parts, whose names begin with its own."""
    rows = store.query(
        """PREFIX rdf: <http://www.w3.org/1999/02/22-rdf-syntax-ns#>
        SELECT DISTINCT ?s ?p {
          VALUES ?thing { UNDEF }
          ?thing (!rdf:type)* ?s . ?s ?p []
          FILTER(STRSTARTS(STR(?s), STR(?thing)))
        }""",
        thing=iri,
    )
    written = {s: dict(said) for s, said in facts.items()}
    for row in rows:
        written.setdefault(Iri(str(row["s"])), {}).setdefault(Iri(str(row["p"])), None)
    store.write(written)


def from_program(program: Program, name: str) -> ModelDescription:
    """A program for mote: its plan is exact, and holds the arena for training and for running alike."""
    layers = tuple(
        Layer(
            name=layer.name,
            kind=layer.kind,
            input_shape=tuple(layer.in_shape),
            output_shape=tuple(layer.out_shape),
            macs=layer.macs,
            parameters=layer.params,
            quantization=("int8" if "int8" in layer.kind else "float32") if layer.params else None,
            trainable=layer.trainable if layer.params else None,
        )
        for layer in program.layers
    )
    if not layers:
        raise UserError(f"the program {name!r} has no layers")
    return ModelDescription(
        name=name,
        format="mote",
        sha256=hashlib.sha256(program.data).hexdigest(),
        file_bytes=len(program.data),
        layers=layers,
        input_shape=layers[0].input_shape,
        output_shape=layers[-1].output_shape,
        engine="mote",
        run_ram_bytes=program.arena_bytes,
        train_ram_bytes=program.arena_bytes,
        storage_bytes=len(program.data),
    )


def from_graph(model: ModelGraph, card: ModelCard | None = None) -> ModelDescription:
    """Describe a model by the graph of layers that was read from its file.

    Parameters
    ----------
    model : ModelGraph
        From the reader of the file's format.
    card : ModelCard, optional
        What the file cannot tell, from the card beside it.

    Returns
    -------
    ModelDescription
        Without an engine's memory, which only a plan tells.
    """
    return ModelDescription(
        name=model.name,
        format=model.format,
        sha256=model.sha256,
        file_bytes=model.file_bytes,
        layers=model.layers,
        input_shape=model.input_shape,
        output_shape=model.output_shape,
        storage_bytes=model.file_bytes if model.format == "tflite" else None,  # such a file is flashed as it is
        card=card,
        notes=model.notes,
    )


def model_facts(model: ModelDescription) -> dict[Iri, dict[Iri, Binding | None]]:
    """The facts about a model, its layers and the rest of it, and what they imply. Every node has a name made from the
    model's, so writing is repeatable."""
    iri = model.iri
    layers = [Iri(f"{iri}#layer-{i}") for i in range(len(model.layers))]
    facts: dict[Iri, dict[Iri, Binding | None]] = {
        iri: {
            RDF.type: TF.Model,
            SCHEMA.name: model.name,
            TF.format: model.format,
            TF.sha256: model.sha256,
            TF.fileBytes: model.file_bytes,
            TF.engine: model.engine,
            TF.macs: model.macs,
            TF.parameters: model.parameters,
            TF.trainableParameters: model.trainable_parameters,
            TF.trainableLayers: model.trainable_layers,
            TF.quantization: model.quantizations,
            TF.runRamBytes: model.run_ram_bytes,
            TF.trainRamBytes: model.train_ram_bytes,
            TF.storageBytes: model.storage_bytes,
            TF.quantizedRunRamBytes: model.quantized_run_ram_bytes,
            TF.quantizedStorageBytes: model.quantized_storage_bytes,
            NNET.inputLayer: layers[:1],
            NNET.middleLayer: layers[1:-1],
            NNET.outputLayer: layers[-1:],
            TF.trainingOption: None,
        }
    }
    _put_shape(facts, iri, TF.inputShape, f"{iri}#input", model.input_shape)
    _put_shape(facts, iri, TF.outputShape, f"{iri}#output", model.output_shape)
    for i, (node, layer) in enumerate(zip(layers, model.layers, strict=True)):
        facts[node] = {
            RDF.type: TF.Layer,
            TF["index"]: i,
            SCHEMA.name: layer.name,
            TF.kind: layer.kind,
            TF.macs: layer.macs,
            TF.parameters: layer.parameters,
            TF.quantization: layer.quantization,
            TF.trainable: layer.trainable,
            TF.activation: layer.activation,
        }
        _put_shape(facts, node, TF.inputShape, f"{node}-in", layer.input_shape)
        _put_shape(facts, node, TF.outputShape, f"{node}-out", layer.output_shape)
    if model.training_options:
        options = {option_iri(iri, o.layers_trained, o.bias_only): o for o in model.training_options}
        facts[iri][TF.trainingOption] = list(options)
        for node, option in options.items():
            facts[node] = {
                RDF.type: TF.TrainingOption,
                TF.trainFrom: option.train_from,
                TF.layersTrained: option.layers_trained,
                TF.biasOnly: option.bias_only,
                TF.trainRamBytes: option.ram_bytes,
                TF.trainableParameters: option.parameters,
            }
    if model.card is not None:
        _put_card(facts, iri, model.card)
    return entailment.with_entailments(facts)


def _put_card(facts: dict[Iri, dict[Iri, Binding | None]], iri: Iri, card: ModelCard) -> None:
    """What the model's card says."""
    datasets = {dataset_iri(name): name for name in card.datasets}
    scores = {Iri(f"{iri}#score-{i}"): score for i, score in enumerate(card.scores)}
    facts[iri] |= {
        SCHEMA.description: card.description,
        SCHEMA.license: card.license,
        SCHEMA.creator: card.creator,
        SCHEMA.citation: card.citation,
        SCHEMA.dateCreated: card.created,
        TF.pipelineTag: card.pipeline_tag,
        TF.inputProperty: [property_iri(name) for name in card.input_properties],
        TF.dataset: list(datasets),
        TF.metric: list(scores),
    }
    for node, name in datasets.items():
        facts[node] = {RDF.type: MLS.Dataset, SCHEMA.name: name}
    for node, score in scores.items():
        facts[node] = {
            RDF.type: TF.Score,
            TF.metricName: score.metric,
            TF.metricValue: score.value,
            DCTERMS.source: score.dataset,
        }
    if card.labels:
        put_list(facts, iri, TF.classLabels, f"{iri}#label", card.labels)
        text = ", ".join(f"{i}: {label}" for i, label in enumerate(card.labels))
        facts[Iri(f"{iri}#network-output")] = {NNET.hasOutputInfo: text}
    if card.input_info:
        facts[Iri(f"{iri}#network-input")] = {NNET.hasInputInfo: card.input_info}


def _put_shape(
    facts: dict[Iri, dict[Iri, Binding | None]], subject: Iri, predicate: Iri, name: str, shape: Shape | None
) -> None:
    if shape is not None:
        put_list(facts, subject, predicate, name, shape)


def put_list(
    facts: dict[Iri, dict[Iri, Binding | None]], subject: Iri, predicate: Iri, name: str, items: Sequence[int | str]
) -> None:
    """A list as an rdf:List whose cells are named, not blank."""
    cells = [Iri(f"{name}-{place}") for place in range(len(items))] + [RDF.nil]
    facts[subject][predicate] = cells[0]
    for place, item in enumerate(items):
        facts[cells[place]] = {RDF.first: item, RDF.rest: cells[place + 1]}


def put_model(store: Store, model: ModelDescription) -> Iri:
    """Writes a model into the graph, in place of what was said of it, but for an earlier plan's figures where this
    description has none. ShapeError if it cannot be right."""
    facts = model_facts(_with_earlier_plan(store, model))
    shapes.check(f"model {model.name!r}", triples(facts))
    _replace(store, model.iri, facts)
    return model.iri


def put_measurement(
    store: Store,
    model: Iri,
    board: str,
    *,
    emulated: bool,
    latency_seconds: float | None = None,
    energy_joules: float | None = None,
    instructions: int | None = None,
    at: datetime | None = None,
) -> Iri:
    """Writes what one inference of a model took on a kind of board, in place of an earlier measurement of that; None
    was not measured. Raises ShapeError if it cannot be right, UserError if nothing was measured."""
    if latency_seconds is None and energy_joules is None and instructions is None:
        raise UserError("nothing was measured; give the latency, the energy or the instructions of one inference")
    iri = measurement_iri(model, board, emulated)
    facts: Facts = {
        iri: {
            RDF.type: TF.Measurement,
            TF.ofModel: model,
            TF.onBoard: board_iri(board),
            TF.emulated: emulated,
            TF.latencySeconds: latency_seconds,
            TF.energyJoules: energy_joules,
            TF.instructions: instructions,
            SOSA.resultTime: at or datetime.now(UTC),
        }
    }
    shapes.check_and_add(store, f"the measurement on {board!r}", facts)
    return iri


def _with_earlier_plan(store: Store, model: ModelDescription) -> ModelDescription:
    rows = store.query(
        """PREFIX tf: <https://w3id.org/tinyfleet#>
        SELECT * {
          VALUES ?model { UNDEF }
          ?model a tf:Model .
          OPTIONAL { ?model tf:engine ?engine }
          OPTIONAL { ?model tf:runRamBytes ?run_ram_bytes }
          OPTIONAL { ?model tf:trainRamBytes ?train_ram_bytes }
          OPTIONAL { ?model tf:storageBytes ?storage_bytes }
          OPTIONAL { ?model tf:trainingOption [ tf:trainFrom ?from ; tf:layersTrained ?layers ; tf:biasOnly ?bias ;
                                                tf:trainRamBytes ?ram ; tf:trainableParameters ?parameters ] }
        }""",
        model=model.iri,
    )
    if not rows:
        return model
    known: dict[str, Any] = {
        name: rows[0][name]
        for name in ("engine", "run_ram_bytes", "train_ram_bytes", "storage_bytes")
        if getattr(model, name) is None and name in rows[0]
    }
    if not model.training_options:
        columns = ("from", "layers", "bias", "ram", "parameters")
        options: list[tuple[Any, ...]] = [tuple(row[name] for name in columns) for row in rows if "from" in row]
        known["training_options"] = tuple(TrainingOption(*option) for option in options)
    return replace(model, **known)
