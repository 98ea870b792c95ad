"""int8 weights that train: the frozen kernels' bytes, the right steps on average, a network that learns in a budget."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import spoilt
from quantised_nets import Reference, digits, int8_tflite, keras_digits, quantised
from test_engine_native import CLANG, ENGINE, INCLUDE, ROOT, compiler, corpus, run

from tinyfleet.edge.errors import ProgramError
from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.graph import Graph, Kind, Op, Tensor
from tinyfleet.edge.model.learner import LearnerError, MoteLearner
from tinyfleet.edge.model.memory_plan import INT8_WEIGHTED, TRAINED_INT8, resource_use
from tinyfleet.edge.model.quantized import logistic_table
from tinyfleet.firmware_tools.compiler.quantized_training import (
    Importance,
    LayerUpdate,
    estimate_importance,
    measure_importance,
    select_all_from,
    select_update,
    train_int8,
)
from tinyfleet.firmware_tools.readers.common import CompileError, compact
from tinyfleet.firmware_tools.readers.keras_reader import read_keras
from tinyfleet.firmware_tools.readers.tflite_reader import read_tflite

# Graphs


def network(
    random: np.random.Generator, *, multiple: int = 1, pad: int = 1, stride: int = 1, pool: str = "MAX"
) -> Graph:
    """Convolution, depthwise, pointwise, a sum with what went in, pool, dense, softmax: all int8."""
    out = (6 + 2 * pad - 3) // stride + 1
    mid = (out, out, 4 * multiple)
    rows = out // 2
    int8 = [
        Tensor((6, 6, 2), "int8", 1 / 64, 3),
        Tensor((6, 6, 4), "int8", 0.03, -128),
        Tensor(mid, "int8", 0.04, -128),
        Tensor(mid, "int8", 0.05, -5),
        Tensor(mid, "int8", 0.05, -128),
        Tensor((rows, rows, mid[2]), "int8", 0.05, -128),
        Tensor((1, 1, rows * rows * mid[2]), "int8", 0.05, -128, view_of=5),
        Tensor((1, 1, 5), "int8", 0.1, 4),
        Tensor((1, 1, 5), "int8", 1 / 256, -128),
    ]

    def weighted(kind: Kind, name: str, at: int, out: int, shape: tuple[int, ...], **more: object) -> Op:
        channels = int8[out].shape[2]
        return Op(
            kind,
            name,
            (at,),
            out,
            weights=random.integers(-127, 128, shape).astype(np.int8),
            bias=random.integers(-300, 300, channels).astype(np.int32),
            weight_scales=random.uniform(0.002, 0.006, channels),
            **more,  # type: ignore[arg-type]
        )

    same = {"kernel": (3, 3), "strides": (1, 1), "dilation": (1, 1), "pads": (1, 1)}
    window = {**same, "strides": (stride, stride), "pads": (pad, pad)}
    one = {"kernel": (1, 1), "strides": (1, 1), "dilation": (1, 1)}
    ops = (
        weighted(Kind.INT8_CONV2D, "conv", 0, 1, (4, 3, 3, 2), **same),
        weighted(Kind.INT8_DEPTHWISE, "depthwise", 1, 2, (3, 3, mid[2]), **window),
        weighted(Kind.INT8_CONV2D, "pointwise", 2, 3, (mid[2], 1, 1, mid[2]), **one),
        Op(Kind.INT8_ADD, "sum", (2, 3), 4),
        Op(Kind[f"INT8_{pool}POOL"], "pool", (4,), 5, kernel=(2, 2), strides=(2, 2), dilation=(1, 1)),
        weighted(Kind.INT8_DENSE, "dense", 6, 7, (5, int8[6].size)),
        Op(Kind.INT8_SOFTMAX, "softmax", (7,), 8),
    )
    return Graph(tuple(int8), ops, 8)


NETWORKS = st.fixed_dictionaries(
    {
        "multiple": st.integers(1, 2),
        "pad": st.integers(0, 1),
        "stride": st.integers(1, 2),
        "pool": st.sampled_from(["MAX", "AVG"]),
    }
)
LAYERS = {"conv": 4, "depthwise": 4, "pointwise": 4, "dense": 5}


@st.composite
def selections(draw: st.DrawFn) -> dict[str, LayerUpdate]:
    chosen = draw(st.sets(st.sampled_from(sorted(LAYERS)), min_size=1))
    return {
        name: LayerUpdate(draw(st.sampled_from(["bias", "all"])), draw(st.integers(1, LAYERS[name])))  # type: ignore[arg-type]
        for name in sorted(chosen)
    }


SEEDS = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def image(random: np.random.Generator) -> np.ndarray:
    return random.integers(-128, 128, (6, 6, 2)).astype(np.int8)


def frozen(graph: Graph) -> Graph:
    """The same with the kernels of a model that only runs."""
    kinds = dict(zip(TRAINED_INT8, INT8_WEIGHTED, strict=True))
    ops = tuple(replace(op, kind=kinds.get(op.kind, op.kind), trains="nothing", trained=None) for op in graph.ops)
    return replace(graph, ops=ops)


def integers(graph: Graph, parameters: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A learner's parameters as int8 weights and int32 biases of the channels that train, by layer."""
    found, at = {}, 0
    for op in graph.ops:
        if op.trains == "nothing":
            continue
        assert op.trained is not None and op.weights is not None and op.weight_scales is not None
        depthwise, w = op.kind == Kind.TRAINED_INT8_DEPTHWISE, np.zeros(0)
        scales = op.weight_scales[: op.trained].astype(np.float32)
        if op.trains == "all":
            shape = (*op.weights.shape[:2], op.trained) if depthwise else (op.trained, *op.weights.shape[1:])
            size = int(np.prod(shape))
            w = parameters[at : at + size].reshape(shape)
            w = w / (scales if depthwise else scales.reshape(-1, *[1] * (len(shape) - 1)))
            at += size
        b = parameters[at : at + op.trained] / (np.float32(graph.tensors[op.inputs[0]].scale) * scales)
        at += op.trained
        found[op.name] = (np.round(w).astype(np.int64), np.round(b).astype(np.int64))
    assert at == len(parameters)
    return found


