"""Conversions between Flower's records and the wire: arrays to parameter vectors and back, and metrics.

The only module of edge.wire that imports Flower. The grid and Flower's ClientApp share it.
"""

import io
import math
from functools import cache, cached_property
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SType
from numpy.typing import NDArray

from tinyfleet.edge.model.program import Program
from tinyfleet.edge.wire.commands import Kind
from tinyfleet.edge.wire.messages import Metrics

Vector = NDArray[np.float32]
Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)


def single_records(message: Message) -> tuple[ArrayRecord, ConfigRecord]:
    """The two records that a message to a device carries.

    Parameters
    ----------
    message
        A message that a strategy made.

    Returns
    -------
    tuple of ArrayRecord and ConfigRecord
        The parameters and the round's configuration.

    Raises
    ------
    ValueError
        If the message does not have exactly one ArrayRecord and one ConfigRecord.
    """
    arrays, configs = records_of_type(message.content, ArrayRecord), records_of_type(message.content, ConfigRecord)
    if len(arrays) != 1 or len(configs) != 1:
        raise ValueError("a message to a device carries one ArrayRecord and one ConfigRecord")
    return arrays[0], configs[0]


def records_of_type(content: RecordDict, kind: type[Record]) -> list[Record]:
    """The records of one type, without the copy that RecordDict's own properties make."""
    return [record for record in content.values() if isinstance(record, kind)]


def arrays_to_vector(record: ArrayRecord, program: Program) -> Vector:
    """The parameters as one vector, in the program's order.

    Parameters
    ----------
    record
        Arrays with the program's names in any order, or with other names in the program's order.
    program
        The model.

    Returns
    -------
    ndarray of float32, shape (n_params,)

    Raises
    ------
    ValueError
        If the arrays do not have the program's shapes.
    """
    by_key = dict(record.items())  # reading a record key by key checks each key
    arrays = [by_key[key] for key in parameter_keys(record, program)]
    shapes, expected = [tuple(array.shape) for array in arrays], [shape for _, shape in program.parameters]
    if shapes != expected:
        raise ValueError(f"the arrays have the shapes {shapes}; the program has {expected}")
    return np.concatenate([to_numpy(array).astype(np.float32, copy=False).ravel() for array in arrays])


def vector_to_arrays(vector: Vector, program: Program, like: ArrayRecord | None = None) -> ArrayRecord:
    """A parameter vector as Flower's arrays.

    Parameters
    ----------
    vector
        Parameters, shape (n_params,).
    program
        The model.
    like
        A record whose keys, and their order, the result gets. Default: the program's names.

    Returns
    -------
    ArrayRecord
        The inverse of `arrays_to_vector`.
    """
    arrays = program.split(vector)
    by_key = arrays if like is None else dict(zip(parameter_keys(like, program), arrays.values(), strict=True))
    record = ArrayRecord()  # ArrayRecord(dict) would copy every array
    for key in like or by_key:
        record[key] = from_numpy(by_key[key])
    return record


def parameter_keys(record: ArrayRecord, program: Program) -> list[str]:
    """The record's keys in the order of the program's parameters."""
    names = [name for name, _ in program.parameters]
    return names if set(names) == set(record) else list(record)


def to_numpy(array: Array) -> NDArray[Any]:
    """The array's values, read-only; equal to `array.numpy()`.

    `Array.numpy` parses the npy header as Python source, which for a small model costs more than everything else that
    the server does with a reply.
    """
    header = _npy_header(array.dtype, tuple(array.shape))
    if array.stype != SType.NUMPY or not array.data.startswith(header):
        return array.numpy()
    return np.frombuffer(array.data, array.dtype, offset=len(header)).reshape(array.shape)


def from_numpy(values: NDArray[Any]) -> Array:
    """Equal to `Array(values)`, at a fraction of its cost."""
    return Array(_name(values.dtype), values.shape, SType.NUMPY, npy_bytes(values))


