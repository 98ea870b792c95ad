"""The store on the flash of an emulated micro:bit, whose machine is reset at any moment."""

from __future__ import annotations

import json
import random
import socket
import subprocess
from pathlib import Path

from firmware_fixtures import NEEDS_TOOLS

from tinyfleet.firmware_tools.boards.catalogue import load_board
from tinyfleet.firmware_tools.firmware import build

pytestmark = NEEDS_TOOLS
RESETS = 40


def test_a_reset_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    elf = build.build_store_check(load_board("microbit"), tmp_path / "store.elf")
    rng = random.Random(1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monitor = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        command = ["qemu-system-arm", "-M", "microbit", "-nographic", "-monitor", "none", "-serial", "none"]
        command += ["-semihosting-config", "enable=on,target=native", "-qmp", monitor, "-kernel", str(elf)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw") as control:
                control.readline()  # its greeting

                def say(what: str) -> None:
                    control.write(json.dumps({"execute": what}) + "\n")
                    control.flush()

                say("qmp_capabilities")
                assert process.stdout is not None
                starts, last, left = 0, 0, 3
                while starts <= RESETS:
                    line = process.stdout.readline()
                    words = line[max(0, line.rfind("start")) :].split()  # what was being said at the reset is cut
                    assert words and words[0] in ("start", "count"), words
                    count = int(words[1])
                    if words[0] == "start":
                        starts += 1
                        large = int(words[2])
                        assert count >= last, "a count that was said is kept"
                        assert large in (count, count + 1), "the large value is written first"
                        left = rng.randrange(1, 12)
                    last = count
                    left -= 1
                    if left == 0:
                        say("system_reset")  # while it writes the next one
                assert last > RESETS
        finally:
            process.kill()
            process.wait()
