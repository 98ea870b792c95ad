"""Runs mosquitto: starts it again when it dies, and takes it along when this process dies."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tinyfleet.edge.errors import UserError, printable
from tinyfleet.edge.private_files import write_private
from tinyfleet.edge.wire.log_limit import LogLimit
from tinyfleet.server import broker_config

MAX_LINE = 1000
"""Characters of a line of its log that are read at a time."""
RETRY = (0.1, 2.0)
"""Seconds until it is started again: at first, and at most; the time doubles as long as it keeps dying."""
STABLE = 60.0
"""Seconds after which it counts as running well, so that the next restart is soon."""
MAX_FAILURES = 10
"""Starts in a row that may fail; after that nobody can help but the user."""
STOP_TIMEOUT = 5.0
"""Seconds that it may take to stop; then it is killed."""
RELOAD_TIMEOUT = 5.0
"""Seconds to wait until it has read its files once more."""

log = logging.getLogger(__name__)


def find_program() -> str | None:
    """The path of the program, also where only root has it in the PATH."""
    return shutil.which("mosquitto") or shutil.which(
        "mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/sbin"
    )


class Mosquitto:
    """A mosquitto process, and the thread that keeps it running.

    Parameters
    ----------
    program
        Path of the program.
    options
        Its configuration.
    folder
        For its configuration and its process number. It exists.
    on_failure
        Called once, with the reason, if it cannot be kept running.

    Attributes
    ----------
    restarts : int
        How often it was started again.
    connections : int
        Clients that have connected since the start, all together.

    Raises
    ------
    UserError
        If it does not start.
    """

    def __init__(
        self,
        program: str,
        options: broker_config.Options,
        folder: Path,
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._config, self._pid_file = _files(folder)
        write_private(self._config, broker_config.text(options))
        self._command = [program, "-c", str(self._config)]
        # The kernel kills it when the thread that started it ends; that thread is the one below, and lives as long as
        # this process. Other systems have no such thing: there the next server kills what is left over.
        if sys.platform == "linux" and (setpriv := shutil.which("setpriv")) is not None:
            self._command = [setpriv, "--pdeathsig", "KILL", *self._command]
        self._on_failure = on_failure
        self._warn = LogLimit(log.warning)
        self._process: subprocess.Popen[str] | None = None
        self._started = threading.Event()  # or it is clear that it will not start
        self._reloaded = threading.Event()
        self._stopping = threading.Event()
        self._said: list[str] = []  # the first lines of its log
        self._served = False  # whether it has ever run
        self.restarts = 0
        self.connections = 0
        self._thread = threading.Thread(target=self._supervise, name="mosquitto", daemon=True)
        self._thread.start()
        self._started.wait()
        if not self._served:
            self._thread.join()
            raise UserError(f"mosquitto does not start: {self._reason()}")

    def _supervise(self) -> None:
        delay, failures = RETRY[0], 0
        while True:
            began = time.monotonic()
            try:
                served = self._run()
            except OSError as error:
                served, self._said = False, [str(error)]
            if self._stopping.is_set() or not self._served:
                self._started.set()
                return
            failures = 0 if served else failures + 1
            if failures == MAX_FAILURES:
                self._on_failure(f"the broker died, and does not start again: {self._reason()}")
                return
            if time.monotonic() - began > STABLE:
                delay = RETRY[0]
            log.warning("the broker has died (%s); starting it again", self._reason())
            if self._stopping.wait(delay):
                return
            delay = min(2 * delay, RETRY[1])
            self.restarts += 1

    def _run(self) -> bool:
        """Run the program until it ends. True if it served clients."""
        self._said = []
        served = False
        with subprocess.Popen(
            self._command,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,  # so that Ctrl-C in a terminal ends the server alone, which then ends this
        ) as process:
            self._process = process
            with contextlib.suppress(OSError):  # a full disk; the kernel still ends it together with the server
                write_private(self._pid_file, f"{process.pid}\n")
            if self._stopping.is_set():  # `stop` may have missed this process
                process.kill()
            assert process.stderr is not None
            while line := process.stderr.readline(MAX_LINE):
                if " running" in line and not served:
                    served = self._served = True
                    self._started.set()
                self._read(line, served)
        if process.returncode < 0:
            self._said.append(f"killed by signal {-process.returncode}")
        self._pid_file.unlink(missing_ok=True)
        return served

    def _read(self, line: str, served: bool) -> None:
        """A line of its log."""
        if not served and len(self._said) < 20:
            self._said.append(line.strip())
        elif "New client connected" in line:
            self.connections += 1
        elif "Reloading config" in line:
            self._reloaded.set()
        elif "rror" in line:
            self._warn("mosquitto", f"mosquitto: {printable(line.strip(), 200)}")

    def _reason(self) -> str:
        """Why it ended: the last error of its log, else the last line."""
        lines = [line for line in self._said if "rror" in line or "killed" in line] or self._said
        return printable(lines[-1].split(": ", 1)[-1] if lines else "it says nothing", 200)

    def reload(self) -> None:
        """Make it read its files once more; returns when it has, or if it does not answer."""
        self._reloaded.clear()
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGHUP)
            self._reloaded.wait(RELOAD_TIMEOUT)

    def stop(self) -> None:
        """Stop it."""
        self._stopping.set()
        process = self._process
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
        self._thread.join()

    @staticmethod
    def kill_left_over(folder: Path) -> None:
        """Kill the mosquitto that a killed server has left behind: the process whose number is in the folder, if it
        runs on that very configuration. The caller has the data folder for itself, so no living server needs it."""
        config, pid_file = _files(folder)
        try:
            pid = int(pid_file.read_text())
        except (OSError, ValueError):
            return
        while _command_line(pid) == f"{find_program()} -c {config}":
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)  # until its ports are free
        pid_file.unlink(missing_ok=True)


def _files(folder: Path) -> tuple[Path, Path]:
    """Its configuration, and its process number."""
    return folder.absolute() / "mosquitto.conf", folder / "mosquitto.pid"


def _command_line(pid: int) -> str:
    """The command of a process; empty if it has ended."""
    if Path("/proc/self/cmdline").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return ""
    found = subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, text=True)
    return found.stdout.strip()