def npy_bytes(values: NDArray[Any]) -> bytes:
    """What `np.save` writes for a C-contiguous array."""
    return _npy_header(_name(values.dtype), values.shape) + values.tobytes()


_name = cache(str)  # of a dtype: NumPy builds the string again each time


@cache
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    file, values = io.BytesIO(), np.zeros(shape, dtype)
    np.save(file, values)
    return file.getvalue()[: -values.nbytes or None]


def to_metrics(metrics: Metrics, kind: Kind, bytes_up: int, program: Program) -> MetricRecord:
    """A reply's metrics as Flower's record. A value that the device did not measure is absent.

    Parameters
    ----------
    metrics
        As the device reported them.
    kind
        Of the command: "train" or "evaluate".
    bytes_up
        Payload bytes of the reply.
    program
        The model.

    Returns
    -------
    MetricRecord
        `num-examples`, `bytes-up`, `bytes-dense` and `arena-bytes`; `loss` if the device trained; `query-loss`, and for
        a classifier `accuracy`, if it evaluated query samples.
    """
    record = MetricRecord(
        {
            "num-examples": metrics.samples if kind == "train" else metrics.queried,
            "bytes-up": bytes_up,
            "bytes-dense": 4 * program.n_params,
            "arena-bytes": metrics.arena_bytes,
        }
    )
    if metrics.samples:
        record["loss"] = metrics.loss
    if metrics.queried:
        if program.loss == "softmax_cross_entropy":
            record["accuracy"] = metrics.correct / metrics.queried
        record["query-loss"] = metrics.query_loss
    return record


class SparseArrayRecord(ArrayRecord):
    """A device's parameters, held as the values that it changed.

    For Flower this is an ArrayRecord like any other: its arrays become dense when their data is read, and not before.
    A strategy that adds up changes reads `indices` and `new_values` instead, and the other parameters are never built.

    Parameters
    ----------
    sent
        The float32 arrays that the device was sent.
    base
        The same as one vector, shape (n_params,), the arrays in the order of `sent`.
    indices
        Positions in that vector which the device changed, strictly increasing.
    new_values
        The device's parameters at these positions.

    Examples
    --------
    >>> sent = ArrayRecord([np.zeros(4, np.float32)])
    >>> record = SparseArrayRecord(sent, np.zeros(4, np.float32), np.array([2], np.uint32), np.ones(1, np.float32))
    >>> record["0"].numpy()
    array([0., 0., 1., 0.], dtype=float32)
    """

    def __init__(self, sent: ArrayRecord, base: Vector, indices: NDArray[np.uint32], new_values: Vector) -> None:
        super().__init__()
        self.sent = sent
        self.base = base
        self.indices = indices
        self.new_values = new_values
        self.is_sparse = True
        first = 0
        for key, array in sent.items():
            lazy = _LazyArray(self, first, tuple(array.shape))
            super().__setitem__(key, lazy)
            first = lazy.end

    def __setitem__(self, key: str, value: Array) -> None:
        self.is_sparse = False  # the arrays now say something else than the sparse update
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self.is_sparse = False
        super().__delitem__(key)

    def copy(self) -> ArrayRecord:  # type: ignore[override]
        """A dense copy."""
        return ArrayRecord(dict(self.items()))

    @cached_property
    def dense(self) -> Vector:
        """All parameters, shape (n_params,)."""
        vector = self.base.copy()
        vector[self.indices] = self.new_values
        return vector


class _LazyArray(Array):
    """One array of a SparseArrayRecord."""

    def __init__(self, record: SparseArrayRecord, first: int, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape, self.stype = "float32", shape, SType.NUMPY
        self.end = first + math.prod(shape)
        self._record, self._first = record, first

    @property
    def data(self) -> bytes:  # type: ignore[override]
        return npy_bytes(self._record.dense[self._first : self.end].reshape(self.shape))
