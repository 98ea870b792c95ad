"""Is somebody in the room? From CO2, humidity and temperature, in different rooms: two-way, with fixed labels.

An episode is a room: K support samples of each label from the first six tenths of its time, query samples from the
rest. Rooms are split, so scores are for a new room at a later time. Labels are fixed: 0 is empty, 1 is occupied. A
device has a training room, and its stream also keeps the later time for query samples.

Light is left out, because a person who enters switches it on. A threshold on light is a baseline (see `baselines`), and
so is the majority, which is correct for half of the query samples.

Rooms, from the folder `occupancy` of TINYFLEET_DATA: the 24 rooms of Berkeley's Sutardja Dai Hall with motion (the
label) in at least 2 % of the minutes; and two held-out rooms from the UCI repository where people were counted:
Occupancy Detection (357) and Room Occupancy Estimation (864, without humidity).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge import datasets
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.layers import Dense, ReLU, build
from tinyfleet.edge.tasks import ClientData, Episodes, Hyperparameters, Recording, Split, Task, hashed

MOTION = 0.02  # share of the minutes, at least
LAGS = (5, 15)  # minutes over which a change is seen
FEATURES = 3 * (1 + len(LAGS))
HELD = 128  # samples of a class on a device
EARLY = 0.6  # of a room's time
FILES = {
    "berkeley_sdh_45rooms_1min.csv.gz": "a511d8b0e2d7cbcf18a121aac7f8ffca6d8fc7f75831c0b73e10ecdc260eae33",
    "uci_occupancy_detection.csv.gz": "b027154e5c353afd47f07a3988e53c3d41dd55fe538f808df4d4c2de005d6ce4",
    "uci_room_occupancy_estimation.csv.gz": "e85f07857ecca659c74e6a37d7d89eb844a9ac6dc83a1f16b41500c4f5293ba2",
}

PROGRAM = build([Dense(32), ReLU(), Dense(32), ReLU(), Dense(2)], (FEATURES,), "softmax_cross_entropy")
LARGE = build([Dense(128), ReLU(), Dense(128), ReLU(), Dense(2)], (FEATURES,), "softmax_cross_entropy")


@dataclass(frozen=True)
class Room:
    """A room, minute by minute: x float32 [n, FEATURES], light float64 [n], y int64 [n].

    early, late: the rows of the first share EARLY of the time, and the rest; the empty ones and the occupied ones.
    """

    name: str
    x: NDArray[np.float32]
    light: NDArray[np.float64]
    y: NDArray[np.int64]
    early: tuple[NDArray[np.int64], NDArray[np.int64]]
    late: tuple[NDArray[np.int64], NDArray[np.int64]]


def load() -> Task:
    rooms = split_rooms(read_rooms(_folder()))

    def client(index: int, fleet_size: int) -> ClientData:
        turn, which = divmod(index, len(rooms["training"]))
        room = rooms["training"][which]
        classes = []
        for label in (0, 1):
            rows = np.flatnonzero(room.y == label)
            step = max(1, len(rows) // HELD)
            classes.append(room.x[rows[turn % step :: step][:HELD]])
        return ClientData.of(classes, 1.0, 2, fixed=True)

    def draw(split: Split, seeds: Sequence[int], shots: int, queries: int) -> Episodes:
        chosen, support, query = _rows(rooms[split], seeds, shots, queries)
        label = np.tile(np.arange(2).repeat(shots), (len(seeds), 1))
        asked = np.tile(np.arange(2).repeat(queries), (len(seeds), 1))
        some = [rooms[split][room] for room in chosen]
        return Episodes(
            np.stack([room.x[rows] for room, rows in zip(some, support, strict=True)]),
            label,
            np.stack([room.x[rows] for room, rows in zip(some, query, strict=True)]),
            asked,
        )

    def stream(index: int) -> Recording:
        """A held-out room in time order."""
        room = rooms["held_out"][index % len(rooms["held_out"])]
        return Recording(room.x, room.y, None)

    return Task(
        name="presence",
        ways=2,
        program=PROGRAM,
        client=client,
        draw=draw,
        # The head is shared: labels are fixed, so the fleet's head is useful to a new device.
        meta=Hyperparameters(head_steps=0, steps=160, rate=0.05, alpha=1.0, density=0.1),
        fedavg=Hyperparameters(head_steps=0, steps=160, rate=0.05, alpha=1.0, density=1.0),
        large=LARGE,
        stream=stream,
    )


def baselines(split: Split, seeds: Sequence[int], shots: int, queries: int) -> dict[str, NDArray[np.float64]]:
    """Accuracies [episodes] without a model, on the episodes that `draw` gives.

    The majority of the support samples (a tie, so it predicts empty), and the threshold on light that is best on them.
    """
    rooms = split_rooms(read_rooms(_folder()))[split]
    chosen, support, query = _rows(rooms, seeds, shots, queries)
    seen, asked = np.arange(2).repeat(shots), np.arange(2).repeat(queries)
    scores = []
    for room, rows, late in zip(chosen, support, query, strict=True):
        light = rooms[room].light[rows]
        levels = np.unique(light)
        edges = np.array([-np.inf, *(levels[1:] + levels[:-1]) / 2])
        best = edges[np.argmax([np.mean((light > edge) == seen) for edge in edges])]
        scores.append(np.mean((rooms[room].light[late] > best) == asked))
    return {"majority": np.full(len(seeds), np.mean(asked == 0)), "light threshold": np.array(scores)}


def split_rooms(rooms: Sequence[Room]) -> dict[Split, list[Room]]:
    """Half of Berkeley's rooms train, a quarter is for validation, a quarter and all other rooms are held out."""
    here = [room for room in rooms if room.name.startswith("berkeley")]
    elsewhere = [room for room in rooms if room not in here]
    return {"training": here[0::2], "validation": here[1::4], "held_out": here[3::4] + elsewhere}


