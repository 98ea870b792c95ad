"""Imports the devices and models that the authors of SeLoC-ML describe, fixes known defects, and reports them.

Their descriptions nest (S3N, and their network schema). Here they become flat facts about devices, boards and models,
under the same IRIs. The nested form is then entailed, as for all other descriptions (ontology.vocabulary.entailment),
so that their queries give the same results. Affordances are left out: they belong to Thing Descriptions.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyoxigraph as ox

from tinyfleet.edge.errors import UserError
from tinyfleet.ontology.ingest.describe import board_facts, put_list
from tinyfleet.ontology.store.store import Binding, Value, value
from tinyfleet.ontology.vocabulary.entailment import CATALOGUE, with_entailments
from tinyfleet.ontology.vocabulary.namespaces import (
    MLS,
    NNET,
    RDF,
    RDFS,
    S3N,
    S3N_EXTEND,
    SCHEMA,
    SOSA,
    SOSA_EXTEND,
    SSN,
    SSN_SYSTEM,
    TD,
    TF,
    Iri,
    board_iri,
    fleet_name,
)

Facts = dict[Iri, dict[Iri, Binding | None]]
_SSN_EXTEND = "https://w3id.org/tinyml-schema/neural-network-schema/ssn_extend/"
_SCHEMAS = (NNET.iri, SOSA_EXTEND.iri, S3N_EXTEND.iri, _SSN_EXTEND)
_KILOBYTE = 1000
"""om:kilobyte, in bytes."""
# Other spellings of terms that their schema defines.
_RENAMED = {NNET.AvgPool2D: NNET.AveragePool2D}


@dataclass(frozen=True)
class Defect:
    """A defect of the files: its kind, where it is, how often it occurs, and how it was fixed."""

    kind: str
    subject: str
    times: int
    fix: str


@dataclass(frozen=True)
class Imported:
    facts: Facts
    devices: int
    models: int
    triples_read: int
    defects: tuple[Defect, ...]


class _Reader:
    def __init__(self, files: list[Path]) -> None:
        self.graph = ox.Store()
        self.defined: set[str] = set()
        self.found: Counter[tuple[str, str, str]] = Counter()
        self.read = 0
        for file in files:
            try:
                quads = [(q.subject, q.predicate, q.object) for q in _parse(file)]
            except OSError as error:
                raise UserError(f"{file} cannot be read ({error.strerror})") from None
            except (SyntaxError, ValueError) as error:
                raise UserError(f"{file} is not Turtle: {error}") from None
            if file.name.startswith("schema_"):
                self.defined |= {s.value for s, _, _ in quads if isinstance(s, ox.NamedNode)}
                continue
            self.read += len(quads)
            for s, p, o in quads:
                if isinstance(o, ox.NamedNode):
                    fix = self._name(o.value)
                    if fix is None:
                        continue
                    o = ox.NamedNode(fix)
                self.graph.add(ox.Quad(s, p, o))

    def note(self, kind: str, subject: str, fix: str) -> None:
        self.found[kind, subject, fix] += 1

    def _name(self, iri: str) -> str | None:
        """The IRI, fixed if necessary; None if it cannot be fixed."""
        if re.match(r"[\w-]+(\.[\w-]+)+/", iri):
            self.note("no scheme", f"<{iri}>", f"read as https://{iri}")
            return f"https://{iri}"
        if ":" not in iri:
            self.note("no address", f"<{iri}>", "left out: not known")
            return None
        for schema in _SCHEMAS:
            local = iri.removeprefix(schema)
            if local == iri or "/" in local:
                continue
            if local.startswith(":"):
                self.note("wrong IRI", iri, f"read as {schema}{local.lstrip(':')}")
                iri, local = schema + local.lstrip(":"), local.lstrip(":")
            if self.defined and iri not in self.defined:
                renamed = _RENAMED.get(Iri(iri))
                self.note("undefined term", iri, f"read as {renamed}" if renamed else "kept as text, or left out")
                return renamed or iri
        return iri

    def is_defined(self, iri: str) -> bool:
        return not self.defined or iri in self.defined

    def all(self, subject: Value | None, predicate: Iri) -> list[Value]:
        """The values in the graph, texts without surrounding white space."""
        if not isinstance(subject, str):
            return []
        node = ox.NamedNode(subject) if isinstance(subject, Iri) else ox.BlankNode(subject.removeprefix("_:"))
        found: list[Value] = []
        for quad in self.graph.quads_for_pattern(node, ox.NamedNode(predicate), None):
            o = quad.object
            if isinstance(o, ox.Literal) and isinstance(value(o), str):
                found.append(str(value(o)).strip())
            else:
                found.append(f"_:{o.value}" if isinstance(o, ox.BlankNode) else value(o))
        return found

    def one(self, subject: Value | None, predicate: Iri) -> Value | None:
        return next(iter(self.all(subject, predicate)), None)

    def of_type(self, kind: Iri) -> list[Iri]:
        quads = self.graph.quads_for_pattern(None, ox.NamedNode(RDF.type), ox.NamedNode(kind))
        return sorted(Iri(quad.subject.value) for quad in quads if isinstance(quad.subject, ox.NamedNode))

    def subjects(self, predicate: Iri, o: Value | None) -> list[Iri]:
        if not isinstance(o, Iri):
            return []
        quads = self.graph.quads_for_pattern(None, ox.NamedNode(predicate), ox.NamedNode(o))
        return sorted(Iri(quad.subject.value) for quad in quads if isinstance(quad.subject, ox.NamedNode))


def _parse(path: Path) -> Iterator[ox.Quad]:
    # Lenient: an IRI such as <None> is reported instead of ending the import.
    return ox.parse(path=str(path), format=ox.RdfFormat.TURTLE, lenient=True, rename_blank_nodes=True)


def read_selocml(files: list[Path], fleet: str = "selocml") -> Imported:
    """Read the devices and models that .ttl files describe; schema_*.ttl define the terms. Raises UserError."""
    reader = _Reader(files)
    facts: Facts = {}
    devices, models = reader.of_type(S3N.SmartSensor), reader.of_type(NNET.NeuralNetwork)
    for device in devices:
        _merge(facts, _device(reader, device, fleet_name(fleet)))
    for model in models:
        _merge(facts, _ModelImport(reader, model).facts())
    if not devices and not models:
        raise UserError("there is neither an s3n:SmartSensor nor an nnet:NeuralNetwork in these files")
    defects = tuple(Defect(kind, subject, n, fix) for (kind, subject, fix), n in sorted(reader.found.items()))
    return Imported(facts, len(devices), len(models), reader.read, defects)


def _merge(facts: Facts, more: Mapping[Iri, Mapping[Iri, Binding | None]]) -> None:
    for subject, said in more.items():
        facts.setdefault(subject, {}).update(said)


@dataclass(frozen=True)
class _Board:
    id: str
    title: str
    mcu: str
    clock_hz: None
    ram_bytes: int
    flash_bytes: int
    sensors: tuple[str, ...]


def _device(reader: _Reader, device: Iri, fleet: str) -> Facts:
    title = str(reader.one(device, TD.title) or device.rpartition("/")[2])
    description = str(reader.one(device, TD.description) or title)
    sensors: set[str] = set()
    memory: dict[Value, int | None] = {}
    mcu = description
    for system in reader.all(device, SSN.hasSubSystem):
        for kind in reader.all(system, RDF.type):
            if kind == S3N.MicroController:
                mcu = str(reader.one(system, RDFS.comment) or description).rstrip(".")
                for capability in reader.all(system, S3N.hasSystemCapability):
                    for part in reader.all(capability, SSN_SYSTEM.hasSystemProperty):
                        size = _bytes(reader.one(part, SCHEMA.value))
                        memory |= dict.fromkeys(reader.all(part, RDF.type), size)
            elif str(kind).startswith((SOSA_EXTEND.iri, SOSA.Sensor)):
                info = reader.one(system, SOSA_EXTEND.hasSensorInfo)
                sensors.add(str(info) if info else re.split("[/#]", str(kind))[-1].lower())
    if forms := reader.all(device, TD.hasPropertyAffordance):
        for _ in forms:
            reader.note("affordance", "td:hasPropertyAffordance", "left out: part of a Thing Description")
    ram, flash = memory.get(S3N_EXTEND.RAM), memory.get(S3N_EXTEND.Flash)
    if ram is None or flash is None:
        raise UserError(f"{device} does not say its RAM and flash")
    board = _Board(
        "seloc-" + re.sub(r"[^a-z0-9]+", "-", re.sub(r"_\d+$", "", title).lower()).strip("-"),
        description,
        mcu,
        None,
        ram,
        flash,
        tuple(sorted(sensors)),
    )
    facts = board_facts(board)
    facts[device] = {
        RDF.type: [TF.Device, TD.Thing, S3N.SmartSensor],
        TD.title: title,
        TD.description: description,
        TD.hasSecurityConfiguration: reader.all(device, TD.hasSecurityConfiguration),
        TF.fleet: fleet,
        TF.deviceId: title,
        TF.board: board_iri(board.id),
        SSN.hasSubSystem: facts[board_iri(board.id)][SSN.hasSubSystem],
    }
    return facts


def _bytes(kilobytes: Value | None) -> int | None:
    return round(kilobytes * _KILOBYTE) if isinstance(kilobytes, int | float) and kilobytes > 0 else None


# The facts about a model in schema.org's terms that are kept.
_KEPT = ("name", "identifier", "description", "creator", "dateCreated", "citation", "codeRepository", "runtimePlatform")
_METRICS = {NNET.Top_1_accuracy: "top-1 accuracy", NNET.Top_5_accuracy: "top-5 accuracy"}


class _ModelImport:
    """The facts about one model, collected part by part."""

    def __init__(self, reader: _Reader, model: Iri) -> None:
        self._reader = reader
        self._model = model
        self._about: dict[Iri, Binding | None] = {SCHEMA[name]: reader.all(model, SCHEMA[name]) for name in _KEPT}
        self._facts: Facts = {model: self._about}

    def facts(self) -> Facts:
        self._layers()
        self._memory()
        self._datasets()
        self._scores()
        self._inputs()
        self._outputs()
        return with_entailments(self._facts)

    def _all(self, predicate: Iri) -> list[Value]:
        return self._reader.all(self._model, predicate)

    def _layers(self) -> None:
        reader = self._reader
        first, last = self._all(NNET.inputLayer), self._all(NNET.outputLayer)
        middle = sorted(self._all(NNET.middleLayer), key=lambda layer: _number(reader.one(layer, NNET.hasIndex)))
        layers = [Iri(str(layer)) for layer in (*first, *middle, *last)]
        if len({reader.one(layer, NNET.hasIndex) for layer in layers}) < len(layers):
            reader.note("index twice", "nnet:hasIndex", "numbered from 0 in the layers' order")
        types = set()
        for i, layer in enumerate(layers):
            types |= (quantization := set(_words(reader, layer, NNET.hasQuantization)))
            self._facts[layer] = {
                RDF.type: TF.Layer,
                TF["index"]: i,
                TF.kind: [str(kind).rpartition("#")[2] for kind in reader.all(layer, NNET.hasType)],
                TF.quantization: sorted(quantization),
                TF.activation: _words(reader, layer, NNET.hasActivation),
            }
        self._about |= {
            RDF.type: TF.Model,
            TF.format: "tflite",  # what TFLite Micro runs
            TF.engine: "tflite-micro" if "TFLite Micro" in self._all(SCHEMA.runtimePlatform) else None,
            TF.macs: round(_number(reader.one(self._model, NNET.hasMultiplyAccumulateOps))) or None,
            TF.quantization: sorted(types),
            NNET.inputLayer: layers[:1],
            NNET.middleLayer: layers[1:-1],
            NNET.outputLayer: layers[-1:],
            NNET.hasCategory: [c for c in self._all(NNET.hasCategory) if reader.is_defined(str(c))],
        }
        self._shape(layers[0], NNET.shapeIn, TF.inputShape, "input")
        self._shape(layers[-1], NNET.shapeOut, TF.outputShape, "output")

    def _shape(self, layer: Iri, theirs: Iri, ours: Iri, name: str) -> None:
        for text in self._reader.all(layer, theirs):
            self._reader.note(
                "shape as text", f"nnet:{theirs.rpartition('#')[2]}", "read as a list, without the batch axis"
            )
            sizes = [int(n) for n in re.findall(r"\d+", str(text))]
            put_list(self._facts, self._model, ours, f"{self._model}#{name}", sizes[1:] if len(sizes) > 1 else sizes)

    def _memory(self) -> None:
        reader = self._reader
        for feature in self._all(S3N.hasProcedureFeature):
            for condition in reader.all(feature, SSN_SYSTEM.inCondition):
                kinds, least = reader.all(condition, RDF.type), _bytes(reader.one(condition, SCHEMA.minValue))
                for kind, flat in ((S3N_EXTEND.RAM, TF.runRamBytes), (S3N_EXTEND.Flash, TF.storageBytes)):
                    if kind in kinds:
                        self._about[flat] = least

    def _datasets(self) -> None:
        self._about[TF.dataset] = datasets = [Iri(str(one)) for one in self._all(NNET.trainingDataset)]
        for dataset in datasets:
            self._facts[dataset] = {RDF.type: MLS.Dataset, SCHEMA.name: str(dataset)}

    def _scores(self) -> None:
        reader = self._reader
        scores: list[Iri] = []
        for metric in self._all(NNET.hasMetric):
            number = _number(reader.one(metric, NNET.hasMetricValue))
            if number == 0:
                reader.note("0 for unknown", "nnet:hasMetricValue", "left out: not known")
                continue
            kinds = [kind for kind in reader.all(metric, RDF.type) if kind != NNET.Metric]
            node = Iri(f"{self._model}#score-{len(scores)}")
            name = _METRICS.get(Iri(str(kinds[0])), "other")
            self._facts[node] = {RDF.type: TF.Score, TF.metricName: name, TF.metricValue: float(number)}
            scores.append(node)
        self._about[TF.metric] = scores

    def _inputs(self) -> None:
        reader = self._reader
        properties: list[Iri] = []
        for source in self._all(SSN.hasInput):
            info = reader.one(source, NNET.hasInputInfo)
            self._facts[Iri(f"{self._model}#network-input")] = {NNET.hasInputInfo: info}
            for sensor in reader.subjects(Iri(_SSN_EXTEND + "provideInput"), source):
                properties += self._sensor(sensor)
        self._about[TF.inputProperty] = properties

    def _sensor(self, sensor: Iri) -> list[Iri]:
        """Add what a sensor that feeds the model is; return what it observes."""
        infos = self._reader.all(sensor, SOSA_EXTEND.hasSensorInfo)
        kinds = self._reader.all(sensor, RDF.type)
        properties = [_observed()[str(kind)] for kind in kinds if str(kind) in _observed()]
        for observed in properties:
            node = Iri(f"{self._model}#source-{observed.rpartition('/')[2]}")
            self._facts[node] = {SOSA_EXTEND.hasSensorInfo: [text for text in infos if text != "N.A."]}
        if "N.A." in infos:
            self._reader.note("N.A. for unknown", "sosa_extend:hasSensorInfo", "left out: not known")
        return properties

    def _outputs(self) -> None:
        for result in self._all(SSN.hasOutput):
            info = str(self._reader.one(result, NNET.hasOutputInfo) or "")
            self._facts[Iri(f"{self._model}#network-output")] = {NNET.hasOutputInfo: info or None}
            labels = re.findall(r"(\d+)\s*:\s*([^,]+)", info)
            if labels and [int(n) for n, _ in labels] == list(range(len(labels))):
                texts = [label.strip() for _, label in labels]
                put_list(self._facts, self._model, TF.classLabels, f"{self._model}#label", texts)


@cache
def _observed() -> dict[str, Iri]:
    """What each kind of sensor in the catalogue observes."""
    return {
        quad.subject.value: Iri(quad.object.value)
        for quad in ox.parse(path=str(CATALOGUE), format=ox.RdfFormat.TURTLE)
        if quad.predicate.value == SOSA.observes
    }


def _words(reader: _Reader, layer: Iri, predicate: Iri) -> list[str]:
    """The schema's individuals as words: nnet:Int8 is int8."""
    return [str(o).rpartition("#")[2].lower() for o in reader.all(layer, predicate)]


def _number(given: Value | None) -> float:
    return float(given) if isinstance(given, int | float) else 0.0
