"""What decodes bytes from outside in Python, as targets of fuzzing: any input gives a value or a refusal, soon.

The table is at the end; fuzz_python.py runs them.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import itertools
import json
import os
import resource
import signal
import socket
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CORPUS = Path(__file__).parent / "corpus"

Refusals = tuple[type[Exception], ...]


@dataclass(frozen=True)
class Target:
    """Something that decodes bytes.

    Parameters
    ----------
    run
        Decodes an input, as its users do.
    refusals
        What its users handle.
    seeds
        Valid inputs.
    longest
        Bytes of the largest input.
    words
        What is worth putting into an input, besides random bytes.
    """

    run: Callable[[bytes], Any]
    refusals: Callable[[], Refusals]
    seeds: Callable[[], list[bytes]]
    longest: int = 4096
    words: tuple[bytes, ...] = ()


# ------------------------------------------------------------------------------------------------------ the wire


def _messages(data: bytes) -> None:
    from tinyfleet.edge.wire import chunks, commands, messages
    from tinyfleet.edge.wire.errors import ProtocolError

    decoders: list[Callable[[bytes], Any]] = [
        commands.decode_command,
        commands.decode_submission,
        commands.decode_refusal,
    ]
    decoders += [messages.decode_reply]
    for decode in [*decoders, messages.decode_status, chunks.decode_chunk]:
        try:
            str(decode(data))
        except ProtocolError as error:
            assert len(str(error)) < 200 and str(error).isprintable()


def _message_seeds() -> list[bytes]:
    import numpy as np

    from tinyfleet.edge.wire.chunks import chunks
    from tinyfleet.edge.wire.messages import Dense, ErrorCode, Failure, Metrics, Sparse, Status, Success, encode

    values, measured = np.ones(5, np.float32), Metrics(5, 0.5, 3, 2, 0.25, 1000)
    indices = np.array([1, 2, 300, 90_000, 90_001], np.uint32)
    messages = [
        Status(True, bytes(8), 2**32 - 1, 7, 8, 0.5, 0.25),
        Success(1, 0, 2, measured, Dense(3, values, half=True)),
        Success(2, 1, 2, None, Sparse(indices, values)),
        Failure(3, ErrorCode.ENGINE, -5),
    ]
    orders = [path.read_bytes()[3:] for path in sorted((CORPUS / "node").glob("seed_0*"))]
    return [*map(encode, messages), *orders, *chunks(bytes(40))]


def _frames(data: bytes) -> None:
    from tinyfleet.edge.wire.serial_frames import FrameReader
    from tinyfleet.edge.wire.topics import Topics

    reader, topics = FrameReader(1024), Topics("home")
    for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
        for frame in reader.feed(piece):
            topics.parse(frame.topic)


def _frame_seeds() -> list[bytes]:
    from tinyfleet.edge.wire.serial_frames import MESSAGE, PUBLISH, Frame, encode

    topic = "tinyfleet/home/devices/kitchen/reply"
    return [encode(Frame(PUBLISH, topic, b"\x82\x04\x07")) + encode(Frame(MESSAGE, "t", bytes(300)))]


def _broker_address(data: bytes) -> None:
    from tinyfleet.edge.wire.broker_address import BrokerAddress

    BrokerAddress.parse(data.decode("utf-8", "replace"))


def _token(data: bytes) -> None:
    from tinyfleet.edge.wire.enrolment_token import EnrolmentToken

    text = data.decode("latin-1")
    with contextlib.suppress(*_user_error()):
        EnrolmentToken.parse(text)
    EnrolmentToken.parse("tinyfleet1." + base64.urlsafe_b64encode(data).decode())


def _token_seeds() -> list[bytes]:
    from tinyfleet.edge.wire.enrolment_token import EnrolmentToken

    text = EnrolmentToken("https://fleet.example:8443", bytes(32), "A" * 32, "kitchen").text
    return [text.encode(), base64.urlsafe_b64decode(text.partition(".")[2] + "==")]


# ----------------------------------------------------------------------------------------------- what is described


@cache
def _registry() -> Any:
    from tinyfleet.ontology.ingest.registry import Registry

    return Registry(_store(), "home")


@cache
def _store() -> Any:
    from tinyfleet.ontology.store.store import EmbeddedStore

    return EmbeddedStore()


def _ingest(data: bytes) -> None:
    """The registry raises nothing: what it refuses, it counts."""
    registry, topics = _registry(), _registry_topics()
    before = registry.rejected
    if registry.ingest([(topics.td("dev-1"), data)])[0].rejection is not None:
        assert registry.rejected == before + 1 and registry.last_rejection.isprintable()


@cache
def _registry_topics() -> Any:
    from tinyfleet.edge.wire.topics import Topics

    return Topics("home")


def _description_seeds() -> list[bytes]:
    from tinyfleet.edge.device.thing_description import VIRTUAL, thing_description

    described = thing_description("home", "dev-1", VIRTUAL, "mote", "0.2.0", 65_536, bytes(8), 4096)
    return [json.dumps(described).encode()]


def _put_description(data: bytes) -> None:
    """As the directory does."""
    from tinyfleet.ontology.ingest.description_parser import parse_thing_description

    _registry().put_description(parse_thing_description(data))


def _turtle(data: bytes) -> None:
    from tinyfleet.ontology.graph_cli import read_file

    with tempfile.NamedTemporaryFile(suffix=".nt" if data[:1] == b"<" else ".ttl") as file:
        file.write(data)
        file.flush()
        read_file(Path(file.name))


def _model_card(data: bytes) -> None:
    from tinyfleet.ontology.ingest.model_card import parse_model_card

    parse_model_card("---\n" + data.decode("utf-8", "replace") + "\n---\n")


# --------------------------------------------------------------------------------------------------------- models


def _tflite(data: bytes) -> None:
    from tinyfleet.edge.model.assemble import assemble
    from tinyfleet.firmware_tools.readers.tflite_reader import read_tflite_model

    model = read_tflite_model(data, "model")
    if model.graph is not None:
        _run(assemble(model.graph).data)


def _keras_description(data: bytes) -> None:
    """A .keras file whose config.json this is."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.10.0"}')
        archive.writestr("config.json", data)
    _keras(file.getvalue())