def _rows(
    rooms: Sequence[Room], seeds: Sequence[int], shots: int, queries: int
) -> tuple[list[int], list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Each episode's room, and its support and query rows, the empty ones first."""
    chosen = (hashed(seeds, 1, 1)[:, 0] * len(rooms)).astype(int).tolist()
    support: list[NDArray[np.int64]] = []
    query: list[NDArray[np.int64]] = []
    for room, seed in zip(chosen, seeds, strict=True):
        random = np.random.default_rng(seed)
        for rows, count, of_label in (
            (support, shots, rooms[room].early),
            (query, queries, rooms[room].late),
        ):
            if min(map(len, of_label)) < count:
                raise ValueError(f"room {rooms[room].name} has fewer than {count} samples of a label")
            rows.append(np.concatenate([random.choice(some, count, replace=False) for some in of_label]))
    return chosen, support, query


def _folder() -> Path:
    folder = datasets.local("occupancy")
    if folder is None:
        raise UserError(
            f"the rooms are not there; set TINYFLEET_DATA to a folder that has occupancy/ with {', '.join(FILES)}"
        )
    return folder


@cache
def read_rooms(folder: Path) -> list[Room]:
    """All rooms of these files. Raises UserError if a file is missing or damaged."""
    try:
        import pandas as pd
    except ImportError as error:
        raise UserError("reading the rooms needs pandas: pip install 'tinyfleet[edge]'") from error
    tables: list[Any] = []
    for name, sha256 in FILES.items():
        if not (folder / name).exists():
            raise UserError(f"{folder} has no {name}; set TINYFLEET_DATA to a folder whose occupancy/ has it")
        datasets.check([folder / name], sha256, name)
        tables.append(pd.read_csv(folder / name))
    berkeley, detection, estimation = tables
    rooms = []
    for number, table in berkeley.groupby("room"):
        y = (table["pir"] > 0).to_numpy().astype(np.int64)
        if y.mean() >= MOTION:
            rooms.append(
                _room(f"berkeley-{number}", table["co2"], table["humidity"], table["temperature"], table["light"], y)
            )
    table = detection.sort_values("date")
    y = table["Occupancy"].to_numpy().astype(np.int64)
    rooms.append(_room("uci-357", table["CO2"], table["Humidity"], table["Temperature"], table["Light"], y))
    table = estimation.iloc[::2]  # every half minute
    y = (table["Room_Occupancy_Count"] > 0).to_numpy().astype(np.int64)
    warm, light = (table[[f"S{i}_{what}" for i in range(1, 5)]].mean(axis=1) for what in ("Temp", "Light"))
    rooms.append(_room("uci-864", table["S5_CO2"], None, warm, light, y))
    return rooms


def _room(name: str, co2: Any, humidity: Any, temperature: Any, light: Any, y: NDArray[np.int64]) -> Room:
    """Levels near 0, the same way for every room, and by how much they have changed."""
    wet = np.zeros(len(y)) if humidity is None else humidity.to_numpy() / 10 - 5
    levels = np.stack([co2.to_numpy() / 100 - 4, wet, temperature.to_numpy() - 23], axis=1)
    changes = [5 * (levels - np.concatenate([np.repeat(levels[:1], lag, 0), levels[:-lag]])) for lag in LAGS]
    x = np.clip(np.concatenate([levels, *changes], axis=1), -5, 5).astype(np.float32)
    cut = int(EARLY * len(y))
    empty, occupied = np.flatnonzero(y == 0), np.flatnonzero(y == 1)
    return Room(
        name,
        x,
        light.to_numpy().astype(np.float64),
        y,
        early=(empty[empty < cut], occupied[occupied < cut]),
        late=(empty[empty >= cut], occupied[occupied >= cut]),
    )
