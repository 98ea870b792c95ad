"""What the tests of firmware share: a model, its samples, and the tools without which they are skipped."""

from pathlib import Path

import numpy as np
import pytest

from tinyfleet.edge.model import layers
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import ClientData
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.firmware_tools.firmware import build, emulate

ROOT = Path(__file__).parents[1]
FLEET, ID = "test", "board-01"
TOPICS = Topics(FLEET)
LIMIT = 30.0  # seconds that anything may take on a busy machine

NEEDS_TOOLS = [
    pytest.mark.skipif(
        not build.available(), reason="no cross compiler: apt-get install gcc-arm-none-eabi libnewlib-arm-none-eabi"
    ),
    pytest.mark.skipif(not emulate.available(), reason="no emulator: apt-get install qemu-system-arm"),
]


def samples() -> ClientData:
    """Six classes of ten made-up samples, 64 features each."""
    features = np.random.default_rng(1).integers(0, 256, (60, 64), np.uint8)
    return ClientData(features, np.arange(0, 61, 10, dtype=np.uint32), 1 / 255, 5)


def mlp() -> Program:
    return layers.build([layers.Dense(32), layers.ReLU(), layers.Dense(5)], (64,), "softmax_cross_entropy")


def build_firmware(board: str, folder: Path) -> Path:
    """The firmware of device ID for a board, as an ELF file in the folder."""
    return build.build(board, mlp(), samples(), FLEET, ID, folder)
