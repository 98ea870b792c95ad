"""Kills each process of a fleet, and a run, at every point at which it sends or stores something, and at random.

    python tests/faults/kill_table.py [--every 1] [--random 20] [server broker agent gateway run]

Prints each point at which something was not well again, and a table of all. --every 5 takes every fifth point.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fleet import Fleet, Outcome
from launcher import Point

TARGETS = ("server", "broker", "agent", "gateway", "run")


def kill_everywhere(target: str, folder: Path, every: int = 1, random_kills: int = 0) -> list[Outcome]:
    """The outcomes of all kills of one target.

    Parameters
    ----------
    target
        One of `TARGETS`.
    folder
        For the fleet's data.
    every
        Of the points, take every n-th.
    random_kills
        How often to kill it at random moments under load, besides.
    """
    with Fleet(folder, target) as fleet:
        assert fleet.settle() == []
        points = fleet.points()
        show_points(target, points)
        outcomes = []
        for point in points[::every]:
            outcomes.append(fleet.kill_at(point))
            show(outcomes[-1])
        for outcome in fleet.kill_randomly(random_kills, seed=len(target)):
            outcomes.append(outcome)
            show(outcome)
    left = fleet.processes()
    assert left == [], f"processes are left: {left}"
    return outcomes


def show_points(target: str, points: Sequence[Point]) -> None:
    """Print the list of points, those of one kind together."""
    kinds = Counter(point.kind for point in points)
    print(
        f"{target}: {len(points)} points: " + ", ".join(f"{kind} {count}" for kind, count in kinds.items()), flush=True
    )


def show(outcome: Outcome) -> None:
    """Print what was not well again."""
    for complaint in outcome.complaints:
        print(f"  {outcome.point}: {complaint}", flush=True)


def row(target: str, outcomes: Sequence[Outcome]) -> str:
    """The table's row of one target."""
    reached = [outcome for outcome in outcomes if outcome.reached]
    well = [outcome for outcome in outcomes if not outcome.complaints]
    seconds = [outcome.seconds for outcome in reached if not outcome.complaints] or [float("nan")]
    return (
        f"| {target} | {len(outcomes)} | {len(reached)} | {len(well)} | "
        f"{min(seconds):.1f} / {statistics.median(seconds):.1f} / {max(seconds):.1f} |"
    )


HEAD = """| process | kills | reached | well again | seconds: min / median / max |
|---|---|---|---|---|"""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*", default=TARGETS)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--random", type=int, default=20)
    given = parser.parse_args()
    rows = []
    for target in given.targets:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(target, kill_everywhere(target, Path(folder), given.every, given.random)))
            print(rows[-1], flush=True)
    print("\n".join([HEAD, *rows]))


if __name__ == "__main__":
    main()
