"""The knowledge graph at scale: fleets on real boards, what they cost, and how long the questions take.

python benchmarks/graph.py --devices 10000 100000
python benchmarks/graph.py --devices 10000 --store http://127.0.0.1:7878   # a server of SPARQL 1.1, such as oxigraph's

Each size is loaded, asked and updated in a process of its own, so that memory is that of a store that has just been
opened; each query of the library is asked in one that is forked from it, and ended when it takes longer than --limit.
What a step finds is printed to stderr as it ends, and all of it in tables at the end. Figures are wall-clock, and
depend on what else the machine does; --json has the numbers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fleet_graph.comparisons import in_rdflib, in_s3n
from fleet_graph.fleet import MODELS, check_fleet, load, load_remote, real_boards
from fleet_graph.measuring import shown, tell
from fleet_graph.questions import ask, index, questions
from fleet_graph.updates import descriptions, end_to_end, publish, remote_updates, updates
from rich.console import Console
from rich.table import Table

from tinyfleet.ontology.store.remote_store import RemoteStore

RDFLIB_MOST, NESTED_MOST = 10_000, 2_000
LIMIT = 20.0  # seconds that a query of the library may take, unless --limit says otherwise


def apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The function's result, from a fresh process."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def embedded(folder: Path, n: int, limit: float, say: Callable[[str], None]) -> dict[str, Any]:
    known = folder / "loaded.json"
    found: dict[str, Any] = {}

    def step(what: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        say(f"{n} devices: {what}")
        part = apart(function, folder, n, *arguments)
        tell({name: value for name, value in part.items() if name != "questions"})
        found.update(part)

    if known.exists():
        found = json.loads(known.read_text())
        tell(found)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        step("loading", load)
        step("building the index", index)
        known.write_text(json.dumps(found))
    step("asking", ask, limit)
    step("updating", updates)
    if shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin"):
        step("end to end from MQTT", end_to_end)
    return found


def measure(sizes: list[int], url: str, kept: Path | None, limit: float, say: Callable[[str], None]) -> dict[str, Any]:
    check_fleet()
    report: dict[str, Any] = {"boards": len(real_boards()), "models": MODELS, "sizes": {}}
    for n in sizes:
        if url == "embedded":
            with tempfile.TemporaryDirectory() as folder:
                found = embedded((kept or Path(folder)) / str(n), n, limit, say)
        else:
            with RemoteStore(f"{url}/query", update_url=f"{url}/update", timeout=600) as store:
                store.update("CLEAR ALL")
                found = load_remote(store, n)
                found["questions"] = questions(store, n, limit)
                found |= remote_updates(store, n) | descriptions(store, n)
        report["sizes"][n] = found
    if url == "embedded":
        say(f"rdflib, {RDFLIB_MOST} devices")
        report["rdflib"] = {"devices": RDFLIB_MOST, **apart(in_rdflib, min(RDFLIB_MOST, max(sizes)))}
        tell(report["rdflib"])
        say(f"S3N's nested form, {NESTED_MOST} devices")
        report["s3n"] = {"devices": NESTED_MOST, **apart(in_s3n, NESTED_MOST)}
    return report


def show(report: dict[str, Any], console: Console) -> None:
    sizes = report["sizes"]

    def table(title: str, rows: list[tuple[str, Callable[[dict[str, Any]], str]]]) -> None:
        grid = Table(title=title, title_justify="left")
        grid.add_column("devices")
        for n in sizes:
            grid.add_column(f"{n:,}", justify="right")
        if "rdflib" in report:
            grid.add_column(f"rdflib, {report['rdflib']['devices']:,}", justify="right")
        for name, cell in rows:
            columns = [*sizes.values(), *([report["rdflib"]] if "rdflib" in report else [])]
            grid.add_row(name, *(cell(found) for found in columns))
        console.print(grid)

    def number(key: str, form: str = ",.1f") -> Callable[[dict[str, Any]], str]:
        return lambda found: format(found[key], form) if key in found else ""

    table(
        f"{report['boards']} boards, {report['models']} models",
        [
            ("load, s", number("load_s")),
            ("on disk, MB", number("disk_mb", ",.0f")),
            ("index built from the graph, s", number("index_built_s")),
            ("restart to first answer, s", number("first_answer_s", ".2f")),
            ("the same without a valid index, s", number("first_answer_without_index_s", ".2f")),
            ("memory after the questions, MB", number("memory_mb", ",.0f")),
            ("devices coming online a second, registry to store", number("updates_per_s at first", ",.0f")),
            ("checked updates a second of devices online, registry to store", number("updates_per_s alone", ",.0f")),
            ("the same beside a query that scans the graph", number("updates_per_s beside a long query", ",.0f")),
            ("devices coming online a second, end to end from MQTT", number("end_to_end_first_per_s", ",.0f")),
            ("processor time of the server for each, µs", number("cpu_us_per_first_status", ",.0f")),
            ("checked updates a second of devices online, end to end from MQTT", number("end_to_end_per_s", ",.0f")),
            ("processor time of the server for each, µs", number("cpu_us_per_status", ",.0f")),
            ("checked Thing Descriptions a second", number("descriptions_per_s", ",.0f")),
            ("server's start until all are marked offline, s", number("all_offline_s", ".1f")),
            ("memory of the server after that, MB", number("server_memory_mb", ",.0f")),
        ],
    )

    def latency(name: str) -> Callable[[dict[str, Any]], str]:
        def cell(found: dict[str, Any]) -> str:
            q = found["questions"].get(name)
            return shown(q) if q else ""

        return cell

    names = list(dict.fromkeys(name for found in sizes.values() for name in found["questions"]))
    table("Questions: median / 99th percentile, ms", [(name, latency(name)) for name in names])
    if "s3n" in report:
        grid = Table(title=f"Which devices have it, of {report['s3n']['devices']:,}", title_justify="left")
        for heading in ("form", "triples", "load, s", "memory, MB", "median, ms", "rows"):
            grid.add_column(heading, justify="left" if heading == "form" else "right")
        for form in ("nested", "flat"):
            found = report["s3n"][form]
            grid.add_row(form, f"{found['triples']:,}", f"{found['load_s']:.2f}", f"{found['memory_mb']:.0f}",
                          f"{found['median_ms']:.2f}", str(found["rows"]))  # fmt: skip
        console.print(grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[10_000, 100_000], help="sizes of fleets")
    parser.add_argument("--store", default="embedded", help="embedded, or the address of a server with /query, /update")
    parser.add_argument("--keep", type=Path, help="a folder for the loaded fleets, which a later run finds there")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that a query of the library may take")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--publish", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.publish:
        publish(args.publish[0], *map(int, args.publish[1:]))
        return
    progress = Console(stderr=True)
    report = measure(
        sorted(args.devices), args.store, args.keep, args.limit, lambda line: progress.print(f"[dim]{line}[/dim]")
    )
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report, Console(highlight=False, width=None if sys.stdout.isatty() else 160))


if __name__ == "__main__":
    main()
