"""How the graph's benchmark measures: memory, latencies, and limits of time; and what it prints meanwhile."""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BUDGET = 3.0  # seconds that a question is asked again and again


def rss() -> float:
    """MB, as Linux counts them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def answers(ask: Callable[[str], Any], query: str) -> list[Any]:
    """All of them, at once."""
    return list(ask(query))


def repeat(question: Callable[[], Any]) -> dict[str, Any]:
    """The question asked for a while: median and 99th percentile in ms, how often, and how long the answer is."""
    seconds, end, answer = list[float](), time.perf_counter() + BUDGET, None
    while not seconds or (time.perf_counter() < end and len(seconds) < 500):
        began = time.perf_counter()
        answer = question()
        seconds.append(time.perf_counter() - began)
    seconds.sort()
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "p99_ms": 1e3 * seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))],
        "times": len(seconds),
        "rows": len(answer) if answer is not None and hasattr(answer, "__len__") else None,
    }


def within(limit: float, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is measured in a process forked from this one; if it takes longer, by more than what `repeat` may, only
    that it does. Oxigraph cannot be told to stop, a process can."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(measure() | {"peak_memory_mb": rss()}).encode())
        finally:
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], limit + BUDGET)
    answer = os.read(reader, 4096) if ready else b""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    found: dict[str, Any] = json.loads(answer) if answer else {"over_limit_s": limit}
    return found


def tell(found: dict[str, Any]) -> None:
    """What has been found, as it is found, so that a run that is cut has said something."""
    for name, value in found.items():
        if name == "questions":
            tell(value)
            continue
        if isinstance(value, dict):
            value = shown(value)
        print(
            f"  {name}: {value:,.2f}" if isinstance(value, float) else f"  {name}: {value}", file=sys.stderr, flush=True
        )


def shown(question: dict[str, Any]) -> str:
    """Median and 99th percentile in ms."""
    if "over_limit_s" in question:
        return f"over {question['over_limit_s']:.0f} s"
    return f"{question['median_ms']:,.1f} / {question['p99_ms']:,.1f}"
