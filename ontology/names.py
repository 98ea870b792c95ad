"""The IRIs of the graph: namespaces, and how a device, board, model, run, round or version is named.

A name is made from what identifies the thing, so that describing it twice adds nothing.
"""

import re

from edge.errors import UserError


class Iri(str):
    """An IRI, where a plain str is text. Bind and store it as a node of the graph."""

    __slots__ = ()


class Namespace:
    """A namespace: `TF.Device` and `TF["Device"]` are the term's IRI."""

    def __init__(self, iri: str) -> None:
        self.iri = iri

    def __getattr__(self, term: str) -> Iri:
        if term.startswith("__"):  # what copying and the like ask every object for
            raise AttributeError(term)
        return Iri(self.iri + term)

    def __getitem__(self, term: str) -> Iri:
        return Iri(self.iri + term)


TF = Namespace("https://w3id.org/tinyfleet#")
NNET = Namespace("https://w3id.org/tinyml-schema/neural-network-schema#")
OWL = Namespace("http://www.w3.org/2002/07/owl#")
PROV = Namespace("http://www.w3.org/ns/prov#")
RDF = Namespace("http://www.w3.org/1999/02/22-rdf-syntax-ns#")
RDFS = Namespace("http://www.w3.org/2000/01/rdf-schema#")
S3N = Namespace("http://w3id.org/s3n/")
SCHEMA = Namespace("https://schema.org/")
SH = Namespace("http://www.w3.org/ns/shacl#")
SOSA = Namespace("http://www.w3.org/ns/sosa/")
SSN = Namespace("http://www.w3.org/ns/ssn/")
TD = Namespace("https://www.w3.org/2019/wot/td#")
XSD = Namespace("http://www.w3.org/2001/XMLSchema#")

BOARDS = "https://w3id.org/tinyfleet/board/"
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_MODEL = re.compile(r"[0-9a-f]{16}")


def _name(kind: str, name: str, longest: int) -> str:
    if not _NAME.fullmatch(name) or len(name) > longest:
        raise UserError(f"{name!r} is no {kind} name; use 1 to {longest} letters, digits, '.', '_' or '-'")
    return name


def fleet_name(name: str) -> str:
    """The fleet's name, checked: 32 characters are what a topic takes (edge.protocol.Topics). `model` is taken:
    urn:tinyfleet:model:… names the models of all fleets."""
    if name == "model":
        raise UserError("a fleet cannot be called 'model'; choose another name")
    return _name("fleet", name, 32)


def device_iri(fleet: str, device: str) -> Iri:
    """urn:tinyfleet:{fleet}:{device}: also the `id` of the device's Thing Description."""
    return Iri(f"urn:tinyfleet:{fleet_name(fleet)}:{_name('device', device, 32)}")


def board_iri(board: str) -> Iri:
    """https://w3id.org/tinyfleet/board/{board}"""
    return Iri(BOARDS + _name("board", board, 64))


def model_iri(model: bytes | str) -> Iri:
    """urn:tinyfleet:model:{hex16}, from the first 8 bytes of the SHA-256 of the model's file or their hex digits."""
    digits = model.hex() if isinstance(model, bytes) else model.lower()
    if not _MODEL.fullmatch(digits):
        raise UserError(f"{digits!r} is no model id; it is the first 16 hexadecimal digits of the file's SHA-256")
    return Iri(f"urn:tinyfleet:model:{digits}")


def run_iri(fleet: str, run: int) -> Iri:
    """urn:tinyfleet:{fleet}:run:{run}"""
    return Iri(f"urn:tinyfleet:{fleet_name(fleet)}:run:{run:d}")


def round_iri(fleet: str, run: int, number: int) -> Iri:
    """urn:tinyfleet:{fleet}:run:{run}:round:{number}"""
    return Iri(f"{run_iri(fleet, run)}:round:{number:d}")


def version_iri(fleet: str, run: int, number: int) -> Iri:
    """urn:tinyfleet:{fleet}:run:{run}:version:{number}: the weights after that round; 0 are those it began with."""
    return Iri(f"{run_iri(fleet, run)}:version:{number:d}")


def deployment_iri(fleet: str, number: int) -> Iri:
    """urn:tinyfleet:{fleet}:deployment:{number}"""
    return Iri(f"urn:tinyfleet:{fleet_name(fleet)}:deployment:{number:d}")
