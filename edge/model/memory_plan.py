"""Where every value and gradient of a graph lies in the arena, and what that takes.

Time counts the steps of one training sample: op t forward for t < n, the loss for t = n, op 2n - t backward for t > n.
A tensor is alive from the step that writes it to the last that reads it; two may share memory if their lives do not
meet. Ops of single elements, the loss's gradient, and max pooling's where windows do not overlap, work in place; the
two gradients of an addition are one as long as they are equal. A ReLU whose output nothing else reads in the backward
pass keeps one bit for each element of it instead, where that makes the whole smaller.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from tinyfleet.edge.errors import ProgramError
from tinyfleet.edge.model.graph import Graph, Kind, Op, Tensor

#: A program's records; see mote_internal.h.
HEADER_BYTES, TENSOR_BYTES, OP_BYTES = 48, 16, 40

#: Ops whose weights and bias are float32 arrays.
WEIGHTED = (Kind.DENSE, Kind.CONV2D, Kind.DEPTHWISE, Kind.LAYERNORM)
TRAINED_INT8 = (Kind.TRAINED_INT8_DENSE, Kind.TRAINED_INT8_CONV2D, Kind.TRAINED_INT8_DEPTHWISE)
INT8_WEIGHTED = (Kind.INT8_DENSE, Kind.INT8_CONV2D, Kind.INT8_DEPTHWISE)

_ACTIVATIONS = (Kind.RELU, Kind.RELU6, Kind.LEAKY_RELU, Kind.TANH, Kind.SIGMOID, Kind.SOFTMAX)
#: Kinds whose output can be in the place of an input that nobody needs any more.
_IN_PLACE = (
    *_ACTIVATIONS, Kind.ADD, Kind.LAYERNORM, Kind.INT8_ADD, Kind.INT8_MUL, Kind.INT8_TABLE, Kind.INT8_SOFTMAX,
)  # fmt: skip
#: Kinds whose input's gradient can be in the place of the output's.
_GRADIENT_IN_PLACE = (*_ACTIVATIONS, Kind.ADD, Kind.DEQUANTIZE, Kind.INT8_ADD)
#: Kinds that can do with one bit for each element of their output: whether the gradient passes there.
MASKED = (Kind.RELU, Kind.RELU6, Kind.LEAKY_RELU)
#: Kinds that read their output again in the backward pass, unless a mask stands for it.
_READ_OUTPUT_AGAIN = (*_ACTIVATIONS, *TRAINED_INT8, Kind.INT8_ADD)
#: Kinds that a gradient passes through.
BACKWARD = (
    *WEIGHTED, *TRAINED_INT8, *_GRADIENT_IN_PLACE, Kind.AVGPOOL, Kind.MAXPOOL, Kind.PLACE, Kind.INT8_AVGPOOL,
    Kind.INT8_MAXPOOL, Kind.INT8_MEAN,
)  # fmt: skip
_MASK_ROW = 4096  # bytes: a tensor's dimensions are of 16 bits, so that a long mask has rows
_TRIES = 200  # orders of placement that are tried to come nearer to the lower bound


@dataclass
class Block:
    """A block of memory with a lifetime.

    Parameters
    ----------
    bytes
        Its size.
    birth, death
        The first and the last step in which it is in use.
    """

    bytes: int
    birth: int
    death: int


@dataclass(frozen=True)
class Gradients:
    """The tensors of one op's backward pass, as indices of `MemoryPlan.tensors`; None where there is none.

    Parameters
    ----------
    dout
        The gradient of the output.
    din, din2
        The gradients of the two inputs.
    adds, adds2
        Whether these are added to what is there, because another op wrote it.
    mask
        The bits that a ReLU keeps instead of its output.
    """

    dout: int | None = None
    din: int | None = None
    din2: int | None = None
    adds: bool = False
    adds2: bool = False
    mask: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """Where every tensor of a graph lies in the arena.

    Parameters
    ----------
    tensors
        The graph's tensors, then masks, the loss's output if it is a tensor of its own, and gradients.
    offsets
        Of each tensor in the activations, in bytes; None if it lies in the model's input.
    gradients
        Of each op.
    output, dlogits
        The tensors of the model's output and of the gradient of its logits.
    activations
        Bytes of all activations and gradients.
    lower_bound
        The most bytes that are alive at one step: no plan needs less.
    """

    tensors: tuple[Tensor, ...]
    offsets: tuple[int | None, ...]
    gradients: tuple[Gradients, ...]
    output: int
    dlogits: int | None
    activations: int
    lower_bound: int


def weight_counts(op: Op, tensors: Sequence[Tensor]) -> tuple[int, int]:
    """How many weights and biases an op has; (0, 0) for one without any."""
    x, y = tensors[op.inputs[0]], tensors[op.output]
    channels = y.shape[2]
    match op.kind:
        case Kind.DENSE | Kind.INT8_DENSE | Kind.TRAINED_INT8_DENSE:
            return x.size * channels, channels
        case Kind.CONV2D | Kind.INT8_CONV2D | Kind.TRAINED_INT8_CONV2D:
            return op.kernel[0] * op.kernel[1] * x.shape[2] * channels, channels
        case Kind.DEPTHWISE | Kind.INT8_DEPTHWISE | Kind.TRAINED_INT8_DEPTHWISE:
            return op.kernel[0] * op.kernel[1] * channels, channels
        case Kind.LAYERNORM:
            return channels, channels
    return 0, 0


def trained_counts(op: Op, tensors: Sequence[Tensor]) -> tuple[int, int]:
    """How many of an op's weights and biases train."""
    if op.trains == "nothing":
        return 0, 0
    weights, biases = weight_counts(op, tensors)
    trained = biases if op.trained is None or op.kind not in TRAINED_INT8 else op.trained
    return (weights // biases * trained if op.trains == "all" else 0), trained


def params_bytes(op: Op, tensors: Sequence[Tensor]) -> int:
    """Bytes that an op keeps in RAM because they train."""
    weights, biases = trained_counts(op, tensors)
    return (aligned(weights) if op.kind in TRAINED_INT8 else 4 * weights) + 4 * biases


def macs(op: Op, tensors: Sequence[Tensor]) -> int:
    """Multiply-adds of an inference."""
    h, w, _ = tensors[op.output].shape
    return 0 if op.kind == Kind.LAYERNORM else weight_counts(op, tensors)[0] * h * w


def aligned(size: int) -> int:
    """Rounded up to a multiple of 4."""
    return -(-size // 4) * 4


def root(tensors: Sequence[Tensor], index: int) -> int:
    """The tensor whose memory this one shares; itself unless it is a view."""
    while (under := tensors[index].view_of) is not None:
        index = under
    return index


class _Planner:
    """Collects the blocks of memory that a graph needs, and in which one each tensor lies."""

    def __init__(self, graph: Graph, masked: bool) -> None:
        self.graph, self.n = graph, len(graph.ops)
        self.masked = masked
        self.tensors = list(graph.tensors)
        self.blocks: list[Block] = []
        self.place: dict[int, int] = {}  # root tensor -> block
        self.gradient: dict[int, int] = {}  # root tensor -> its gradient's tensor
        self.masks: dict[int, int] = {}  # op -> its mask's tensor
        self.writers: dict[int, list[int]] = {}
        self.readers: dict[int, list[int]] = {}
        for i, op in enumerate(graph.ops):
            self.writers.setdefault(self.root(op.output), []).append(i)
            for x in dict.fromkeys(map(self.root, op.inputs)):
                self.readers.setdefault(x, []).append(i)
        self.back = self._needs_gradient()
        #: The ops that take part in the backward pass.
        self.active = [
            self.root(op.output) in self.back
            and (op.trains != "nothing" or any(self.root(x) in self.back for x in op.inputs))
            for op in graph.ops
        ]

    def root(self, index: int) -> int:
        return root(self.tensors, index)

    def new(self, size: int, birth: int, death: int) -> int:
        self.blocks.append(Block(aligned(size), birth, death))
        return len(self.blocks) - 1

    def _needs_gradient(self) -> set[int]:
        """The root tensors with respect to which the loss's gradient is computed."""
        above: set[int] = set()  # something that trains has an influence on it
        for op in self.graph.ops:
            if op.trains != "nothing" or any(self.root(x) in above for x in op.inputs):
                above.add(self.root(op.output))
        output = self.root(self.graph.output)
        if self.graph.loss is None or output not in above:
            return set()
        wanted = {output}
        for op in reversed(self.graph.ops):
            if self.root(op.output) in wanted:
                wanted |= {self.root(x) for x in op.inputs} & above
        return wanted

    def _reads_input_again(self, op: Op) -> bool:
        wanted = self.root(op.inputs[0]) in self.back
        if op.kind in (Kind.LAYERNORM, Kind.MAXPOOL, Kind.INT8_MAXPOOL):
            return wanted or op.trains == "all"
        return op.trains == "all"

    def values(self) -> None:
        """Assign blocks to the outputs of the ops."""
        deaths = self._last_reads()
        self._mask_or_keep(deaths)
        for i, op in enumerate(self.graph.ops):
            y = self.root(op.output)
            if y in self.place:
                continue
            blocks = [self.place.get(self.root(x)) for x in op.inputs if op.kind in _IN_PLACE]
            spare = next((b for b in blocks if b is not None and self.blocks[b].death == i), None)
            self.place[y] = self.new(self.tensors[y].bytes, i, i) if spare is None else spare
            self.blocks[self.place[y]].death = deaths[y]

    def _last_reads(self) -> dict[int, int]:
        """The last step that reads each op's output; for outputs of MASKED ops, the last step of the forward pass."""
        n, ops = self.n, self.graph.ops
        deaths = {t: max([*self.readers.get(t, []), *w]) for t, w in self.writers.items()}
        deaths[self.root(self.graph.output)] = n
        for i, op in enumerate(ops):
            x, y = self.root(op.inputs[0]), self.root(op.output)
            if not self.active[i]:
                continue
            if x in deaths and self._reads_input_again(op):
                deaths[x] = max(deaths[x], 2 * n - i)
            if op.kind in _READ_OUTPUT_AGAIN and op.kind not in MASKED:
                deaths[y] = max(deaths[y], 2 * n - i)
        return deaths

    def _mask_or_keep(self, deaths: dict[int, int]) -> None:
        """Add a mask for each MASKED op whose output the backward pass does not read; keep the others' outputs."""
        for i, op in enumerate(self.graph.ops):
            y = self.root(op.output)
            if op.kind in MASKED and self.active[i]:
                if self.masked and deaths[y] <= self.n:
                    self._add_mask(i, self.tensors[y].size)
                else:
                    deaths[y] = max(deaths[y], 2 * self.n - i)

    def _add_mask(self, i: int, elements: int) -> None:
        size = -(-elements // 8)
        row = min(size, _MASK_ROW)
        mask = Tensor((1, -(-size // row), row), "int8")
        self.tensors.append(mask)
        self.masks[i] = len(self.tensors) - 1
        self.place[self.masks[i]] = self.new(mask.bytes, i, 2 * self.n - i)

    def loss(self) -> tuple[int, int | None]:
        """Assign blocks to the loss's tensors: returns the output's tensor and that of the logits' gradient."""
        n, graph = self.n, self.graph
        logits = self.root(graph.output)
        block = self.place[logits]
        output = graph.output
        if graph.loss in ("softmax_cross_entropy", "binary_cross_entropy"):
            self.tensors.append(Tensor(self.tensors[graph.output].shape))
            output = len(self.tensors) - 1
            if self.blocks[block].death > n:
                block = self.new(self.tensors[output].bytes, n, n)
            self.place[output] = block
        if logits not in self.back:
            return output, None
        if self.blocks[block].death > n:
            block = self.new(self.tensors[logits].bytes, n, n)
        return output, self._add_gradient(logits, block)

    def _add_gradient(self, of: int, block: int) -> int:
        self.tensors.append(Tensor(self.tensors[of].shape))
        self.gradient[of] = len(self.tensors) - 1
        self.place[self.gradient[of]] = block
        last = min(i for i in self.writers[of] if self.active[i])
        self.blocks[block].death = max(self.blocks[block].death, 2 * self.n - last)
        return self.gradient[of]

    def gradients(self) -> list[Gradients]:
        """Assign blocks to the gradients: returns the gradient tensors of every op."""
        gradients = [Gradients()] * self.n
        for i in reversed(range(self.n)):
            if self.active[i]:
                gradients[i] = self._op_gradients(i, self.graph.ops[i])
        return gradients

    def _op_gradients(self, i: int, op: Op) -> Gradients:
        inputs = [x if x in self.back else None for x in map(self.root, op.inputs)]
        new = [x for x in dict.fromkeys(inputs) if x is not None and x not in self.gradient]
        if any(x is not None for x in inputs) and op.kind not in BACKWARD:
            raise ProgramError(
                f"'{op.name}' ({op.kind.name.lower()}) lets no gradient through to what would train before it; "
                "train from a layer behind it"
            )
        for x, block in zip(new, self._blocks_for_gradients(i, op, new), strict=True):
            self._add_gradient(x, block)
        made: list[tuple[int | None, bool]] = []
        for place, wanted in enumerate(inputs):
            adds = wanted is not None and (wanted not in new or wanted in inputs[:place])
            made.append((None if wanted is None else self.gradient[wanted], adds))
        (din, adds), (din2, adds2) = [*made, (None, False)][:2]
        return Gradients(self.gradient[self.root(op.output)], din, din2, adds, adds2, self.masks.get(i))

    def _blocks_for_gradients(self, i: int, op: Op, new: Sequence[int]) -> list[int]:
        """Of an op's inputs: in place of the output's gradient, or of max pooling's input, where that dies now; both of
        an addition in one place where they can share it; else in a new block."""
        t = 2 * self.n - i
        own = self.place[self.gradient[self.root(op.output)]]
        blocks: list[int] = []
        for x in new:
            value = self.place.get(x)
            if not blocks and op.kind in _GRADIENT_IN_PLACE and self.blocks[own].death == t:
                blocks.append(own)
            elif blocks and (self._can_share(i, new[0], x) or self._can_share(i, x, new[0])):
                blocks.append(blocks[0])
            elif (
                op.kind == Kind.MAXPOOL
                and op.kernel == op.strides
                and value is not None
                and self.blocks[value].death == t
            ):
                blocks.append(value)
            else:
                blocks.append(self.new(Tensor(self.tensors[x].shape).bytes, t, t))
        return blocks

    def _can_share(self, i: int, short: int, long: int) -> bool:
        """Whether the gradients with respect to the inputs of op i, an addition, can be one: that of `short` is used up
        before another op adds to that of `long`. Neither is worked on in place while the other is alive."""
        others = [reader for reader in self.readers[long] if reader != i]
        return (
            self.graph.ops[i].kind == Kind.ADD
            and self.readers[short] == [i]
            and min(self.writers[short]) > max(others, default=-1)
        )


def plan_memory(graph: Graph) -> MemoryPlan:
    """Plan the memory of a graph: exact, and the same at every run.

    Parameters
    ----------
    graph
        The model, with what of it trains.

    Returns
    -------
    MemoryPlan

    Raises
    ------
    ProgramError
        If something cannot train: the output does not depend on it, or no gradient reaches it.
    """
    whole = _plan_memory(_Planner(graph, masked=False))
    planner = _Planner(graph, masked=True)
    masked = _plan_memory(planner)
    return masked if planner.masks and masked.activations < whole.activations else whole


def _plan_memory(planner: _Planner) -> MemoryPlan:
    graph = planner.graph
    for op in graph.ops:
        if op.trains != "nothing" and planner.root(op.output) not in planner.back:
            raise ProgramError(
                f"'{op.name}' cannot train: "
                + ("the output does not depend on it" if graph.loss else "there is no loss")
            )
    planner.values()
    output, dlogits = planner.loss()
    gradients = planner.gradients()
    offsets, size, bound = pack(planner.blocks)
    places: list[int | None] = []
    for index in range(len(planner.tensors)):
        block = planner.place.get(planner.root(index))
        places.append(None if block is None else offsets[block])
    return MemoryPlan(tuple(planner.tensors), tuple(places), tuple(gradients), output, dlogits, size, bound)


def pack(blocks: Sequence[Block]) -> tuple[list[int], int, int]:
    """Find offsets such that blocks that live at the same time do not overlap.

    Greedy best fit by size, by birth and by lifetime (after Pisarchyk and Lee 2020, "Efficient memory management for
    deep neural net inference"). If none of these orders reaches the lower bound, similar orders are tried.

    Parameters
    ----------
    blocks
        The blocks to place.

    Returns
    -------
    offsets : list of int
        Of each block, in bytes.
    size : int
        Bytes that all blocks need.
    bound : int
        The lower bound.
    """
    bound = lower_bound(blocks)
    keys: list[Callable[[int], tuple[int, ...]]] = [
        lambda i: (-blocks[i].bytes, blocks[i].birth, i),
        lambda i: (blocks[i].birth, -blocks[i].bytes, i),
        lambda i: (blocks[i].birth - blocks[i].death, -blocks[i].bytes, i),
    ]
    orders = [sorted(range(len(blocks)), key=key) for key in keys]
    plans = [_best_fit(blocks, order) for order in orders]
    best = min(range(len(plans)), key=lambda k: plans[k][1])
    (offsets, size), order = plans[best], orders[best]
    chance = random.Random(0)
    for _ in range(_TRIES):
        if size == bound or len(blocks) < 3:
            break
        tried = list(order)
        tried.insert(chance.randrange(len(tried)), tried.pop(chance.randrange(len(tried))))
        other = _best_fit(blocks, tried)
        if other[1] <= size:
            (offsets, size), order = other, tried
    return offsets, size, bound


def lower_bound(blocks: Iterable[Block]) -> int:
    """The most bytes that are alive at one step."""
    changes: dict[int, int] = {}
    for block in blocks:
        changes[block.birth] = changes.get(block.birth, 0) + block.bytes
        changes[block.death + 1] = changes.get(block.death + 1, 0) - block.bytes
    alive = most = 0
    for time in sorted(changes):
        alive += changes[time]
        most = max(most, alive)
    return most


def _best_fit(blocks: Sequence[Block], order: Sequence[int]) -> tuple[list[int], int]:
    offsets = [0] * len(blocks)
    placed: list[int] = []
    total = 0
    for i in order:
        block = blocks[i]
        taken = sorted(
            (offsets[j], offsets[j] + blocks[j].bytes)
            for j in placed
            if blocks[j].birth <= block.death and block.birth <= blocks[j].death
        )
        end, best, best_gap = 0, -1, 1 << 62
        for first, last in taken:
            if block.bytes <= first - end < best_gap:
                best, best_gap = end, first - end
            end = max(end, last)
        offsets[i] = end if best < 0 else best
        placed.append(i)
        total = max(total, offsets[i] + block.bytes)
    return offsets, total


# What training takes, depending on what of a graph trains


def with_training(graph: Graph, first: int | None, *, bias_only: bool = False) -> Graph:
    """Let the float32 weights from one op to the end train.

    Parameters
    ----------
    graph
        The model.
    first
        Index of the first op that trains; None: nothing trains.
    bias_only
        Whether only their biases train.
    """
    ops = [
        replace(op, trains="nothing" if first is None or i < first else "bias" if bias_only else "all")
        if op.kind in WEIGHTED
        else op
        for i, op in enumerate(graph.ops)
    ]
    return replace(graph, ops=tuple(ops))


def constants_bytes(op: Op, tensors: Sequence[Tensor]) -> int:
    """Bytes of constants that an op has in a program, without initial values of what trains."""
    weights, channels = weight_counts(op, tensors)
    if op.kind in WEIGHTED:
        frozen = {"nothing": weights + channels, "bias": weights, "all": 0}[op.trains]
        return 4 * (frozen + (op.kind == Kind.LAYERNORM))
    if op.kind in INT8_WEIGHTED:
        return 4 + 12 * channels + aligned(weights)
    if op.kind in TRAINED_INT8:
        trained = 0 if op.trains != "all" else channels if op.trained is None else op.trained
        return 4 + 16 * channels + aligned(weights // channels * (channels - trained))
    return _CONSTANTS.get(op.kind, 0)


_CONSTANTS = {
    Kind.LEAKY_RELU: 4, Kind.SLICE: 24, Kind.INT8_AVGPOOL: 4, Kind.INT8_MAXPOOL: 4, Kind.INT8_ADD: 44,
    Kind.INT8_MUL: 24, Kind.INT8_MEAN: 16, Kind.INT8_SOFTMAX: 12, Kind.INT8_TABLE: 256,
}  # fmt: skip


@dataclass(frozen=True)
class ResourceUse:
    """The bytes that a graph needs.

    Parameters
    ----------
    numbers
        How many numbers train.
    params, momentum
        RAM of what trains, and of the optimizer's momentum.
    activations, lower_bound
        RAM of activations and gradients, and the least that any plan could take for them.
    program
        Flash of the program with the initial values of what trains.
    """

    numbers: int
    params: int
    momentum: int
    activations: int
    lower_bound: int
    program: int

    @property
    def arena(self) -> int:
        """RAM in all."""
        return self.params + self.momentum + self.activations


def resource_use(graph: Graph) -> ResourceUse:
    """Compute the bytes that a graph needs to run and to train, exactly those of its program. Needs no weights.

    Parameters
    ----------
    graph
        The model, with what of it trains.

    Returns
    -------
    ResourceUse

    Raises
    ------
    ProgramError
        If something cannot train; see `plan_memory`.
    """
    memory = plan_memory(graph)
    params = sum(params_bytes(op, graph.tensors) for op in graph.ops)
    constants = params + sum(constants_bytes(op, graph.tensors) for op in graph.ops)
    program = HEADER_BYTES + TENSOR_BYTES * len(memory.tensors) + OP_BYTES * len(graph.ops) + constants
    numbers = sum(sum(trained_counts(op, graph.tensors)) for op in graph.ops)
    momentum = params if graph.momentum else 0
    return ResourceUse(numbers, params, momentum, memory.activations, memory.lower_bound, program)
