"""The only place that uses names of Flower outside its public API.

Flower 1.41 makes a ``Message`` only in a process that knows its run, task and node, as the processes that Flower starts
do. Our server is a process of its own, so it sets them here.
"""

import logging
from uuid import uuid4

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore import log
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["NODE_FAILED", "NODE_UNAVAILABLE", "NO_REPLY", "Run", "log", "log_level", "new_run", "stamp"]

NODE_FAILED: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
NODE_UNAVAILABLE: int = ErrorCode.NODE_UNAVAILABLE
NO_REPLY: int = ErrorCode.REPLY_MESSAGE_UNAVAILABLE


def new_run(run_id: int) -> Run:
    """An empty run record; and this process's identity in it, unless Flower started the process and set one."""
    try:
        TaskIdentity.task_id  # noqa: B018 - raises when it is not set
    except RuntimeError:
        TaskIdentity.task_id = 1
        TaskIdentity.run_id = run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
    return Run.create_empty(run_id)


def stamp(message: Message) -> str:
    """Gives a message the id that a SuperLink would give it, and returns it. Its replies refer to that id."""
    message.metadata.__dict__["_message_id"] = message_id = str(uuid4())
    return message_id


def log_level(level: int) -> None:
    """Sets Flower's log level: its strategies log a page a round at INFO, and commands show their own progress."""
    logging.getLogger("flwr").setLevel(level)
