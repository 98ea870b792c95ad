"""What a device may reply at most: so many samples, such parameters, and a change that is not far larger than others'.

A reply weighs and moves a model by its sample counts and by its change. Everything here is bounded by what the device
was asked for, but the change's length, which only the other devices' replies can bound: by their median.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import MAX_NORM_RATIO
from tinyfleet.edge.wire.commands import ALL_LAYERS, TrainTask
from tinyfleet.edge.wire.messages import Dense, Metrics, Sparse, Success

ENOUGH = 3
"""Replies that make a median of their own; of two, the median is their mean, which the longer one sets."""
REMEMBERED = 64
"""Devices whose last change stands in for a round's where the round has fewer than ENOUGH replies."""
CLIP_TOLERANCE = 1.001
"""A device clips in float32, and its changes may then travel as float16."""


def metrics_error(metrics: Metrics, task: TrainTask) -> str:
    """Why these counts can't be the result of a command; empty if they can."""
    steps = sum(phase.steps for phase in task.phases)
    if metrics.samples > steps or (steps and not metrics.samples):
        return f"replied that it learned from {metrics.samples} samples; it was asked for {steps}"
    if metrics.queried > task.query or (task.query and not metrics.queried):
        return f"replied that it scored {metrics.queried} samples; it was asked for {task.query}"
    if metrics.correct > metrics.queried:
        return f"replied that {metrics.correct} of {metrics.queried} samples were right"
    return ""


def update_error(parts: Sequence[Success], task: TrainTask, program: Program) -> str:
    """Why an update of these parts, in order, can't be what a command asked for; empty if it can."""
    if task.update is None:
        return "replied with an update; it was asked for none" if any(part.update for part in parts) else ""
    updates = [part.update for part in parts if part.update is not None]
    if not updates:
        return "replied without an update"
    shared = None if task.update.shared & ALL_LAYERS == ALL_LAYERS else program.in_layers(task.update.shared)
    count = program.n_params if shared is None else int(np.count_nonzero(shared))
    sparse = [update for update in updates if isinstance(update, Sparse)]
    if len(sparse) == len(updates):
        most = max(1, int(np.ceil(np.float32(task.update.density) * np.float32(count))))
        return _sparse_error(sparse, shared, min(most, count))
    if sparse or task.update.density < 1:
        return "replied with all parameters; it was asked for the largest changes"
    return _dense_error([update for update in updates if isinstance(update, Dense)], shared, count)


def _sparse_error(updates: Sequence[Sparse], shared: NDArray[np.bool_] | None, most: int) -> str:
    indices = np.concatenate([update.indices for update in updates])
    if len(indices) > most:
        return f"replied with {len(indices)} changes; it was asked for {most}"
    if not (indices[1:] > indices[:-1]).all():
        return "replied with changes out of order, or twice to the same parameter"
    if shared is not None and not shared[indices].all():
        return "replied with changes of parameters that stay on the device"
    return ""


def _dense_error(updates: Sequence[Dense], shared: NDArray[np.bool_] | None, count: int) -> str:
    ranges = sorted((update.offset, update.offset + len(update.values)) for update in updates)
    if any(first < end for (_, end), (first, _) in itertools.pairwise(ranges)):
        return "replied with some parameters twice"
    if sum(end - first for first, end in ranges) != count:
        return f"replied with {sum(end - first for first, end in ranges)} parameters; it was asked for {count}"
    if shared is not None and not all(shared[first:end].all() for first, end in ranges):
        return "replied with parameters that stay on the device"
    return ""


def clip_error(norm: float, task: TrainTask) -> str:
    """Why a change of this norm can't be one that the device clipped as it was told; empty if it can."""
    clip = 0.0 if task.update is None else task.update.clip
    if clip and not norm <= CLIP_TOLERANCE * clip:
        return f"replied with a change of norm {norm:.3g}; it was told to clip at {clip:.3g}"
    return ""


class NormBound:
    """Finds the changes that are too long: more than `max_ratio` times the median's L2 norm.

    The median is that of the round's replies. Where there are fewer than three, as in an asynchronous run or with
    TinyReptile, the last norms of the devices that replied before count too, each device once. As long as there are
    fewer than three devices, nothing is too long.

    Parameters
    ----------
    max_ratio
        At least 1; infinity turns the bound off.

    Raises
    ------
    UserError
        If the ratio is less than 1.

    Examples
    --------
    >>> bound = NormBound(5.0)
    >>> bound.too_long({"a": 1.0, "b": 1.5, "c": 9.0})
    {'c': 'replied with a change of norm 9, more than 5 times the median of 1.5'}
    >>> bound.too_long({"d": 7.0})
    {}
    >>> bound.too_long({"d": 30.0})
    {'d': 'replied with a change of norm 30, more than 5 times the median of 5.25'}
    """

    def __init__(self, max_ratio: float = MAX_NORM_RATIO) -> None:
        if not max_ratio >= 1:
            raise UserError(f"the largest change is at least once the median, not {max_ratio:g} times")
        self.max_ratio = max_ratio
        self._last: dict[str, float] = {}  # by device, the one that replied last at the end

    def too_long(self, norms: Mapping[str, float]) -> dict[str, str]:
        """Which of these devices' changes are too long, and why; remembers the norms, too long or not.

        An honest fleet whose changes grow is thereby believed again once most devices agree.
        """
        before = {device: norm for device, norm in self._last.items() if device not in norms}
        for device, norm in norms.items():
            self._last.pop(device, None)
            self._last[device] = norm
        while len(self._last) > REMEMBERED:
            del self._last[next(iter(self._last))]
        compared = [*norms.values()] if len(norms) >= ENOUGH else [*before.values(), *norms.values()]
        if len(compared) < ENOUGH:
            return {}
        median = statistics.median(compared)
        return {
            device: f"replied with a change of norm {norm:.3g}, more than {self.max_ratio:g} times the median of "
            f"{median:.3g}"
            for device, norm in norms.items()
            if norm > self.max_ratio * median
        }
