"""The IRIs of the graph: namespaces, and the naming of everything that is described.

A name is made from what identifies the thing, so that describing it twice adds nothing.
"""

import re
from urllib.parse import quote

from tinyfleet.edge.errors import UserError


class Iri(str):
    """An IRI: a node of the graph, where a plain str is text.

    Examples
    --------
    >>> Iri("urn:tinyfleet:home:kitchen")
    'urn:tinyfleet:home:kitchen'
    """

    __slots__ = ()


class Namespace:
    """A namespace: `TF.Device` and `TF["Device"]` are the term's IRI."""

    def __init__(self, iri: str) -> None:
        self.iri = iri

    def __getattr__(self, term: str) -> Iri:
        if term.startswith("__"):  # looked up by copy and others on every object
            raise AttributeError(term)
        iri = self.__dict__[term] = Iri(self.iri + term)  # found there next time
        return iri

    def __getitem__(self, term: str) -> Iri:
        return Iri(self.iri + term)


TF = Namespace("https://w3id.org/tinyfleet#")
DCTERMS = Namespace("http://purl.org/dc/terms/")
MLS = Namespace("http://www.w3.org/ns/mls#")
NNET = Namespace("https://w3id.org/tinyml-schema/neural-network-schema#")
OWL = Namespace("http://www.w3.org/2002/07/owl#")
PROV = Namespace("http://www.w3.org/ns/prov#")
RDF = Namespace("http://www.w3.org/1999/02/22-rdf-syntax-ns#")
RDFS = Namespace("http://www.w3.org/2000/01/rdf-schema#")
S3N = Namespace("http://w3id.org/s3n/")
S3N_EXTEND = Namespace("https://w3id.org/tinyml-schema/neural-network-schema/s3n_extend/")
SCHEMA = Namespace("https://schema.org/")
SH = Namespace("http://www.w3.org/ns/shacl#")
SKOS = Namespace("http://www.w3.org/2004/02/skos/core#")
SOSA = Namespace("http://www.w3.org/ns/sosa/")
SOSA_EXTEND = Namespace("https://w3id.org/tinyml-schema/neural-network-schema/sosa_extend/")
SSN = Namespace("http://www.w3.org/ns/ssn/")
SSN_SYSTEM = Namespace("http://www.w3.org/ns/ssn/systems/")
TD = Namespace("https://www.w3.org/2019/wot/td#")
XSD = Namespace("http://www.w3.org/2001/XMLSchema#")

PREFIXES = {
    "s3n_extend": S3N_EXTEND.iri,
    "sosa_extend": SOSA_EXTEND.iri,
    "model": "urn:tinyfleet:model:",
    "dcterms": DCTERMS.iri,
    "mls": MLS.iri,
    "nnet": NNET.iri,
    "owl": OWL.iri,
    "prov": PROV.iri,
    "rdf": RDF.iri,
    "rdfs": RDFS.iri,
    "s3n": S3N.iri,
    "schema": SCHEMA.iri,
    "skos": SKOS.iri,
    "sosa": SOSA.iri,
    "om": "http://www.ontology-of-units-of-measure.org/resource/om-2/",
    "ssn-system": SSN_SYSTEM.iri,
    "ssn": SSN.iri,
    "td": TD.iri,
    "tf": TF.iri,
    "xsd": XSD.iri,
}
"""Prefixes of namespaces for people to read and write."""

BOARDS = "https://w3id.org/tinyfleet/board/"
PARTS = "https://w3id.org/tinyfleet/part/"
PROPERTIES = "https://w3id.org/tinyfleet/property/"
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_MODEL = re.compile(r"[0-9a-f]{16}")


def _name(kind: str, name: str, longest: int) -> str:
    if not _NAME.fullmatch(name) or len(name) > longest:
        raise UserError(f"{name!r} is not a valid {kind} name; use 1 to {longest} letters, digits, '.', '_' or '-'")
    return name


