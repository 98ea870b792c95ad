"""Several Flower grids as one."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from tinyfleet.server.flower.internals import Run


class CompositeGrid(Grid):
    """Several grids as one, such as microcontrollers over MQTT together with Raspberry Pis that run a SuperNode.

    A node belongs to the grid that offers it. The run is the first grid's. Rounds run on all grids at the same time.

    Parameters
    ----------
    grids
        At least one.

    Raises
    ------
    ValueError
        If there is no grid.

    Examples
    --------
    ::

        with MqttGrid(broker, "home", program) as devices:
            strategy.start(CompositeGrid([grid, devices]), initial_arrays)  # grid: as Flower's ServerApp gets it
    """

    def __init__(self, grids: Sequence[Grid]) -> None:
        if not grids:
            raise ValueError("a CompositeGrid needs a grid")
        self._grids = list(grids)
        self._owner: dict[int, Grid] = {}  # by node id
        self._sent: dict[str, Grid] = {}  # by message id

    def set_run(self, run: Run) -> None:
        """Sets the run of every grid."""
        for grid in self._grids:
            grid.set_run(run)

    @property
    def run(self) -> Run:
        """The first grid's run record."""
        return self._grids[0].run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message of this run."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The nodes of all grids. Raises ValueError if two grids offer the same node."""
        owner: dict[int, Grid] = {}
        for grid in self._grids:
            for node in grid.get_node_ids():
                if owner.setdefault(node, grid) is not grid:
                    raise ValueError(f"two grids have a node {node}")
        self._owner |= owner
        return sorted(owner)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Pushes each message to the grid of its node."""
        ids = []
        for grid, part in self._split(messages):
            pushed = list(grid.push_messages(part))
            self._sent |= dict.fromkeys(pushed, grid)
            ids += pushed
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that have arrived, of all grids."""
        wanted = list(message_ids)
        replies = []
        for grid in self._grids:
            mine = [i for i in wanted if self._sent.get(i) is grid]
            replies += list(grid.pull_messages(mine)) if mine else []
        for reply in replies:
            self._sent.pop(reply.metadata.reply_to_message_id, None)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Every grid's replies to its messages."""
        parts = self._split(messages)
        with ThreadPoolExecutor(max_workers=max(len(parts), 1)) as pool:
            replies = pool.map(lambda part: list(part[0].send_and_receive(part[1], timeout=timeout)), parts)
            return [reply for grid_replies in replies for reply in grid_replies]

    def _split(self, messages: Iterable[Message]) -> list[tuple[Grid, list[Message]]]:
        parts: dict[int, tuple[Grid, list[Message]]] = {}
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self._owner:
                self.get_node_ids()
            if node not in self._owner:
                raise ValueError(f"no grid has a node {node}")
            grid = self._owner[node]
            parts.setdefault(id(grid), (grid, []))[1].append(message)
        return list(parts.values())
