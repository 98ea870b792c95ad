"""The meta-training backend: the same numbers as the engine, the devices and the strategies."""
# ruff: noqa: F811

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from flwr.app import ArrayRecord, ConfigRecord, Message
from numpy.typing import NDArray
from plain_commands import plain
from test_grid_fleet import Start, devices  # noqa: F401

from tinyfleet.__main__ import cli
from tinyfleet.edge import datasets, tasks
from tinyfleet.edge.device.flower_client import serve
from tinyfleet.edge.device.node import Node, Publish
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.layers import (
    AvgPool2D,
    Conv2D,
    Dense,
    DepthwiseConv2D,
    Flatten,
    LayerNorm,
    MaxPool2D,
    ReLU,
    ReLU6,
    Sigmoid,
    Tanh,
    build,
)
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import Episodes, omniglot
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.chunks import chunks
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase, Sha256, TrainTask, UpdateFormat
from tinyfleet.edge.wire.flower_records import arrays_to_vector, vector_to_arrays
from tinyfleet.edge.wire.messages import Metrics, Success, decode_reply
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.edge.wire.updates import apply_update
from tinyfleet.server.evaluate import few_shot
from tinyfleet.server.flower.grid import MqttGrid, RunGrid
from tinyfleet.server.flower.internals import new_run, stamp
from tinyfleet.server.flower.strategies import Reptile, TinyMetaFed, TinyReptile
from tinyfleet.server.flower.strategies.reptile import task_seed
from tinyfleet.server.named_strategies import StrategyOptions, limit_clients, make_strategy

meta = pytest.importorskip(
    "tinyfleet.server.simulator", reason="meta-training needs Keras: pip install 'tinyfleet[keras]'"
)

DIGITS = tasks.load("digits")
FLEET = 12
CONV = build(
    [
        Conv2D(4, 3, padding="same"), ReLU(), MaxPool2D(2),
        DepthwiseConv2D(3, 2, padding="same", multiplier=2), ReLU6(), AvgPool2D(3, 2, padding="same"),
        Conv2D(3, (2, 1)), Sigmoid(), Flatten(), Dense(5),
    ],
    (12, 10, 2),
    "softmax_cross_entropy",
)  # fmt: skip
SINE = build([Dense(16), Tanh(), Dense(16), Tanh(), Dense(1)], (1,), "mse")
ALONE = meta.Backend(SINE, exact=True)
PHASES = [Phase(2, 3, 0.05), Phase(ALL_LAYERS, 8, 0.02)]


def clients(program: Program, count: int, samples: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[Any]]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, samples, *program.input_shape)).astype(np.float32)
    if program.loss == "mse":
        return x, np.sin(3 * x)
    return x, random.integers(0, program.output_shape[0], (count, samples))


@pytest.fixture(scope="module")
def digits() -> Any:
    return meta.Backend(DIGITS.program)


@pytest.fixture(scope="module")
def exact() -> Any:
    return meta.Backend(DIGITS.program, exact=True)


@pytest.mark.parametrize("program", [CONV, SINE], ids=["conv", "sine"])
def test_clients_learn_what_the_engine_learns(program: Program) -> None:
    """All layers, under masks; each client from a start of its own."""
    x, y = clients(program, 3, 7)
    starts = np.stack([program.initial(seed) for seed in range(3)])
    learned = meta.Backend(program).adapt(starts, x, y, PHASES)
    for c in range(3):
        learner = MoteLearner(program)
        learner.set_parameters(starts[c])
        every_layer, at, losses = learner.mask, 0, []
        for phase in PHASES:
            learner.mask = phase.layers & every_layer
            for _ in range(phase.steps):
                losses.append(learner.learn(x[c, at % 7], y[c, at % 7], phase.rate))
                at += 1
        np.testing.assert_allclose(learned.parameters[c], learner.parameters, atol=2e-6)
        np.testing.assert_allclose(learned.losses[c], losses, atol=1e-5)
        outputs = meta.Backend(program, exact=True).predict(learned.parameters[c : c + 1], x[c : c + 1])[0]
        np.testing.assert_allclose(outputs, [learner.infer(sample) for sample in x[c]], atol=1e-5)


