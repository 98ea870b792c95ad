"""Boards in QEMU: programs that print and end, and nodes whose serial port is a socket of this computer.

An emulator ends with `stop`, and with the process that started it, even if that process is killed: util-linux'
`setpriv`, where it is installed, asks the kernel for that (the parent-death signal).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path
from types import TracebackType

from tinyfleet.edge.errors import UserError
from tinyfleet.firmware_tools.boards.catalogue import BoardTarget

#: QEMU's virtual time under `-icount shift=6`: every instruction takes 64 ns, whatever it does.
NANOSECONDS_PER_INSTRUCTION = 64


def available() -> bool:
    """Whether QEMU is installed."""
    return shutil.which("qemu-system-arm") is not None


def _command(target: BoardTarget, elf: Path) -> list[str]:
    machine = target.emulated()
    if not available():
        raise UserError("QEMU for Arm is not installed; install it with: apt-get install qemu-system-arm")
    if not elf.is_file():
        raise UserError(f"there is no firmware at {elf}; build it with: tinyfleet firmware build")
    return ["qemu-system-arm", "-M", machine, "-nographic", "-monitor", "none", "-kernel", str(elf)]


def run_to_completion(target: BoardTarget, elf: Path, *, counting: bool = False, timeout: float = 60.0) -> str:
    """Run a program that ends by itself through semihosting.

    Parameters
    ----------
    target
        The board that it was built for.
    elf
        The program.
    counting
        Whether virtual time advances with the instructions, so that the board's clock counts them.
    timeout
        Seconds after which it is stopped.

    Returns
    -------
    str
        What it printed.

    Raises
    ------
    UserError
        If there is no emulator, or no such file.
    RuntimeError
        If the program fails; with its output.
    subprocess.TimeoutExpired
        If it does not end in time.
    """
    command = [*_command(target, elf), "-serial", "none", "-semihosting-config", "enable=on,target=native"]
    if counting:
        command += ["-icount", "shift=6"]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{elf.name} on {target.board.id} ended with status {done.returncode}: {done.stdout}")
    return done.stdout


class Emulator:
    """An emulated board that runs until it is stopped. Use it as a context manager, or call `stop`.

    Parameters
    ----------
    target
        The board.
    elf
        Its firmware.

    Attributes
    ----------
    url
        Its serial port, socket://127.0.0.1:PORT, which accepts connections already.

    Raises
    ------
    UserError
        If QEMU or the firmware is missing.
    """

    def __init__(self, target: BoardTarget, elf: Path) -> None:
        command = _command(target, elf)
        if shutil.which("setpriv"):
            # The shell covers the moment before setpriv asks for the signal: it checks that this process still runs.
            guard = ["setpriv", "--pdeathsig", "KILL", "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"', str(os.getpid())]
            command = [*guard, *command]
        # The port is bound here and handed over: no other process can take it in between.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.url = f"socket://127.0.0.1:{listener.getsockname()[1]}"
            fd = listener.fileno()
            command += ["-chardev", f"socket,id=uart,fd={fd},server=on,wait=off", "-serial", "chardev:uart"]
            started: list[subprocess.Popen[str]] = []
            ready = threading.Event()
            errors: list[OSError] = []
            self._output = ""

            # The kernel signals a child when the thread that started it ends, so this thread waits for the child.
            def watch() -> None:
                try:
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.PIPE,
                        text=True,
                        pass_fds=[fd],
                    )
                except OSError as error:
                    errors.append(error)
                    ready.set()
                    return
                started.append(process)
                ready.set()
                _, self._output = process.communicate()

            self._watcher = threading.Thread(target=watch, name=f"qemu {target.board.id}", daemon=True)
            self._watcher.start()
            ready.wait()
        if errors:
            raise errors[0]
        self._process = started[0]

    @property
    def running(self) -> bool:
        """Whether the emulator is still running."""
        return self._process.poll() is None

    @property
    def output(self) -> str:
        """What the emulator wrote to standard error, once it has ended."""
        return self._output.strip()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the emulator ends.

        Parameters
        ----------
        timeout
            Seconds to wait at most; None waits indefinitely.

        Returns
        -------
        bool
            Whether it has ended.
        """
        self._watcher.join(timeout)
        return not self._watcher.is_alive()

    def stop(self) -> None:
        """End the emulator; does nothing if it has ended already."""
        self._process.terminate()
        if not self.wait(5.0):
            self._process.kill()
            self.wait()

    def __enter__(self) -> Emulator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