def _keras(data: bytes) -> None:
    from tinyfleet.edge.model.assemble import assemble
    from tinyfleet.edge.model.memory_plan import resource_use
    from tinyfleet.firmware_tools.readers.keras_reader import read_keras_model

    _, keras = read_keras_model(data, "model")
    if keras is not None:
        graph = keras.with_loss(None).graph
        resource_use(graph)
        _run(assemble(graph).data)


def _keras_seeds() -> list[bytes]:
    found = []
    for i, description in enumerate(_corpus("keras")[:3]):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if i else zipfile.ZIP_STORED) as archive:
            archive.writestr("metadata.json", '{"keras_version": "3.10.0"}')
            archive.writestr("config.json", description)
            archive.writestr("model.weights.h5", bytes(100))
        found.append(file.getvalue())
    return found


def _program(data: bytes) -> None:
    """Its checksum is put right: what damage it would hide is the point."""
    if len(data) >= 16:
        data = data[:8] + len(data).to_bytes(4, "little") + zlib.crc32(data[16:]).to_bytes(4, "little") + data[16:]
    _run(data)


def _run(data: bytes) -> None:
    """A program's bytes, read and loaded as for a device; one inference if that is little work."""
    from tinyfleet.edge.model.learner import MoteLearner
    from tinyfleet.edge.model.program import Program

    program = Program.parse(data)
    work = sum(layer.macs for layer in program.layers)
    if program.arena_bytes < 1 << 24 and work < 1 << 24:
        import numpy as np

        learner = MoteLearner(program)
        if program.input.dtype == "float32":
            learner.infer(np.zeros(program.input_shape, np.float32))


def _parameters(data: bytes) -> None:
    from tinyfleet.server.cli import _parameters as read_parameters

    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        file.write(data)
        file.flush()
        read_parameters(Path(file.name), _small_program())


@cache
def _small_program() -> Any:
    from tinyfleet.edge.model.layers import Dense, build

    return build([Dense(3)], (4,), "softmax_cross_entropy")


def _parameter_seeds() -> list[bytes]:
    import numpy as np

    found = []
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        program = _small_program()
        save(file, **program.split(program.initial(0)))
        found.append(file.getvalue())
    return found


# ----------------------------------------------------------------------------------------------------------- HTTP


def _parameters_of_requests(data: bytes) -> None:
    from tinyfleet.ontology.http.request_handling import choose
    from tinyfleet.ontology.http.sparql import _fields, _graphs, _one

    text = data.decode("latin-1")
    choose(text[:200], ["text/turtle", "application/json"])
    fields = _fields(text)
    _graphs(fields, "default-graph-uri", "named-graph-uri")
    _one(fields, "query")