def test_a_batch_is_the_mean_of_its_samples() -> None:
    x, y = clients(SINE, 2, 4)
    start, step = SINE.initial(1), [Phase(ALL_LAYERS, 1, 0.1)]
    together = meta.Backend(SINE).adapt(start, x, y, step, batch=4).parameters
    one_each = [ALONE.adapt(start, x[:, i : i + 1], y[:, i : i + 1], step).parameters for i in range(4)]
    np.testing.assert_allclose(together, np.mean(one_each, 0), atol=1e-6)


# Against the strategies, over C nodes


class Nodes(RunGrid):
    """A fleet of C nodes in this process, that a strategy's messages are carried to."""

    def __init__(self) -> None:
        super().__init__(new_run(1))

    def get_node_ids(self) -> Iterable[int]:
        return range(FLEET)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        messages = list(messages)
        for message in messages:
            stamp(message)
        return [serve(m, "train", DIGITS, m.metadata.dst_node_id, FLEET) for m in messages]


def flower_rounds(strategy: Reptile, start: NDArray[np.float32], rounds: int) -> NDArray[np.float32]:
    grid, arrays = Nodes(), vector_to_arrays(start, DIGITS.program)
    for number in range(1, rounds + 1):
        messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
        new, _ = strategy.aggregate_train(number, grid.send_and_receive(messages))
        assert new is not None
        arrays = new
    return arrays_to_vector(arrays, DIGITS.program)


def ours(name: str) -> tuple[Reptile, Any]:
    how = replace(meta.strategy_settings(name, DIGITS, clients=4), alpha=0.8)
    rate, steps = how.phases[-1].rate, how.phases[-1].steps
    if name == "tinymetafed":
        strategy: Reptile = TinyMetaFed(
            rounds=2, alpha=0.8, beta=rate, steps=steps, local=2, local_steps=how.phases[0].steps,
            density=how.update.density,
            clients=4, seed=3,
        )  # fmt: skip
    elif name == "tinyreptile":
        strategy = TinyReptile(alpha=0.8, beta=rate, steps=steps, seed=3)
    else:
        strategy = Reptile(alpha=0.8, beta=rate, steps=steps, clients=4, seed=3)
    return strategy, how


@pytest.mark.parametrize("name", ["reptile", "tinyreptile", "tinymetafed"])
def test_rounds_are_those_of_the_strategy_over_c_nodes(name: str, digits: Any, exact: Any) -> None:
    """With the engine to the bit, compiled to rounding."""
    strategy, how = ours(name)
    start = meta.initial_parameters(DIGITS.program, how)
    fleet = flower_rounds(strategy, start, rounds=2)
    source = meta.simulated_fleet(DIGITS, FLEET)
    bits = meta.simulate(exact, source, how, start, rounds=2, seed=3).parameters
    np.testing.assert_array_equal(bits, fleet)
    compiled = meta.simulate(digits, source, how, start, rounds=2, seed=3).parameters
    apart = np.abs(compiled - fleet)
    if name == "tinymetafed":  # rounding may decide which of two nearly equal changes is sent
        assert np.mean(apart > 1e-4) < 0.01
    else:
        assert apart.max() < 1e-4
    assert np.abs(fleet - start).max() > 0.01


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("density", [0.01, 0.3, 0.999, 1.0])
def test_updates_and_their_bytes_are_those_of_a_node(density: float, half: bool) -> None:
    """Many changes are equal, some are 0; a layer stays at home."""
    random = np.random.default_rng(0)
    n = DIGITS.program.n_params
    start = random.normal(size=n).astype(np.float32)
    learned = start + np.round(random.normal(size=(3, n)), 1).astype(np.float32) * (random.random((3, n)) < 0.5)
    how = UpdateFormat(shared=ALL_LAYERS & ~2, half=half, density=density)
    shared = meta.network(DIGITS.program).in_layers(how.shared)
    metrics = Metrics(0, 0.0, 0, 0, 0.0, DIGITS.program.arena_bytes)
    received, sizes = meta.traffic.received_updates(start, learned, how, shared, metrics)
    for mine, size, vector in zip(received, sizes, learned, strict=True):
        replies = node_replies(start, vector, how)
        np.testing.assert_array_equal(mine, apply_update(start, map(as_success, replies)))
        assert size == sum(map(len, replies))


