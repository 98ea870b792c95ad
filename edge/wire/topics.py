"""The topics of a fleet's messages on the broker."""

from __future__ import annotations

import re
from typing import Any

from tinyfleet.edge.wire.errors import ProtocolError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,32}")
ANNOUNCEMENT = b"\x01"
"""Payload of a driver's announcement: any that is not empty says the same."""
_NUMBER = r"(0|[1-9][0-9]{0,9})"


class Topics:
    """The topics of one fleet.

    Parameters
    ----------
    fleet
        Its name: 1 to 32 letters, digits, dots, dashes or underscores. A device's name is the same.

    Raises
    ------
    ProtocolError
        If a name is not such a name.

    Examples
    --------
    >>> topics = Topics("home")
    >>> topics.command("kitchen")
    'tinyfleet/home/devices/kitchen/command'
    >>> topics.parse("tinyfleet/home/runs/5/1/0")
    ('weights', (5, 1, 0))
    """

    def __init__(self, fleet: str) -> None:
        if not _NAME.fullmatch(fleet):
            raise ProtocolError(f"a fleet's name is 1 to 32 letters, digits, '.', '_' or '-', not {fleet!r:.50}")
        self.fleet = fleet
        self.root = f"tinyfleet/{fleet}"
        root = re.escape(self.root)
        self._device = re.compile(rf"{root}/devices/({_NAME.pattern})/(td|status|command|reply)")
        self._weights = re.compile(rf"{root}/runs/{_NUMBER}/{_NUMBER}/{_NUMBER}")
        self._driver = re.compile(rf"{root}/drivers/(run|model)/([0-9a-f]{{1,16}})/{_NAME.pattern}")
        self._submission = re.compile(rf"{root}/submissions/({_NAME.pattern})")
        self._program = re.compile(rf"{root}/models/([0-9a-f]{{16}})/{_NUMBER}")

    def td(self, id: str) -> str:
        """Of the device's Thing Description. Here and below, the id "+" gives the filter for all devices."""
        return self._of(id, "td")

    def status(self, id: str) -> str:
        """Of its status, and of its will."""
        return self._of(id, "status")

    def command(self, id: str) -> str:
        """Of the commands to it."""
        return self._of(id, "command")

    def reply(self, id: str) -> str:
        """Of its replies."""
        return self._of(id, "reply")

    def echo(self, id: str) -> str:
        """A topic that a device may write and read, to find out whether the broker does what it acknowledges."""
        return self._of(id, "echo")

    def group_command(self, group: str) -> str:
        """Of the commands to all devices of a group."""
        if not _NAME.fullmatch(group):
            raise ProtocolError(f"a group's name is 1 to 32 letters, digits, '.', '_' or '-', not {group!r:.50}")
        return f"{self.root}/groups/{group}/command"

    @property
    def time(self) -> str:
        """Of the time, for devices without a clock."""
        return f"{self.root}/time"

    def submission(self, session: str) -> str:
        """Of the commands that a session asks the server to send; "+" gives the filter for all sessions."""
        return f"{self.root}/submissions/{session}"

    def refused(self, session: str) -> str:
        """Of those that the server does not send."""
        return f"{self.root}/refused/{session}"

    def weights(self, run: int, round: int, chunk: int | str = "+") -> str:
        """The topic of one chunk of a round's weights; by default the filter for all of them."""
        return f"{self.root}/runs/{run}/{round}/{chunk}"

    def program(self, model: bytes, chunk: int | str = "+") -> str:
        """The topic of one chunk of a program; by default the filter for all of them."""
        return f"{self.root}/models/{model.hex()}/{chunk}"

    def every(self, kind: str) -> str:
        """The filter for all topics of a kind: "runs", "models", or those of one of them, as in "runs/5"."""
        return f"{self.root}/{kind}/#"

    def driver(self, kind: str, id: int | bytes | str, session: str = "+") -> str:
        """Of the announcement that a session drives a run (its number), or the deployment of a model (its id): it is
        retained, and cleared by the session's will."""
        name = id.hex() if isinstance(id, bytes) else str(id)
        return f"{self.root}/drivers/{kind}/{name}/{session}"

    def parse(self, topic: str) -> tuple[str, tuple[Any, ...]] | None:
        """What a topic is: ("td" | "status" | "command" | "reply", (id,)), ("weights", (run, round, chunk)),
        ("program", (model, chunk)), ("driver", ("run", run) or ("model", model in hexadecimal digits)),
        ("submission", (session,)), or None if it is not one of these of this fleet."""
        if found := self._device.fullmatch(topic):
            return found[2], (found[1],)
        if found := self._weights.fullmatch(topic):
            run, round_, chunk = (int(number) for number in found.groups())
            return ("weights", (run, round_, chunk)) if max(run, round_, chunk) <= 0xFFFFFFFF else None
        if found := self._driver.fullmatch(topic):
            kind, id = found.groups()
            return "driver", (kind, int(id) if kind == "run" and id.isdecimal() else id)
        if found := self._submission.fullmatch(topic):
            return "submission", (found[1],)
        if found := self._program.fullmatch(topic):
            return ("program", (bytes.fromhex(found[1]), int(found[2]))) if int(found[2]) <= 0xFFFFFFFF else None
        return None

    def _of(self, id: str, kind: str) -> str:
        if id != "+" and not _NAME.fullmatch(id):
            raise ProtocolError(f"a device's name is 1 to 32 letters, digits, '.', '_' or '-', not {id!r:.50}")
        return f"{self.root}/devices/{id}/{kind}"