def expected(graph: Graph, reference: Reference, rate: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Where the weights and biases of the channels that train should come to, before rounding and saturation."""
    found = {}
    for op in graph.ops:
        if op.trains == "nothing":
            continue
        (dw, db), w = reference.steps(rate)[op.name], reference.weights[op.name]
        last = op.kind == Kind.TRAINED_INT8_DEPTHWISE
        w = (w + dw)[..., : op.trained] if last else (w + dw)[: op.trained]
        found[op.name] = (w if op.trains == "all" else np.zeros(0), (reference.biases[op.name] + db)[: op.trained])
    return found


# Kernels


@QUICK
@given(shape=NETWORKS, selection=selections(), seed=SEEDS)
def test_what_trains_computes_what_the_frozen_kernels_do(shape, selection, seed):
    random = np.random.default_rng(seed)
    graph = train_int8(network(random, **shape), selection)
    trains, runs = MoteLearner(assemble(graph)), MoteLearner(assemble(frozen(graph)))
    for _ in range(3):
        x = image(random)
        assert trains.infer(x).tobytes() == runs.infer(x).tobytes()


@QUICK
@given(shape=NETWORKS, selection=selections(), seed=SEEDS)
def test_a_step_is_the_float64_step_rounded_up_or_down(shape, selection, seed):
    random = np.random.default_rng(seed)
    graph = train_int8(network(random, **shape), selection)
    learner, reference = MoteLearner(assemble(graph)), Reference(graph)
    x, label = image(random), int(random.integers(5))
    rate = 0.005
    reference.gradient(x, label)
    learner.learn(x, float(label), rate)
    for name, wanted in expected(graph, reference, rate).items():
        for got, want, most in zip(integers(graph, learner.parameters)[name], wanted, (127, 2**31 - 1), strict=True):
            slack = 1e-5 * np.abs(want) + 1e-3  # float32's
            assert np.all(got >= np.clip(np.floor(want - slack), -most, most)), name
            assert np.all(got <= np.clip(np.ceil(want + slack), -most, most)), name


def test_the_mean_of_many_steps_is_the_float64_step():
    random = np.random.default_rng(5)
    graph = train_int8(network(random), "conv")
    learner, reference = MoteLearner(assemble(graph)), Reference(graph)
    x, label, rate, count = image(random), 2, 0.0005, 2000
    reference.gradient(x, label)
    start = learner.parameters
    total: dict[str, list[np.ndarray]] = {}
    for _ in range(count):
        learner.set_parameters(start)
        learner.learn(x, label, rate)
        for name, parts in integers(graph, learner.parameters).items():
            so_far = total.setdefault(name, [np.zeros(part.shape) for part in parts])
            for sums, part in zip(so_far, parts, strict=True):
                sums += part
    moved = 0
    for name, wanted in expected(graph, reference, rate).items():
        for sums, want, most in zip(total[name], wanted, (127, 2**31 - 1), strict=True):
            inside = np.abs(want) < most - 1
            error = (sums / count - want)[inside]
            # A rounding's deviation is at most 1/2, and the mean's 1 / (2 sqrt(count)): within five of them.
            assert np.abs(error).max() < 5 / (2 * np.sqrt(count)), name
            assert abs(error.mean()) < 5 / (2 * np.sqrt(count * error.size)), name
            moved += int((np.abs(want - np.round(want)) > 0.05).sum())
    assert moved > 100  # most of them lie between two integers


def test_masks_say_what_moves():
    random = np.random.default_rng(7)
    graph = train_int8(network(random), "conv")
    learner = MoteLearner(assemble(graph))
    before = integers(graph, learner.parameters)
    learner.mask, learner.biases_only = 0b0110, 0b0010  # depthwise: its bias; pointwise: all
    learner.learn(image(random), 1, 0.05)
    after = integers(graph, learner.parameters)
    moves = {
        name: tuple(bool((a != b).any()) for a, b in zip(before[name], after[name], strict=True)) for name in before
    }
    assert moves == {
        "conv": (False, False), "depthwise": (False, True), "pointwise": (True, True), "dense": (False, False),
    }  # fmt: skip


def test_two_learners_move_alike_and_weights_keep_to_127():
    random = np.random.default_rng(8)
    graph = train_int8(network(random), "conv")
    one, other = MoteLearner(assemble(graph)), MoteLearner(assemble(graph))
    for _ in range(30):
        x, y = image(random), int(random.integers(5))
        one.learn(x, y, 5.0)
        other.learn(x, y, 5.0)
    assert one.parameters.tobytes() == other.parameters.tobytes()
    assert all(np.abs(w).max() <= 127 for w, _ in integers(graph, one.parameters).values())


def test_what_float32_training_has_besides_is_refused():
    graph = train_int8(network(np.random.default_rng(0)), "dense")
    learner = MoteLearner(assemble(graph), clip_norm=1.0)
    with pytest.raises(LearnerError):
        learner.learn(image(np.random.default_rng(1)), 0, 0.1)


def two_ways(kind: Kind | None) -> Graph:
    """A dense layer that trains, the sum of its output with what an operation that changes nothing makes of it, and the
    sum of that with the output again. None: without the operation."""
    random = np.random.default_rng(4)
    one = {} if kind == Kind.INT8_MEAN else {"kernel": (1, 1), "strides": (1, 1), "dilation": (1, 1)}
    tensors = (
        Tensor((1, 1, 6), "int8", 1 / 64, 3),
        *[Tensor((1, 1, 4), "int8", 0.05, -5)] * 2,
        Tensor((1, 1, 4), "int8", 0.1, -5),
        Tensor((1, 1, 4), "int8", 0.2, -5),
        Tensor((1, 1, 4)),
    )
    dense = Op(
        Kind.TRAINED_INT8_DENSE,
        "dense",
        (0,),
        1,
        weights=random.integers(-127, 128, (4, 6)).astype(np.int8),
        bias=random.integers(-300, 300, 4).astype(np.int32),
        weight_scales=random.uniform(0.004, 0.006, 4),
        trains="all",
        trained=4,
    )
    same = () if kind is None else (Op(kind, "same", (1,), 2, **one),)  # type: ignore[arg-type]
    ends = (
        Op(Kind.INT8_ADD, "sum", (1, 2 if same else 1), 3),
        Op(Kind.INT8_ADD, "again", (3, 1), 4),
        Op(Kind.DEQUANTIZE, "logits", (4,), 5),
    )
    return compact(Graph(tensors, (dense, *same, *ends), 5, "softmax_cross_entropy"))


def dequantised_twice(times: int) -> Graph:
    """The same dense layer, of whose output one dequantisation or two go into a sum."""
    whole = two_ways(None)
    tensors = (*whole.tensors[:2], *[Tensor((1, 1, 4))] * (times + 1))
    ops = [whole.ops[0], *(Op(Kind.DEQUANTIZE, f"out{i}", (1,), 2 + i) for i in range(times))]
    return replace(
        whole,
        tensors=tensors,
        ops=(*ops, Op(Kind.ADD, "sum", (2, 1 + times), 2 + times)),
        output=2 + times,
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [(two_ways(None), two_ways(kind)) for kind in (Kind.INT8_MAXPOOL, Kind.INT8_AVGPOOL, Kind.INT8_MEAN)]
    + [(dequantised_twice(1), dequantised_twice(2))],
    ids=["maximum", "average", "mean", "dequantise"],
)
def test_a_gradient_that_comes_by_several_ways_is_their_sum(one, other):
    """Ways through operations that change nothing teach the same bits as the direct ones."""
    learners = MoteLearner(assemble(one)), MoteLearner(assemble(other))
    before = learners[0].parameters
    random = np.random.default_rng(5)
    for step in range(20):
        x = random.integers(-128, 128, 6).astype(np.int8)
        assert learners[0].learn(x, step % 4, 0.05) == learners[1].learn(x, step % 4, 0.05)
    assert learners[0].parameters.tobytes() == learners[1].parameters.tobytes() != before.tobytes()


def test_a_bias_that_would_leave_32_bits_stays_at_their_end():
    graph = two_ways(None)
    learner = MoteLearner(assemble(graph))
    ends = np.float32(2**31 - 1) * graph.ops[0].weight_scales / 64  # of the biases: the input's scale is 1/64
    for sign in (1, -1):
        for label in range(4):
            parameters = learner.parameters
            parameters[-4:] = sign * ends
            learner.set_parameters(parameters)
            learner.learn(np.full(6, 100, np.int8), label, 1e6)
            biases = learner.parameters[-4:]
            assert (abs(biases) <= ends * (1 + 1e-6)).all()
            assert np.isclose(biases, sign * ends, rtol=1e-2).all()  # none has wrapped round


# Programs


def programs(count: int) -> list[bytes]:
    """Of all shapes and selections, the same at every run."""
    random = np.random.default_rng(11)
    found = []
    for i in range(count):
        graph = network(
            random, multiple=1 + i % 2, pad=i // 2 % 2, stride=1 + i // 4 % 2, pool="MAX" if i % 3 else "AVG"
        )
        names = [name for name in LAYERS if random.random() < 0.6] or ["conv"]
        updates = {
            n: LayerUpdate("all" if random.random() < 0.7 else "bias", int(random.integers(1, LAYERS[n] + 1)))
            for n in names
        }
        found.append(assemble(train_int8(graph, updates)).data)
    return found


def test_compilers_agree_and_sanitizers_find_nothing_in_good_and_hostile_programs(tmp_path):
    good = programs(24)
    bad = list(spoilt(good[1]))[::20]
    outputs = []
    for cc, flags in (
        (("gcc",), ["-O3", "-march=native"]),
        (CLANG, ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]),
    ):
        command = [compiler(*cc), "-std=c99", "-ffp-contract=off", *flags, *INCLUDE, ROOT / "tests/c/programs.c"]
        run([*command, *ENGINE, "-o", tmp_path / "programs"])
        file = corpus(tmp_path / "corpus", good + bad if outputs else good)
        outputs.append(run([tmp_path / "programs", file, "5"]).splitlines())
    assert outputs[0] == outputs[1][: len(good)]
    assert len(set(outputs[0])) == len(good) and all(line.startswith("0 ") for line in outputs[0])
    assert len(outputs[1]) == len(good) + len(bad)
    assert sum(line.startswith("-") for line in outputs[1]) > len(bad) / 3


def test_a_hostile_program_is_refused():
    graph = network(np.random.default_rng(3))
    data = assemble(train_int8(graph, {"conv": LayerUpdate("all", 2), "depthwise": LayerUpdate("bias", 3)})).data
    tensors, ops = struct.unpack_from("<HH", data, 16)
    conv = 48 + 16 * tensors
    depthwise = conv + 40
    constants = struct.unpack_from("<I", data, conv + 36)[0] + conv + 40 * ops
    changes = {
        "more channels train than have room": (conv + 30, struct.pack("<H", 4)),
        "none of them": (conv + 30, struct.pack("<H", 0)),
        "parameters beyond the end": (depthwise + 32, struct.pack("<I", 1 << 20)),
        "parameters that are not aligned": (depthwise + 32, struct.pack("<I", 2)),
        "constants beyond the end": (depthwise + 36, struct.pack("<I", 1 << 20)),
        "a kernel that is too large": (conv + 16, struct.pack("<H", 60000)),
        "a shift out of range": (constants + 4 + 8, struct.pack("<i", 40)),
        "a scale that is 0": (constants + 4 + 12 * 4, struct.pack("<f", 0.0)),
        "a scale that is not a number": (constants + 4 + 12 * 4 + 4, struct.pack("<f", float("nan"))),
        "no flag that int8 trains": (21, bytes([data[21] & ~4])),
    }

    def load(where: int, value: bytes) -> None:
        changed = bytearray(data)
        changed[where : where + len(value)] = value
        struct.pack_into("<I", changed, 12, zlib.crc32(changed[16:]))
        MoteLearner(bytes(changed))

    load(0, b"MOTE")
    for what, change in changes.items():
        with pytest.raises((LearnerError, ProgramError)):
            load(*change)
            pytest.fail(what)


# Graphs


def test_a_new_head_begins_at_zero_and_learns():
    random = np.random.default_rng(9)
    graph = train_int8(network(random), "dense", classes=3)
    learner = MoteLearner(assemble(graph))
    x = [image(random) for _ in range(3)]
    assert np.allclose(learner.infer(x[0]), 1 / 3)
    for _ in range(60):
        for label in range(3):
            learner.learn(x[label], label, 0.01)
    assert [int(learner.infer(sample).argmax()) for sample in x] == [0, 1, 2]


def test_a_logistic_end_goes_into_its_loss():
    graph = network(np.random.default_rng(0))
    logits, out = graph.tensors[7], graph.tensors[8]
    end = Op(Kind.INT8_TABLE, "end", (7,), 8, table=logistic_table(logits, out))
    graph = replace(graph, ops=(*graph.ops[:-1], end))
    kinds = [op.kind for op in train_int8(graph, "dense", loss="binary_cross_entropy").ops[-2:]]
    assert kinds == [Kind.TRAINED_INT8_DENSE, Kind.DEQUANTIZE]
    with pytest.raises(CompileError, match=r"'end' \(INT8_TABLE\) passes no gradient"):
        train_int8(graph, "dense")


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("nowhere", "no int8 layer 'nowhere'; there are conv, depthwise, pointwise, dense"),
        ({"sum": LayerUpdate("all", 1)}, "no int8 layer 'sum'"),
        ({"conv": LayerUpdate("all", 5)}, "'conv' has 4 channels; 5 cannot train"),
        ({}, "nothing trains"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(selection, message):
    with pytest.raises(CompileError, match=message):
        train_int8(network(np.random.default_rng(0)), selection)


@QUICK
@given(
    shape=NETWORKS,
    budgets=st.lists(st.integers(700, 6000), min_size=2, max_size=2).map(sorted),
    classes=st.sampled_from([None, 3]),
)
def test_a_choice_keeps_to_its_budget_and_more_memory_is_not_worth_less(shape, budgets, classes):
    graph = network(np.random.default_rng(0), **shape)
    worths = []
    for budget in budgets:
        try:
            selection = select_update(graph, budget, classes=classes)
        except CompileError as error:
            assert not worths and "too small" in str(error)
            continue
        chosen = train_int8(graph, selection, classes=classes)
        program = assemble(chosen)
        assert program.arena_bytes == resource_use(chosen).arena <= budget
        assert MoteLearner(program).ram_bytes <= budget
        assert selection == select_update(graph, budget, classes=classes)
        worth = estimate_importance(train_head(graph, classes))
        worths.append(sum(worth[name].of(update) for name, update in selection.items()))
    assert worths == sorted(worths)


def train_head(graph: Graph, classes: int | None) -> Graph:
    """The graph with its loss, as it is before anything trains."""
    return frozen(train_int8(graph, "dense", classes=classes))


def test_what_is_told_to_be_important_is_chosen():
    graph = network(np.random.default_rng(0))
    worth = {name: Importance(np.zeros(LAYERS[name]), np.zeros(LAYERS[name])) for name in LAYERS}
    worth["pointwise"].weights[0] = 1.0
    all_of_it = resource_use(train_int8(graph, select_all_from(graph, "conv"))).arena
    assert select_update(graph, all_of_it, worth)["pointwise"] == LayerUpdate("all", 1)


# A network that learns


@pytest.fixture(scope="module")
def classifier():
    """A Keras model, and the same as an int8 graph; digits, and mirrored ones in both types."""
    pytest.importorskip("tensorflow", reason="converts with TensorFlow, which is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn has the digits")
    x, y, test_x, test_y = digits()
    model = keras_digits(x, y)
    graph = read_tflite(int8_tflite(model, x))
    mirrored = [np.ascontiguousarray(part[:, :, ::-1]) for part in (x, test_x)]
    return model, graph, mirrored, [quantised(graph, part) for part in mirrored], (y, test_y)


def accuracy(learner, x, y) -> float:
    return float(np.mean([learner.infer(sample).argmax() == label for sample, label in zip(x, y, strict=True)]))


def taught(graph, x, y, rate=0.01, epochs=2):
    learner = MoteLearner(assemble(graph))
    for _ in range(epochs):
        for sample, label in zip(x, y, strict=True):
            learner.learn(sample, label, rate)
    return learner


def test_int8_learns_as_float32_does_and_a_part_of_it_within_a_budget(classifier):
    model, graph, (x, test_x), (q, test_q), (y, test_y) = classifier
    whole = train_int8(graph, graph.ops[0].name)
    before = accuracy(MoteLearner(assemble(whole)), test_q, test_y)
    in_float = accuracy(taught(read_keras(model), x, y), test_x, test_y)
    in_int8 = accuracy(taught(whole, q, y), test_q, test_y)
    budget = 2 * resource_use(whole).arena // 5
    part = train_int8(graph, select_update(graph, budget))
    in_part = accuracy(taught(part, q, y), test_q, test_y)
    assert before < 0.6
    assert in_float > 0.9
    assert in_int8 > in_float - 0.03
    assert resource_use(part).arena <= budget and in_part > before + 0.3


def test_without_scaling_the_rates_of_float32_move_nothing(classifier):
    _, graph, _, (q, test_q), (y, test_y) = classifier
    whole = train_int8(graph, graph.ops[0].name)

    def right(reference: Reference) -> float:
        return float(np.mean([reference.forward(test_q[i]).argmax() == test_y[i] for i in range(200)]))

    def learned(*, scaled: bool) -> float:
        reference = Reference(whole, scaled=scaled)
        for i in range(300):
            reference.learn(q[i], int(y[i]), 0.01)
        return right(reference)

    before = right(Reference(whole))
    assert abs(learned(scaled=False) - before) < 0.05
    assert learned(scaled=True) > before + 0.3


def test_measured_importance_is_the_squared_gradients(classifier):
    _, graph, _, (q, _), (y, _) = classifier
    reference = Reference(train_int8(graph, graph.ops[0].name))
    squares: dict[str, list[np.ndarray]] = {}
    for i in range(60):
        reference.gradient(q[i], int(y[i]))
        for name, parts in reference.found.items():
            so_far = squares.setdefault(name, [np.zeros(part.shape) for part in parts])
            for total, part in zip(so_far, parts, strict=True):
                total += part**2
    found = measure_importance(graph, q[:60], y[:60])
    assert found.keys() == squares.keys()
    for name, importance in found.items():  # activations in float32 are not quite those in int8
        weights, bias = squares[name]
        assert importance.weights.sum() == pytest.approx(weights.sum(), rel=0.3)
        assert np.corrcoef(importance.bias, bias)[0, 1] > 0.9
    budget = resource_use(train_int8(graph, graph.ops[0].name)).arena // 2
    assert resource_use(train_int8(graph, select_update(graph, budget, found))).arena <= budget
    assert measure_importance(graph, q[:20], y[:20] % 3, classes=3)[graph.ops[0].name].weights.sum() > 0