def _sparql(data: bytes) -> None:
    """What is accepted, Oxigraph parses and runs: without a stack overflow, and without fetching, which is an OSError.

    In a process of its own, as for the server, which may take as long as it likes until it is killed.
    """
    import pyoxigraph as ox

    from tinyfleet.ontology.store.query_limits import QueryRefused, check_query, check_update

    text = data.decode("utf-8", "replace")
    accepted: list[Callable[[], Any]] = []
    for check, run in ((check_query, ox.Store().query), (check_update, ox.Store().update)):
        with contextlib.suppress(QueryRefused):
            check(text)
            accepted.append(functools.partial(run, text))
    if accepted and (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
        os._exit(any(map(_fetches, accepted)))
    elif accepted:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGXCPU, -signal.SIGKILL), f"ended with {status}; 1: it fetched something"


def _fetches(run: Callable[[], Any]) -> bool:
    with contextlib.suppress(SyntaxError, ValueError, RuntimeError):
        try:
            result = run()
            if isinstance(result, Iterator):
                list(itertools.islice(result, 3))
        except OSError:
            return True
    return False


def _sparql_seeds() -> list[bytes]:
    from tinyfleet.ontology.queries import library

    fetches = [
        "SELECT * { SERVICE <http://127.0.0.1:9/> { ?s ?p ?o } }",
        "INSERT { ?s ?p ?o } WHERE { GRAPH ?g { ?s ?p 'a' } SERVICE <http://127.0.0.1:9/> { ?s ?p ?o } }",
        "LOAD <http://127.0.0.1:9/> INTO GRAPH <urn:g>",
        "PREFIX a: <http://127.0.0.1:> SELECT * { FILTER(?a < 1 || true) SERVICE a:9 { } }  # a comment",
    ]
    others = [
        "INSERT DATA { <urn:a> <urn:b> 'c' }",
        "ASK { FILTER((1 + !true) IN (1, 2)) OPTIONAL { ?a ^!<urn:b>* ?c } }",
    ]
    return [text.encode() for text in [*fetches, *others, *map(library.text, library.names()[:4])]]


@cache
def _endpoint() -> Any:
    from tinyfleet.ontology.http.access import Access
    from tinyfleet.ontology.http.connections import ConnectionLimits
    from tinyfleet.ontology.http.endpoint import Endpoint

    limits = ConnectionLimits(head_seconds=0.02, body_seconds=0.02)  # for what never ends
    return Endpoint(_store(), Access.open(), registry=_registry(), limits=limits)


def _http(data: bytes) -> None:
    """Raw bytes for the whole server: what it answers, if anything, is not that it failed."""
    port = urlsplit(_endpoint().address).port
    with socket.create_connection(("127.0.0.1", port), 5) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(data)
        answered = connection.recv(64)
        assert not answered.startswith(b"HTTP/1.1 500"), answered


def _http_seeds() -> list[bytes]:
    about = _description_seeds()[0]
    head = b"Host: localhost\r\nAccept: */*;q=0.9\r\nContent-Type: %s\r\nContent-Length: %d\r\n"
    requests = [
        (b"GET /sparql?query=ASK%20%7B%7D&default-graph-uri=urn:a", b"", b""),
        (b"POST /sparql", b"application/sparql-query", b"SELECT * { ?s ?p ?o } LIMIT 1"),
        (b"POST /sparql", b"application/x-www-form-urlencoded", b"update=DELETE%20WHERE%20%7B%3Ca%3A%3E%20a%20%3Fb%7D"),
        (b"GET /things?offset=0&limit=5&sort_by=id", b"", b""),
        (b"PUT /things/urn:tinyfleet:home:dev-1", b"application/td+json", about),
        (b"PATCH /things/urn:tinyfleet:home:dev-1", b"application/merge-patch+json", b'{"title": "x"}'),
        (b"DELETE /things/urn:tinyfleet:home:dev-1", b"", b""),
        (b"GET /search/jsonpath?query=$.title", b"", b""),
        (b"GET /login?code=abc", b"", b""),
    ]  # fmt: skip
    return [
        line + b" HTTP/1.1\r\n" + head % (kind, len(body)) + b"Cookie: a=b\r\nOrigin: http://x\r\n\r\n" + body
        for line, kind, body in requests
    ]


# ------------------------------------------------------------------------------------------------------- the table


def _corpus(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("seed_*"))]


def _nothing() -> Refusals:
    return ()


def _user_error() -> Refusals:
    from tinyfleet.edge.errors import UserError

    return (UserError,)


