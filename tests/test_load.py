"""What mote_load must refuse, and what every call does with pointers that point to nothing: field by field."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import small_models
from nets import HEADER, OP, TENSOR, records_end, sealed

from tinyfleet.edge._mote import ffi, lib
from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.graph import Graph, Kind, Op, Tensor
from tinyfleet.edge.model.layers import Dense, build
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.model.program import Program

NONE = 0xFFFF
# fmt: off
HEADER_FIELDS = (
    "magic", "version", "header_size", "total_size", "crc", "tensors", "ops", "loss", "flags", "input", "logits",
    "output", "dlogits", "classes", "huber_delta", "params", "activations", "constants",
)
TENSOR_FIELDS = ("type", "zero_point", "h", "w", "c", "offset", "scale")
OP_FIELDS = (
    "kind", "flags", "layer", "reserved", "in", "in2", "out", "dout", "din", "din2", "kernel_h", "kernel_w", "pad_top",
    "pad_left", "stride_h", "stride_w", "dilation_h", "dilation_w", "option", "trained", "params", "constants",
)
# fmt: on


def edited(data: bytes, *changes: tuple[str, Mapping[str, Any]]) -> bytes:
    """A program with other fields: ("header", {...}), ("tensor 3", {...}), ("op 1", {field: value}), or bytes of
    constants: ("constants", {offset: bytes}); under a right checksum."""
    out = bytearray(data)
    n_tensors = HEADER.unpack_from(data)[5]
    for what, fields in changes:
        name, _, number = what.partition(" ")
        if name == "constants":
            for at, value in fields.items():
                start = records_end(data) + int(at)
                out[start : start + len(value)] = value
            continue
        form, names, start = {
            "header": (HEADER, HEADER_FIELDS, 0),
            "tensor": (TENSOR, TENSOR_FIELDS, HEADER.size + TENSOR.size * int(number or 0)),
            "op": (OP, OP_FIELDS, HEADER.size + TENSOR.size * n_tensors + OP.size * int(number or 0)),
        }[name]
        values = dict(zip(names, form.unpack_from(out, start), strict=True))
        assert fields.keys() <= values.keys()
        form.pack_into(out, start, *(values | fields).values())
    return sealed(bytes(out))


def load(data: bytes) -> tuple[int, Any]:
    """mote_load's result, and the model with what must be kept alive for it."""
    mote, program = ffi.new("mote_t *"), ffi.from_buffer(data)
    need = lib.mote_arena_bytes(program, len(data))
    arena = ffi.new("uint32_t[]", need // 4 + 1)
    return int(lib.mote_load(mote, program, len(data), arena, need)), (mote, program, arena)


def floats(kind: Kind, **fields: Any) -> Program:
    """An operation of single elements between two dense layers."""
    tensors = [Tensor((1, 1, 4))] * 4
    w = np.eye(4, dtype=np.float32)
    ops = (
        Op(Kind.DENSE, "a", (0,), 1, weights=w, trains="all"),
        Op(kind, "b", (1,), 2, **fields),
        Op(Kind.DENSE, "c", (2,), 3, weights=w, trains="all"),
    )
    return assemble(Graph(tuple(tensors), ops, 3, "mse"))


MODELS: dict[str, Program] = {name: make() for name, make in small_models.MODELS.items()} | {
    "leaky": floats(Kind.LEAKY_RELU, slope=0.5),
    "softmax": floats(Kind.SOFTMAX),
    "frozen": build([Dense(3)], (4,), None, weights={"dense_0/weights": np.ones((3, 4)), "dense_0/bias": np.ones(3)}),
}
PLACE, SLICE = 7, 2  # of "branches"
REFUSED: list[tuple[str, str, list[tuple[str, dict[str, Any]]]]] = [
    ("mlp", "another magic", [("header", {"magic": b"MOTa"})]),
    ("mlp", "another version", [("header", {"version": 1})]),
    ("mlp", "another header", [("header", {"header_size": 44})]),
    ("mlp", "no operations", [("header", {"ops": 0})]),
    ("mlp", "no tensors", [("header", {"tensors": 0})]),
    ("mlp", "too many tensors", [("header", {"tensors": 32768})]),
    ("mlp", "too many operations", [("header", {"ops": 32768})]),
    ("mlp", "an unknown flag", [("header", {"flags": 8})]),
    ("mlp", "parameters that are no whole words", [("header", {"params": 1090})]),
    ("mlp", "too many parameters", [("header", {"params": 0x20000000})]),
    ("mlp", "too many activations", [("header", {"activations": 0x20000000})]),
    ("mlp", "too many constants", [("header", {"constants": 0x20000000})]),
    ("mlp", "fewer constants than initial parameters", [("header", {"params": 1100})]),
    ("mlp", "no such input", [("header", {"input": 14})]),
    ("mlp", "an input that is computed", [("header", {"input": 1})]),
    ("mlp", "no such logits", [("header", {"logits": 14})]),
    ("mlp", "logits that are the input", [("header", {"logits": 0})]),
    ("mlp", "no such output", [("header", {"output": 14})]),
    ("mlp", "an output that is the input", [("header", {"output": 0})]),
    ("mlp", "an output of another size", [("header", {"output": 5})]),
    ("branches", "an output of another type", [("header", {"output": 1, "logits": 2})]),
    ("mlp", "no classes", [("header", {"classes": 0})]),
    ("mlp", "more classes than outputs", [("header", {"classes": 6})]),
    ("branches", "classes of an output that is an image", [("header", {"output": 6, "logits": 6, "classes": 2})]),
    ("frozen", "no loss, and another output", [("header", {"output": 0})]),
    ("int8_rest", "no loss, and a gradient", [("header", {"dlogits": 1})]),
    ("int8_rest", "a loss of int8", [("header", {"loss": 2})]),
    ("mlp", "a loss's gradient of another size", [("header", {"dlogits": 1})]),
    ("mlp", "a gradient that is missing", [("header", {"dlogits": NONE})]),
    ("branches", "a Huber delta of 0", [("header", {"huber_delta": 0.0})]),
    ("branches", "a Huber delta without end", [("header", {"huber_delta": float("inf")})]),
    ("frozen", "parameters that nobody trains", [("header", {"params": 4}), ("header", {"flags": 0})]),
    ("mlp", "a tensor of no type", [("tensor 1", {"type": 3})]),
    ("mlp", "a tensor of no elements", [("tensor 1", {"h": 0})]),
    ("mlp", "a tensor larger than all memory", [("tensor 1", {"h": 65535, "w": 65535})]),
    ("mlp", "an offset that is no whole word", [("tensor 1", {"offset": 2})]),
    ("mlp", "an offset behind the arena", [("tensor 1", {"offset": 4000})]),
    ("mlp", "an end behind the arena", [("tensor 1", {"offset": 160})]),
    ("mlp", "a second input of another type", [("tensor 1", {"type": 2, "offset": 0xFFFFFFFF})]),
    ("mlp", "a second input that is larger", [("tensor 1", {"offset": 0xFFFFFFFF})]),
    ("mlp", "something reserved", [("op 0", {"reserved": 1})]),
    ("mlp", "an operation's unknown flag", [("op 0", {"flags": 32})]),
    ("mlp", "no such tensor to read", [("op 0", {"in": 14})]),
    ("mlp", "no such second tensor", [("op 0", {"in2": 14})]),
    ("mlp", "the input to be written", [("op 0", {"out": 0})]),
    ("mlp", "a gradient of another size", [("op 1", {"dout": 9})]),
    ("branches", "a gradient in int8", [("op 1", {"dout": 1})]),
    ("mlp", "an input's gradient of another size", [("op 1", {"din": 9})]),
    ("mlp", "a gradient of a second input that does not exist", [("op 1", {"din2": 13})]),
    ("mlp", "weights that train alone", [("op 0", {"flags": 1})]),
    ("mlp", "layers in another order", [("op 0", {"layer": 1})]),
    ("mlp", "a first layer that does not begin the parameters", [("op 0", {"params": 4})]),
    ("mlp", "a layer that trains nothing", [("op 0", {"trained": 0})]),
    ("mlp", "more channels than there are", [("op 0", {"trained": 13})]),
    ("mlp", "something that cannot train", [("op 1", {"flags": 2, "trained": 12, "layer": 1})]),
    ("mlp", "a number of channels that do not train", [("op 1", {"trained": 1})]),
    ("mlp", "a layer's number without training", [("op 1", {"layer": 1})]),
    ("mlp", "fewer channels train than float32 can", [("op 0", {"trained": 11})]),
    ("mlp", "training without a gradient", [("op 0", {"dout": NONE})]),
    ("mlp", "an input's gradient from none", [("op 1", {"dout": NONE})]),
    ("branches", "a second input's gradient from none", [("op 5", {"dout": NONE, "din": NONE})]),
    ("branches", "a gradient through what has none", [(f"op {SLICE}", {"dout": 3})]),
    ("frozen", "a gradient without a loss", [("op 0", {"dout": 1})]),
    ("mlp", "a layer's parameters at no whole word", [("op 2", {"params": 434})]),
    ("mlp", "a layer's parameters behind the end", [("op 2", {"params": 4000})]),
    ("mlp", "a layer's parameters in another's", [("op 2", {"params": 428})]),
    ("mlp", "constants at no whole word", [("op 0", {"constants": 1090})]),
    ("biases", "constants behind the end", [("op 0", {"constants": 212})]),
    # kernels
    ("mlp", "a dense layer of images", [("tensor 1", {"h": 12, "c": 1}), ("op 0", {"trained": 1})]),
    ("mlp", "a dense layer of rows", [("tensor 1", {"w": 12, "c": 1}), ("op 0", {"trained": 1})]),
    ("growing", "a dense layer of int8", [("op 2", {"in": 1})]),
    ("growing", "a dense layer to int8", [("op 2", {"out": 1, "trained": 8})]),
    ("mlp", "an activation of another size", [("op 3", {"out": 1, "dout": 12, "in": 3})]),
    ("branches", "an activation of int8", [("op 9", {"in": 1, "din": NONE})]),
    ("leaky", "a slope below 0", [("constants", {160: struct.pack("<f", -1.0)})]),
    ("leaky", "a slope without end", [("constants", {160: struct.pack("<f", float("inf"))})]),
    ("leaky", "a slope that is missing", [("op 1", {"constants": 164})]),
    ("softmax", "a softmax over other channels", [("tensor 2", {"h": 2, "c": 2})]),
    ("branches", "a sum of one", [("op 5", {"in2": NONE, "din2": NONE})]),
    ("branches", "a sum with int8", [("op 5", {"in2": 1, "din2": NONE})]),
    ("branches", "a sum of other sizes", [("op 5", {"in2": 7, "din2": NONE})]),
    ("mlp", "a norm with an epsilon below 0", [("constants", {1092: struct.pack("<f", -1.0)})]),
    ("mlp", "a norm with an epsilon without end", [("constants", {1092: struct.pack("<f", float("inf"))})]),
    ("mlp", "a norm to other channels", [("tensor 5", {"h": 2, "c": 4}), ("op 4", {"trained": 4})]),
    ("branches", "a place of another type", [(f"op {PLACE}", {"in": 1, "din": NONE})]),
    ("branches", "a place below the end", [(f"op {PLACE}", {"pad_top": 1})]),
    ("branches", "a place right of the end", [(f"op {PLACE}", {"pad_left": 1})]),
    ("branches", "a place behind the last channel", [(f"op {PLACE}", {"option": 4})]),
    ("branches", "a slice to another type", [(f"op {SLICE}", {"in": 1})]),
    ("branches", "a slice from before the start", [("constants", {848: struct.pack("<i", -1)})]),
    ("branches", "a slice to behind the end", [("constants", {860: struct.pack("<i", 3)})]),
    ("cnn", "a kernel of nothing", [("op 0", {"kernel_h": 0})]),
    ("cnn", "a stride of 0", [("op 0", {"stride_w": 0})]),
    ("cnn", "a dilation of 0", [("op 0", {"dilation_h": 0})]),
    ("cnn", "a window in the padding alone", [("op 0", {"pad_top": 3})]),
    ("cnn", "a window behind the end", [("op 0", {"stride_w": 2})]),
    ("int8_rest", "a softmax of float32", [("tensor 7", {"type": 1}), ("op 6", {"out": 7})]),
    ("int8_rest", "a softmax to other channels", [("op 6", {"out": 5}), ("header", {"logits": 5, "output": 5})]),
    ("int8_rest", "a softmax of another number of places", [("tensor 6", {"h": 2})]),
    ("int8_rest", "a softmax without constants", [("op 6", {"constants": 400})]),
    ("int8_rest", "a softmax's difference above 0", [("constants", {404: struct.pack("<i", 1)})]),
    ("int8_rest", "a softmax's shift to the right", [("constants", {400: struct.pack("<i", -1)})]),
    ("int8_rest", "a softmax's shift beyond 32 bits", [("constants", {400: struct.pack("<i", 31)})]),
    ("int8_rest", "a product of one", [("op 3", {"in2": NONE})]),
    ("int8_rest", "a product of other sizes", [("op 3", {"in2": 0})]),
]


@pytest.mark.parametrize(("model", "what", "changes"), REFUSED, ids=[what for _, what, _ in REFUSED])
def test_a_program_with_one_field_wrong_is_refused(
    model: str, what: str, changes: list[tuple[str, dict[str, Any]]]
) -> None:
    data = MODELS[model].data
    assert load(data)[0] == lib.MOTE_OK
    wrong = edited(data, *changes)
    assert wrong != data
    assert load(wrong)[0] == lib.MOTE_ERR_FORMAT


@pytest.mark.parametrize(
    "changes", [("op 0", {"kind": 99}), ("op 0", {"kind": 0}), ("header", {"loss": 9})], ids=["kind", "no kind", "loss"]
)
def test_what_the_image_does_not_hold_is_told_apart(changes: tuple[str, dict[str, Any]]) -> None:
    assert load(edited(MODELS["mlp"].data, changes))[0] == lib.MOTE_ERR_UNSUPPORTED


def test_a_softmax_of_more_channels_than_its_sum_holds_is_refused() -> None:
    def softmax(channels: int) -> bytes:
        shape = (1, 1, channels)
        tensors = (Tensor(shape, "int8", 0.1), Tensor(shape, "int8", 1 / 256, -128))
        return assemble(Graph(tensors, (Op(Kind.INT8_SOFTMAX, "s", (0,), 1),), 1)).data

    code, (mote, *_keep) = load(softmax(4095))
    assert code == lib.MOTE_OK
    out = ffi.new("const void **")
    assert lib.mote_infer(mote, ffi.new("int8_t[]", 4095), out) == lib.MOTE_OK
    assert set(ffi.buffer(out[0], 4095)) == {b"\x80"}, "1 / 4095 rounds to 0"
    wrong = edited(
        softmax(4095), ("tensor 0", {"c": 4096}), ("tensor 1", {"c": 4096}), ("header", {"activations": 4096})
    )
    assert load(edited(wrong, ("header", {"classes": 4096})))[0] == lib.MOTE_ERR_FORMAT


def test_weights_that_no_memory_holds_are_refused() -> None:
    """Counts whose bytes do not fit 32 bits, in an input that the caller would have."""
    data = MODELS["mlp"].data
    wide = ("tensor 0", {"h": 1000, "w": 60, "c": 1000})
    assert load(edited(data, wide, ("op 0", {"in": 0})))[0] == lib.MOTE_ERR_FORMAT
    wider = ("tensor 0", {"h": 1, "w": 1, "c": 60000})
    assert load(edited(data, wider, ("op 0", {"in": 0})))[0] == lib.MOTE_ERR_FORMAT


def test_no_pointer_to_nothing_is_followed() -> None:
    data = MODELS["mlp"].data
    assert lib.mote_arena_bytes(ffi.NULL, len(data)) == 0
    code, (m, program, arena) = load(data)
    assert code == lib.MOTE_OK
    need = lib.mote_arena_bytes(program, len(data))
    assert lib.mote_load(m, program, len(data), ffi.NULL, need) == lib.MOTE_ERR_ARENA
    before = bytes(ffi.buffer(arena))
    x, target, loss, y = ffi.new("float[]", 8), ffi.new("float[]", 1), ffi.new("float *"), ffi.new("const void **")
    how, size = ffi.new("mote_sgd_t *", {"rate": 0.1}), ffi.new("size_t *")
    null = ffi.NULL
    for found in (
        lib.mote_infer(null, x, y),
        lib.mote_infer(m, null, y),
        lib.mote_infer(m, x, null),
        lib.mote_loss(null, x, target, loss, y),
        lib.mote_loss(m, null, target, loss, y),
        lib.mote_loss(m, x, null, loss, y),
        lib.mote_loss(m, x, target, null, y),
        lib.mote_loss(m, x, target, loss, null),
        lib.mote_learn(m, null, target, 0.1, loss),
        lib.mote_learn(m, x, null, 0.1, loss),
        lib.mote_learn(m, x, target, 0.1, null),
        lib.mote_learn_with(m, x, target, null, loss),
        lib.mote_learn_with(m, null, target, how, loss),
        lib.mote_layer(m, 0, null, size),
        lib.mote_layer(m, 0, size, null),
    ):
        assert found == lib.MOTE_ERR_ARGUMENT
    assert bytes(ffi.buffer(arena)) == before
    assert lib.mote_parameters(m, null) == ffi.cast("float *", arena)


def test_a_model_without_a_loss_has_none_to_tell_or_to_make_smaller() -> None:
    _, (m, *_keep) = load(MODELS["frozen"].data)
    x, target, loss, y = ffi.new("float[]", 4), ffi.new("float[]", 3), ffi.new("float *"), ffi.new("const void **")
    how = ffi.new("mote_sgd_t *", {"rate": 0.1})
    assert lib.mote_loss(m, x, target, loss, y) == lib.MOTE_ERR_FROZEN
    assert lib.mote_learn(m, x, target, 0.1, loss) == lib.MOTE_ERR_FROZEN
    assert lib.mote_learn_with(m, x, target, how, loss) == lib.MOTE_ERR_FROZEN
    assert lib.mote_grow(m) == lib.MOTE_ERR_FROZEN
    assert lib.mote_infer(m, x, y) == lib.MOTE_OK


def passing_on() -> list[tuple[str, int]]:
    """Every operation of the small models that only passes a gradient on, by model and number."""
    found = []
    for name, program in MODELS.items():
        n_tensors, n_ops = HEADER.unpack_from(program.data)[5:7]
        for i in range(n_ops):
            op = OP.unpack_from(program.data, HEADER.size + TENSOR.size * n_tensors + OP.size * i)
            if op[OP_FIELDS.index("din")] != NONE and op[OP_FIELDS.index("trained")] == 0:
                found.append((name, i))
    return found


@pytest.mark.parametrize(("name", "op"), passing_on(), ids=lambda value: str(value))
def test_a_gradient_that_nobody_wants_is_not_computed(name: str, op: int) -> None:
    """Whatever lies below gets none; what lies behind learns the same bits."""
    program = MODELS[name]
    cut = edited(program.data, (f"op {op}", {"din": NONE, "din2": NONE}))
    whole, part = MoteLearner(program), MoteLearner(Program.parse(cut))
    random = np.random.default_rng(1)
    x = random.integers(-100, 100, program.input_shape)
    x = x.astype(np.int8) if program.input.dtype == "int8" else (x / 64).astype(np.float32)
    y = np.zeros(lib.mote_targets(whole._mote), np.float32)
    assert whole.learn(x, y, 0.05) == part.learn(x, y, 0.05)
    behind = [i for i, at in enumerate(i for i, layer in enumerate(program.layers) if layer.trainable) if at > op]
    for layer in behind:
        assert layer_bytes(whole, layer) == layer_bytes(part, layer)


def layer_bytes(learner: MoteLearner, layer: int) -> bytes:
    first, count = ffi.new("size_t *"), ffi.new("size_t *")
    assert lib.mote_layer(learner._mote, layer, first, count) == lib.MOTE_OK
    return bytes(ffi.buffer(learner._mote.arena + 4 * first[0], 4 * count[0]))