def fleet_name(name: str) -> str:
    """Check and return a fleet's name; topics allow 32 characters. `model` is reserved, because urn:tinyfleet:model:…
    names the models of all fleets."""
    if name == "model":
        raise UserError("a fleet cannot be called 'model'; choose another name")
    return _name("fleet", name, 32)


def device_iri(fleet: str, device: str) -> Iri:
    """urn:tinyfleet:{fleet}:{device}: also the `id` of the device's Thing Description."""
    return Iri(f"urn:tinyfleet:{fleet_name(fleet)}:{_name('device', device, 32)}")


def board_iri(board: str) -> Iri:
    """https://w3id.org/tinyfleet/board/{board}"""
    return Iri(BOARDS + _name("board", board, 64))


def part_iri(part: str) -> Iri:
    """https://w3id.org/tinyfleet/part/{part}: a kind of sensor that boards carry."""
    return Iri(PARTS + _name("part", part, 64))


def property_iri(name: str) -> Iri:
    """https://w3id.org/tinyfleet/property/{name}: what can be observed, such as temperature."""
    return Iri(PROPERTIES + _name("property", name, 64))


def model_iri(model: bytes | str) -> Iri:
    """urn:tinyfleet:model:{hex16}, from the first 8 bytes of the SHA-256 of the model's file or their hex digits."""
    digits = model.hex() if isinstance(model, bytes) else model.lower()
    if not _MODEL.fullmatch(digits):
        raise UserError(f"{digits!r} is not a model ID; use the first 16 hexadecimal digits of the file's SHA-256")
    return Iri(f"urn:tinyfleet:model:{digits}")


def run_iri(fleet: str, run: int) -> Iri:
    """urn:tinyfleet:{fleet}:run:{run}"""
    return Iri(f"urn:tinyfleet:{fleet_name(fleet)}:run:{run:d}")


def round_iri(fleet: str, run: int, number: int) -> Iri:
    """urn:tinyfleet:{fleet}:run:{run}:round:{number}"""
    return Iri(f"{run_iri(fleet, run)}:round:{number:d}")


def version_iri(fleet: str, run: int, number: int) -> Iri:
    """urn:tinyfleet:{fleet}:run:{run}:version:{number}: the parameters after that round; 0 is the initialization."""
    return Iri(f"{run_iri(fleet, run)}:version:{number:d}")


def dataset_iri(name: str) -> Iri:
    """The data set's address, or urn:tinyfleet:dataset:{name}."""
    return Iri(name) if re.match(r"https?://", name) else Iri(f"urn:tinyfleet:dataset:{quote(name, safe='/')}")


def option_iri(model: Iri, layers: int, bias_only: bool) -> Iri:
    """{model}:train:{layers} or {model}:train:{layers}:bias: training the last layers, or only their biases."""
    return Iri(f"{model}:train:{layers:d}" + ":bias" * bias_only)


def update_iri(fleet: str, run: int, number: int, device: str) -> Iri:
    """urn:tinyfleet:{fleet}:run:{run}:round:{number}:{device}:update: what the device replied in the round."""
    return Iri(f"{round_iri(fleet, run, number)}:{_name('device', device, 32)}:update")


def deployment_iri(fleet: str, number: int) -> Iri:
    """urn:tinyfleet:{fleet}:deployment:{number}"""
    return Iri(f"urn:tinyfleet:{fleet_name(fleet)}:deployment:{number:d}")


def drift_iri(device: Iri, number: int) -> Iri:
    """{device}:drift:{number}: a drift that the device reported."""
    return Iri(f"{device}:drift:{number:d}")


def measurement_iri(model: Iri, board: str, emulated: bool) -> Iri:
    """{model}:on:{board} or {model}:on:{board}:emulated: a measurement of the model on that board."""
    return Iri(f"{model}:on:{_name('board', board, 64)}" + ":emulated" * emulated)


def shorten(text: str) -> str:
    """The text with the known namespaces in it as prefixes."""
    for prefix, iri in PREFIXES.items():
        text = text.replace(iri, f"{prefix}:")
    return text