def _rejections() -> Refusals:
    from tinyfleet.ontology.ingest.description_parser import RejectedMessage

    return (RejectedMessage, *_user_error())


def _http_error() -> Refusals:
    from tinyfleet.ontology.http.request_handling import HttpError

    return (HttpError,)


def _model_errors() -> Refusals:
    from tinyfleet.edge.model.learner import LearnerError

    return (*_user_error(), LearnerError)


def _card_error() -> Refusals:
    from tinyfleet.ontology.ingest.model_card import ModelCardError

    return (ModelCardError, *_user_error())


# Worth putting into an input, besides random bytes.
_CBOR = (b"\xd8\x1c", b"\xd8\x1d", b"\x9f", b"\xbf", b"\xff", b"\xc2", b"\xfb", b"\x9b" + b"\xff" * 8, b"\xd8\x55")
_JSON = (
    *b"[ { ] } , : null true -1 0 1e999 NaN {} [] 65536 0.5 \\ud800 \\u001b".split(), b'"', b'"@id"', b'"@context"',
    b'"@type":', b"1" * 30, b"[" * 50, b'{"a":' * 50,
)  # fmt: skip
_ZIP = (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"\1\0", b"\xff\xff\xff\xff", b"\x08\0", b"\x0c\0", b"\x0e\0")
_NPY = (*_ZIP, b"|O", b"<f8", b"<U9999999", b"(1000000000,)", b"-1")
_TEXT = (
    *b"[ ( < \" ' \\ & * !!python/object:os.system @en ^^ %ff &query=".split(),
    b"\n",
    b"\xef\xbb\xbf",
    b"9" * 5000,
)
_HTTP = (b"\r\n", b"\r\n\r\n", b"%00", b"../", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 9\r\n", b"HTTP/1.0")
_SPARQL = (*b"SERVICE LOAD SILENT # { } ( ) ! && \\u0053ERVICE \\u0022 <a> a: ?a $s true ''' PREFIX".split(), b"(" * 60)
_NUMBERS = (b"\0", b"\1", b"\x7f", b"\xff", b"\xff\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x80")

_RDF_SEEDS = [b'@prefix a: <urn:a> .\na:b a:c 1.5 , "x"@en , (1 2) .\n', b'<urn:a> <urn:b> "c" .\n']
_CARD_SEEDS = [
    b"license: mit\ntinyfleet:\n  observes: [sound]\n  labels: [a, b]\n"
    b"model-index: [{results: [{metrics: [{type: accuracy, value: 0.9}]}]}]"
]
_REQUEST_SEEDS = [b"query=ASK%20%7B%7D&default-graph-uri=urn:a", b"text/turtle;q=0.5, */*"]

#: By name: how it decodes, what its users handle, valid inputs, bytes of the largest input, words.
TARGETS = {
    "messages": Target(_messages, _nothing, _message_seeds, 2048, _CBOR),
    "serial_line": Target(_frames, _nothing, _frame_seeds, 4096, (b"\0", b"\xff")),
    "addresses": Target(_broker_address, _user_error, lambda: [b"mqtts://me@[::1]:8883", b"localhost"], 300, _TEXT),
    "tokens": Target(_token, _user_error, _token_seeds, 1000, _JSON),
    "descriptions": Target(_ingest, _nothing, _description_seeds, 65_536, _JSON),
    "directory": Target(_put_description, _rejections, _description_seeds, 65_536, _JSON),
    "rdf": Target(_turtle, _user_error, lambda: _RDF_SEEDS, 8192, _TEXT),
    "model_card": Target(_model_card, _card_error, lambda: _CARD_SEEDS, 8192, _TEXT),
    "tflite": Target(_tflite, _model_errors, lambda: _corpus("tflite"), 16_384, _NUMBERS),
    "keras": Target(_keras, _model_errors, _keras_seeds, 16_384, _ZIP),
    "keras_description": Target(_keras_description, _model_errors, lambda: _corpus("keras"), 16_384, _JSON),
    "program": Target(_program, _model_errors, lambda: _corpus("load"), 2048, _NUMBERS),
    "parameters": Target(_parameters, _user_error, _parameter_seeds, 4096, _NPY),
    "http": Target(_http, _nothing, _http_seeds, 4096, (*_TEXT, *_HTTP)),
    "sparql": Target(_sparql, _nothing, _sparql_seeds, 8192, (*_TEXT, *_SPARQL)),
    "requests": Target(_parameters_of_requests, _http_error, lambda: _REQUEST_SEEDS, 4096, _TEXT),
}