def node_replies(start: NDArray[np.float32], learned: NDArray[np.float32], how: UpdateFormat) -> list[bytes]:
    """What the C node sends if its learner has learned this."""

    class Learned(MoteLearner):
        @property
        def parameters(self) -> NDArray[np.float32]:
            return learned

    topics, stream = Topics("home"), DatasetStream(DIGITS.client(0, 1))
    node = Node("home", "one", {}, DIGITS.program, stream, learner=Learned)
    task = TrainTask(1 << 20, "train", 1, 1, DIGITS.program.model_id, 1, (), 0, how, Sha256.of(start.tobytes()))
    node.receive(topics.command("one"), plain(task))
    for i, chunk in enumerate(chunks(start.tobytes())):
        node.receive(topics.weights(1, 1, i), chunk)
    while node.step():
        pass
    return [out.payload for out in node.poll() if isinstance(out, Publish) and out.topic == topics.reply("one")]


def as_success(payload: bytes) -> Success:
    reply = decode_reply(payload)
    assert isinstance(reply, Success)
    return reply


@pytest.mark.parametrize(
    ("name", "density"),
    [("reptile", None), ("tinymetafed", None), ("tinymetafed", 0.999), ("fomaml", None), ("fedprox", None)],
)
def test_bytes_are_those_that_real_devices_and_a_broker_carry(
    name: str, density: float | None, broker: BrokerAddress, devices: Start, digits: Any, exact: Any
) -> None:
    """Two rounds of the strategy that `tinyfleet run start` has for it; what is learned is the same, too."""
    devices(FLEET, task=DIGITS)
    count, seed, number = 3, 5, itertools.count(1)
    strategy = make_strategy(name, DIGITS, rounds=2, clients=count, seed=seed, options=StrategyOptions(density=density))
    how = meta.strategy_settings(name, DIGITS, clients=count)
    if density is not None:
        how = replace(how, update=replace(how.update, density=density))
    start = meta.initial_parameters(DIGITS.program, how)
    with MqttGrid(broker, "test", DIGITS.program, resend_interval=60) as grid:  # a busy machine is not asked twice
        nodes = sorted(grid.wait_for_nodes(FLEET, 20))
        limit_clients(strategy.strategy, count, FLEET)
        carried: list[tuple[int, int]] = []

        def ended(server_round: int, _: ArrayRecord) -> None:
            carried.append((grid.traffic.bytes_up, grid.traffic.bytes_down))

        config = ConfigRecord(dict(strategy.train_config))
        arrays = vector_to_arrays(start, DIGITS.program)
        result = strategy.strategy.start(grid, arrays, 2, 60, train_config=config, evaluate_fn=ended)  # type: ignore[arg-type]
        fleet = [int(grid.device(node).removeprefix("test-")) for node in nodes]

    def samples(chosen: Sequence[int], _: Sequence[int], steps: int) -> Any:
        seeds = [task_seed(seed, round_, nodes[i]) for i in chosen] if (round_ := next(number)) else []
        return meta.simulated_fleet(DIGITS, FLEET).samples([fleet[i] for i in chosen], seeds, steps)

    backend = digits if name in ("fedprox", "fomaml") else exact
    source = meta.ClientSource(FLEET, samples, stores_samples=False)
    outcome = meta.simulate(backend, source, how, start, rounds=2, seed=seed)
    up, down = (
        list(itertools.accumulate(getattr(r, f"bytes_{way}") for r in outcome.rounds)) for way in ("up", "down")
    )
    assert carried[0] == (0, 0) and carried[1:] == list(zip(up, down, strict=True))
    if name in ("reptile", "tinymetafed"):
        np.testing.assert_array_equal(arrays_to_vector(result.arrays, DIGITS.program), outcome.parameters)


