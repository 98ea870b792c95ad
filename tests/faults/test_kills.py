"""Whichever process of a fleet is killed, and whenever, all is well again without a hand."""

from pathlib import Path

import pytest
from fleet import Fleet
from kill_table import HEAD, TARGETS, kill_everywhere, row
from launcher import Point

#: A few points of each process; `make test-slow` takes all of them.
SOME = {
    "server": ["commit:3:after", "acknowledge:2:before"],
    "broker": ["PUBLISH:20:before"],
    "agent": ["publish status:2:after", "node output:5:before"],
    "gateway": ["publish reply:1:before"],
    "run": ["send:1:after", "update:4:before"],
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_process_killed_at_some_points(target: str, tmp_path: Path) -> None:
    with Fleet(tmp_path, target) as fleet:
        assert fleet.settle() == []
        for text in SOME[target]:
            outcome = fleet.kill_at(Point.parse(text))
            assert outcome.reached and outcome.complaints == [], outcome
    assert fleet.processes() == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_process_killed_at_every_point_and_at_random(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print()
        outcomes = kill_everywhere(target, tmp_path, random_kills=20)
        print("\n".join([HEAD, row(target, outcomes)]))
    assert [outcome for outcome in outcomes if outcome.complaints] == []