def test_the_few_shot_score_is_that_of_the_devices(digits: Any, exact: Any) -> None:
    start, phases = DIGITS.program.initial(0), [Phase(2, 10, 0.1), Phase(ALL_LAYERS, 30, 0.05)]
    devices = few_shot(DIGITS, start, phases, shots=5, episodes=40, seed=4).values
    with_engine = meta.evaluate(exact, DIGITS.draw, start, phases, shots=5, tasks=40, seed=4)
    np.testing.assert_array_equal(with_engine, devices)
    compiled = meta.evaluate(digits, DIGITS.draw, start, phases, shots=5, tasks=40, seed=4, chunk=20)
    assert np.abs(compiled - devices).mean() < 0.005
    assert devices.mean() > 0.4


def sines(seeds: Iterable[int], samples: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Sine waves of random amplitude and phase: x and y [tasks, samples, 1]."""
    random = [np.random.default_rng(seed) for seed in seeds]
    x = np.stack([r.uniform(-5, 5, (samples, 1)) for r in random]).astype(np.float32)
    amplitude, phase = (np.array([r.uniform(*span) for r in random])[:, None, None] for span in ((0.1, 5), (0, np.pi)))
    return x, np.asarray(amplitude * np.sin(x - phase), np.float32)


def test_reptile_learns_to_learn() -> None:
    """Sine waves: a wave from ten points, after 32 steps."""

    def draw(split: object, seeds: Sequence[int], shots: int, queries: int) -> Episodes:
        x, y = sines([seed + 1 for seed in seeds], shots + queries)
        return Episodes(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])

    backend, phases = meta.Backend(SINE), (Phase(ALL_LAYERS, 32, 0.02),)
    how = meta.MethodSettings("reptile", phases, phases, clients=16, batch=10, alpha=0.5)
    source = meta.ClientSource(2**31, lambda _, seeds, count: sines(seeds, 10), stores_samples=True)
    start = SINE.initial(0)
    learned = meta.simulate(backend, source, how, start, rounds=150).parameters
    before, after = (meta.evaluate(backend, draw, v, phases, shots=10, tasks=200, batch=10) for v in (start, learned))
    assert after.mean() < 0.75 * before.mean()


# Methods


def test_every_method_makes_its_rounds(digits: Any) -> None:
    for name in meta.METHODS:
        how = meta.strategy_settings(name, DIGITS, clients=1)
        start = meta.initial_parameters(DIGITS.program, how)
        outcome = meta.simulate(digits, meta.server_tasks(DIGITS), how, start, rounds=2)
        assert len(outcome.rounds) == (0 if name == "scratch" else 2)
        assert (outcome.parameters == start).all() == (name == "scratch")
    with pytest.raises(UserError, match="choose one of"):
        meta.strategy_settings("adam", DIGITS)


def test_first_order_maml_counts_the_last_phase_alone() -> None:
    backend, (x, y) = meta.Backend(SINE), clients(SINE, 4, 6)
    source = meta.ClientSource(4, lambda nodes, seeds, count: (x[list(nodes)], y[list(nodes)]), stores_samples=False)
    phases = (Phase(ALL_LAYERS, 5, 0.05), Phase(ALL_LAYERS, 1, 0.05))
    how = meta.MethodSettings("fomaml", phases, phases, clients=4, alpha=2.0, update=UpdateFormat(since=1))
    start = SINE.initial(0)
    new = meta.simulate(backend, source, how, start, rounds=1).parameters
    five = ALONE.adapt(start, x, y, phases[:1]).parameters
    six = ALONE.adapt(start, x, y, phases).parameters
    np.testing.assert_allclose(new, start + 2 * (six - five).mean(0), atol=1e-6)


def test_fedprox_pulls_back_to_the_start() -> None:
    backend, (x, y) = meta.Backend(SINE), clients(SINE, 2, 2)
    start, two = SINE.initial(0), [Phase(ALL_LAYERS, 2, 0.05)]
    first = ALONE.adapt(start, x, y, [Phase(ALL_LAYERS, 1, 0.05)]).parameters
    plain = ALONE.adapt(start, x, y, two).parameters
    pulled = backend.adapt(start, x, y, two, proximal=0.5).parameters
    np.testing.assert_allclose(plain - pulled, 0.05 * 0.5 * (first - start), atol=1e-6)


def test_adam_without_momentum_takes_its_steps() -> None:
    backend, (x, y) = meta.Backend(SINE), clients(SINE, 2, 1)
    start, once = SINE.initial(0), [Phase(ALL_LAYERS, 1, 0.01)]
    gradient = (start - ALONE.adapt(start, x, y, once).parameters) / 0.01
    squares = np.full_like(start, 0.25)
    learned = backend.adapt(start, x, y, once, moments=meta.Moments(squares, steps=9))
    v = 0.999 * squares + 0.001 * gradient**2
    step = 0.01 * np.sqrt(1 - 0.999**10) * gradient / (np.sqrt(v) + 1e-8)
    np.testing.assert_allclose(learned.parameters, start - step, atol=1e-6)
    np.testing.assert_allclose(learned.moments.squares, v.mean(0), rtol=1e-4)
    assert learned.moments.steps == 10


def test_the_published_network_has_its_size() -> None:
    net = meta.omniglot_network(5)
    assert net.n_params == 113_221
    start = np.stack([meta.omniglot_initialization(net, 0)] * 2)
    x = np.random.default_rng(0).random((2, 10, 28, 28)).astype(np.float32)
    x[1, :5] = x[0, :5]
    one, other = meta.Backend(net).predict(start, x)
    assert np.abs(one[:5] - other[:5]).max() > 1e-3, "normalised by the batch: which are asked together matters"


@pytest.mark.slow
def test_the_published_network_learns() -> None:
    net, random = meta.omniglot_network(5), np.random.default_rng(0)
    x, y = random.random((2, 10, 28, 28)).astype(np.float32), np.tile(np.arange(5), (2, 2))
    moments = meta.Moments(np.zeros(net.n_params, np.float32))
    phases = [Phase(ALL_LAYERS, 8, 0.003)]
    learned = meta.Backend(net).adapt(meta.omniglot_initialization(net, 0), x, y, phases, batch=10, moments=moments)
    assert (learned.losses[:, -1] < learned.losses[:, 0] / 2).all()


def test_mixed_precision_learns_nearly_the_same() -> None:
    x, y = clients(SINE, 2, 8)
    start, phases = SINE.initial(0), [Phase(ALL_LAYERS, 20, 0.05)]
    full = ALONE.adapt(start, x, y, phases).parameters
    mixed = meta.Backend(SINE, precision="mixed").adapt(start, x, y, phases).parameters
    assert 0 < np.abs(mixed - full).max() < 0.1 * np.abs(full - start).max()


# Runs


class Killed(Exception):
    pass


@pytest.mark.parametrize("adam", [False, True])
def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path: Path, digits: Any, exact: Any, adam: bool) -> None:
    backend = digits if adam else exact
    how = replace(meta.strategy_settings("tinymetafed", DIGITS, clients=3), adam=adam)
    start, source = meta.initial_parameters(DIGITS.program, how), meta.server_tasks(DIGITS)
    whole = meta.simulate(backend, source, how, start, rounds=5)

    def kill(this: Any) -> None:
        if len(this.rounds) == 3:
            raise Killed

    file = tmp_path / "run.npz"
    with pytest.raises(Killed):
        meta.simulate(backend, source, how, start, rounds=5, checkpoint=file, checkpoint_every=2, on_round=kill)
    went_on: list[int] = []
    resumed = meta.simulate(
        backend,
        source,
        how,
        start,
        rounds=5,
        checkpoint=file,
        checkpoint_every=2,
        on_round=lambda r: went_on.append(len(r.rounds)),
    )
    assert went_on == [3, 4, 5]
    np.testing.assert_array_equal(resumed.parameters, whole.parameters)
    assert [replace(r, seconds=0) for r in resumed.rounds] == [replace(r, seconds=0) for r in whole.rounds]
    with pytest.raises(UserError, match="other settings"):
        meta.simulate(backend, source, how, start, rounds=5, seed=1, checkpoint=file)
    file.write_bytes(b"PK")
    with pytest.raises(UserError, match="is not a checkpoint"):
        meta.simulate(backend, source, how, start, rounds=5, checkpoint=file)


def test_how_many_clients_are_computed_at_once_changes_nothing(exact: Any) -> None:
    how = meta.strategy_settings("tinymetafed", DIGITS, clients=6)
    start = meta.initial_parameters(DIGITS.program, how)
    for source in (meta.simulated_fleet(DIGITS, FLEET), meta.server_tasks(DIGITS)):
        one, other = (meta.simulate(exact, source, how, start, rounds=1, chunk=chunk) for chunk in (6, 4))
        np.testing.assert_array_equal(one.parameters, other.parameters)
        assert replace(one.rounds[0], seconds=0) == replace(other.rounds[0], seconds=0)


def test_clients_that_diverge_are_left_out() -> None:
    x, y = clients(SINE, 2, 4)
    x[1] = 1e30
    source = meta.ClientSource(2, lambda nodes, seeds, count: (x[list(nodes)], y[list(nodes)]), stores_samples=False)
    phases = (Phase(ALL_LAYERS, 4, 0.05),)
    how = meta.MethodSettings("reptile", phases, phases, clients=2)
    backend, start = meta.Backend(build([Dense(1)], (1,), "mse")), np.zeros(2, np.float32)
    outcome = meta.simulate(backend, source, how, start, rounds=1)
    assert (outcome.rounds[0].clients, outcome.rounds[0].diverged) == (2, 1)
    assert np.isfinite(outcome.parameters).all() and np.isfinite(outcome.rounds[0].loss)
    x[0] = 1e30
    with pytest.raises(UserError, match="all clients diverged in round 1"):
        meta.simulate(backend, source, how, start, rounds=1)


def test_what_does_not_fit_is_told() -> None:
    backend, (x, y) = meta.Backend(SINE), clients(SINE, 2, 2)
    with pytest.raises(UserError, match="takes 1"):
        backend.adapt(SINE.initial(0), np.zeros((2, 2, 3)), y, PHASES)
    with pytest.raises(UserError, match="the order has the shape"):
        backend.adapt(SINE.initial(0), x, y, PHASES, order=np.zeros((2, 3, 1), int))
    with pytest.raises(UserError, match="layernorm"):
        meta.Backend(build([Dense(2), LayerNorm(), Dense(1)], (1,), "mse"))
    with pytest.raises(UserError, match="one sample a step"):
        meta.Backend(SINE, exact=True).adapt(SINE.initial(0), x, y, PHASES, batch=2)


def test_jax_gives_the_same_on_two_devices(tmp_path: Path) -> None:
    """The other backend, in a process of its own, with two processors in the place of two GPUs."""
    pytest.importorskip("jax")
    x, y = clients(SINE, 3, 7)
    np.savez(tmp_path / "in.npz", x=x, y=y, start=SINE.initial(0))
    (tmp_path / "model.mote").write_bytes(SINE.data)
    code = (
        "import sys, numpy as np\n"
        "from tinyfleet.edge.model.program import Program\n"
        "from tinyfleet.edge.wire.commands import Phase\n"
        "import keras\nfrom tinyfleet.server import simulator as meta\n"
        "folder = sys.argv[1]\n"
        "given = np.load(f'{folder}/in.npz')\n"
        "backend = meta.Backend(Program.parse(open(f'{folder}/model.mote', 'rb').read()))\n"
        f"phases = [Phase(*row) for row in {[(ph.layers, ph.steps, ph.rate) for ph in PHASES]}]\n"
        "learned = backend.adapt(given['start'], given['x'], given['y'], phases)\n"
        "np.savez(f'{folder}/out.npz', parameters=learned.parameters, losses=learned.losses)\n"
        "print(keras.backend.backend(), backend.devices)\n"
    )
    flags = {"KERAS_BACKEND": "jax", "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, **flags}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "jax ['cpu:0', 'cpu:1']", done.stderr
    here = meta.Backend(SINE).adapt(SINE.initial(0), x, y, PHASES)
    there = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(there["parameters"], here.parameters, atol=2e-6)
    np.testing.assert_allclose(there["losses"], here.losses, atol=1e-5)


def test_the_command_line(tmp_path: Path) -> None:
    start, curve = tmp_path / "start.npz", tmp_path / "curve.png"
    words = [
        "--task",
        "digits",
        "--strategy",
        "tinymetafed",
        "--rounds",
        "2",
        "--clients-per-round",
        "3",
        "--fleet-size",
        "6",
        "--held-out-tasks",
        "20",
        "--exact",
    ]
    done = CliRunner().invoke(cli, ["run", "simulate", *words, "--json", "--out", str(start), "--plot", str(curve)])
    assert done.exit_code == 0, done.output
    first, second, last = (json.loads(line) for line in done.output.splitlines())
    assert (first["number"], second["number"], first["clients"]) == (1, 2, 3)
    assert set(last["held-out-by-shots"]) == {"learned", "random"} and last["devices"]
    with np.load(start) as arrays:
        assert DIGITS.program.join(arrays).shape == (DIGITS.program.n_params,)
    assert curve.read_bytes().startswith(b"\x89PNG")
    done = CliRunner().invoke(cli, ["run", "simulate", *words])
    assert done.exit_code == 0, done.output
    assert re.search(r"Accuracy on 20\s+held-out tasks", done.output), done.output
    rows = re.findall(r"(learned|random) .* (\d+\.\d)% ± \d+\.\d% ", done.output)
    by_shots = last["held-out-by-shots"]
    assert [(name, float(percent)) for name, percent in rows] == [
        (name, round(100 * by_shots[name]["10"], 1)) for name in ("learned", "random")
    ]


def test_a_task_with_too_few_samples_is_told_before_anything_is_learned(tmp_path: Path) -> None:
    """All of SHOTS are scored on Omniglot, which has 20 samples of a character."""
    if datasets.local(omniglot.PACKED) is None:
        pytest.skip("Omniglot is not in TINYFLEET_DATA")
    words = [
        "run",
        "simulate",
        "--task",
        "omniglot",
        "--rounds",
        "1",
        "--clients-per-round",
        "1",
        "--held-out-tasks",
        "1",
        "--exact",
        "--json",
    ]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.output.splitlines()[-1])["held-out-by-shots"]["learned"]) == {"1", "5", "10"}
    out = tmp_path / "start.npz"
    done = CliRunner().invoke(cli, [*words, "--shots", "20", "--out", str(out)])
    assert isinstance(done.exception, UserError) and "lower --shots" in str(done.exception)
    assert not out.exists()


def test_a_fleet_is_served_without_keras() -> None:
    """It takes seconds to import, and need not be installed; the command that needs it says so."""
    code = (
        "import sys\n"
        "for name in ('keras', 'tensorflow', 'jax'): sys.modules[name] = None\n"
        "import tinyfleet.server.training_run, tinyfleet.server.flower.strategies, tinyfleet.server.cli\n"
        "from tinyfleet.__main__ import main\n"
        "sys.argv[1:] = ['run', 'simulate', '--task', 'digits']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: this needs keras, which is not installed: pip install 'tinyfleet[edge,keras,server]'\n",
    )
