"""The commands as a user meets them: their help, their options, and errors where something is wrong or missing."""

import os
import pty
import re
import shlex
import subprocess
import sys
import tty
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
from broker_fixtures import connection_options
from click.testing import CliRunner

from tinyfleet.__main__ import COMMANDS, cli
from tinyfleet.command_line import Command
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire import serial_frames
from tinyfleet.edge.wire.broker_address import BrokerAddress

ROOT = Path(__file__).parents[1]
TREE = {
    "demo": (),
    "server": ("start", "init", "rotate-keys", "login"),
    "run": ("start", "simulate"),
    "deploy": (),
    "agent": ("start",),
    "device": ("simulate", "enrol", "list", "revoke", "forget", "reboot", "reset"),
    "gateway": ("start",),
    "task": ("list",),
    "model": ("compile", "plan", "export", "describe", "match"),
    "firmware": ("boards", "build", "size", "export", "emulate"),
    "graph": ("build-catalogue", "load", "add-measurement", "import-selocml", "export-vocabulary"),
    "query": (),
}
PATHS = [(), *((name,) for name in TREE), *((name, inner) for name in TREE for inner in TREE[name])]
TWO_MEANINGS = {"--port": 2}
"""A server's port is a TCP port, a gateway's a serial port: both are what users of such programs call it."""


@cache
def find(path: tuple[str, ...]) -> click.Command:
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), name)
        assert found is not None
        command = found
    return command


def walk(path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    command = find(path)
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            yield from walk((*path, name))


def help_of(path: tuple[str, ...]) -> str:
    done = CliRunner().invoke(cli, [*path, "--help"], prog_name="tinyfleet")
    assert done.exit_code == 0, done.output
    return done.output


def test_the_tree_of_commands() -> None:
    assert sorted(walk()) == sorted(PATHS)
    assert list(COMMANDS) == list(TREE)


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_the_help_of_a_command(path: tuple[str, ...]) -> None:
    text = help_of(path)
    usage, summary = text.splitlines()[0], text.splitlines()[2].strip()
    assert usage.startswith(" ".join(["Usage: tinyfleet", *path])) and summary.endswith(".")
    assert "\\" not in text and "\b" not in text
    assert max(map(len, text.splitlines())) <= 80
    about, examples = text.split("\nExamples:\n")
    assert examples.strip() and "tinyfleet " in examples
    if isinstance(find(path), Command):
        assert " ".join(["tinyfleet", *path]) in examples, "an example of this very command"
    assert "…" not in about and "..." not in summary


def options() -> dict[str, dict[str, set[str]]]:
    """Option -> its help texts, and the commands that have each."""
    found: dict[str, dict[str, set[str]]] = {}
    for path in walk():
        for parameter in find(path).params:
            if isinstance(parameter, click.Option):
                for name in parameter.opts:
                    found.setdefault(name, {}).setdefault(parameter.help or "", set()).add(" ".join(path))
    return found


def test_an_option_means_the_same_in_every_command() -> None:
    table = options()
    different = {name: texts for name, texts in table.items() if len(texts) != TWO_MEANINGS.get(name, 1)}
    assert different == {}
    assert all(text for texts in table.values() for text in texts), "every option has a help text"


def test_every_argument_has_a_help_text() -> None:
    for path in walk():
        for parameter in find(path).params:
            if isinstance(parameter, click.Argument):
                assert parameter.help, path


def examples() -> Iterator[list[str]]:
    for path in walk():
        for line in help_of(path).split("\nExamples:\n")[1].splitlines():
            _, _, words = line.partition("tinyfleet ")
            yield words.split("'")[0].split()


def test_the_examples_name_commands_and_options_that_exist() -> None:
    for words in examples():
        path = tuple(words[:1] if not TREE[words[0]] else words[:2])
        known = {name for parameter in find(path).params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known, words


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["sever"], "there is no command 'sever'; did you mean 'server'?"),
        (["run", "strat"], "there is no command 'strat'; did you mean 'start'?"),
        (["model", "x"], "there is no command 'x'; choose one of compile, plan,"),
        (["query", "--lits"], "--list"),
    ],
)
def test_a_mistyped_command_suggests_the_nearest(words: list[str], hint: str) -> None:
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 2 and hint in done.output


def run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


BASE = [
    "numpy",
    "cffi",
    "_cffi_backend",
    "pycparser",
    "cbor2",
    "_cbor2",
    "paho",
    "typer",
    "click",
    "rich",
    "shellingham",
    "typing_extensions",
    "markdown_it",
    "mdurl",
    "pygments",
]
"""What `pip install tinyfleet` alone brings, by the modules' names."""
HIDE = f"""
import sys
from importlib.abc import MetaPathFinder
class Hidden(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if path is None and name not in {{*{BASE!r}, *sys.stdlib_module_names, 'tinyfleet'}}:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)
sys.meta_path.insert(0, Hidden())
from tinyfleet.__main__ import main
"""


def test_the_base_dependencies_are_enough_for_help_and_version() -> None:
    code = f"{HIDE}\nfor words in {[[*path, '--help'] for path in PATHS] + [['--version'], ['task', 'list']]!r}:\n"
    code += "    sys.argv[1:] = words\n    try: main()\n    except SystemExit as end: assert not end.code, words\n"
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Examples:") == len(PATHS) and "\ntinyfleet 0." in done.stdout


@pytest.mark.parametrize(
    ("words", "lacks", "extras"),
    [
        (["query", "clients"], "pyoxigraph", "server"),
        (["query", "--list"], "pyoxigraph", "server"),
        (["server", "start"], None, "server"),
        (["run", "start"], None, "edge,server"),
        (["gateway", "start", "--port", "x", "--broker", "mqtts://x"], "serial", "gateway"),
        (["firmware", "size", "x.elf"], "elftools", "firmware"),
        (["graph", "load", "x.ttl"], None, "server"),
        (["device", "simulate"], "sklearn", "edge"),
    ],
)
def test_a_command_whose_packages_are_missing_names_the_extra(words: list[str], lacks: str | None, extras: str) -> None:
    done = run(f"{HIDE}\nsys.argv[1:] = {words!r}\nmain()")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith(f", which is not installed: pip install 'tinyfleet[{extras}]'\n")
    assert lacks is None or f"this needs {lacks}," in done.stderr


@pytest.mark.parametrize("module", ["pyoxigraph", "elftools", "zcbor"])
def test_a_gateway_needs_only_its_own_extra(module: str) -> None:
    done = run(
        f"import sys; sys.modules[{module!r}] = None\n"
        "sys.argv[1:] = ['gateway', 'start', '--port', '/dev/none', '--broker', 'mqtts://x']\n"
        "from tinyfleet.__main__ import main; main()"
    )
    assert done.returncode == 2 and "cannot open the serial line /dev/none" in done.stderr


def test_help_imports_nothing_heavy() -> None:
    heavy = ("numpy", "rich", "cbor2", "paho", "pyoxigraph", "flwr", "sklearn")
    for words in (["--help"], ["run", "start", "--help"], ["--version"]):
        done = run(
            f"import sys; sys.argv[1:] = {words!r}\nfrom tinyfleet.__main__ import main\n"
            "try: main()\nexcept SystemExit: pass\n"
            f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
        )
        loaded = [] if words != ["run", "start", "--help"] else ["rich"]  # typer's help of an option imports it
        assert done.stderr.strip() == str(loaded), words


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tinyfleet", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("tinyfleet ")


def test_an_idle_gateway_takes_little_memory(broker: BrokerAddress) -> None:
    board, line = pty.openpty()
    tty.setraw(line)
    command = [sys.executable, "-m", "tinyfleet", "gateway", "start", "--port", os.ttyname(line)]
    process = subprocess.Popen([*command, *connection_options(broker)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        reader, kinds = serial_frames.FrameReader(), list[int]()
        while serial_frames.CONNECTED not in kinds:  # it greets a board again and again
            kinds += [frame.kind for frame in reader.feed(os.read(board, 4096))]
            hello = serial_frames.Frame(serial_frames.HELLO, "tinyfleet/home/devices/board/status", b"its will")
            os.write(board, serial_frames.encode(hello))
        memory = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        assert memory is not None and int(memory[1]) <= 50_000
    finally:
        process.terminate()
        process.communicate(timeout=20)
        os.close(board)
        os.close(line)


# Bad values, and an output that does not take everything


def tinyfleet(*words: str, shell: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own; `shell` is what follows it on the line."""
    line = f"{shlex.join([sys.executable, '-m', 'tinyfleet', *words])} {shell}"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def bad_numbers(kind: click.ParamType) -> tuple[str, ...]:
    """What an option of this type must refuse."""
    bounded = isinstance(kind, (click.IntRange, click.FloatRange))
    below = bounded and kind.min is not None and kind.min >= 0  # type: ignore[attr-defined]
    return ("nan", "inf", "1e400", "", "x", *["-1"] * below)


def test_a_number_that_is_none_or_out_of_range_is_refused_by_its_option() -> None:
    refused = 0
    for path in walk():
        command = find(path)
        arguments = ["x" for p in command.params if isinstance(p, click.Argument) and p.required]
        for option in command.params:
            if isinstance(option.type, (click.types.IntParamType, click.types.FloatParamType)):
                for value in bad_numbers(option.type):
                    done = CliRunner().invoke(cli, [*path, *arguments, option.opts[0], value])
                    assert done.exit_code == 2 and "Traceback" not in done.output, (path, option.opts, value)
                    refused += 1
    assert refused > 100


@pytest.mark.parametrize("out", ["missing/x.npz", ".", "locked/x.npz"])
def test_a_file_that_cannot_be_written_is_refused_before_any_round(tmp_path: Path, out: str) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    if out.startswith("locked") and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    done = CliRunner().invoke(cli, ["run", "simulate", "--task", "none", "--out", str(tmp_path / out)])
    assert isinstance(done.exception, UserError) and "task" not in str(done.exception)


def test_a_full_disk_costs_the_output_and_one_line() -> None:
    for words in (["query", "--list"], ["task", "list"], ["firmware", "boards"], ["query", "--help"]):
        done = tinyfleet(*words, shell="> /dev/full")
        assert (done.returncode, done.stderr) == (
            1,
            "error: the output cannot be written (No space left on device)\n",
        ), words


def test_a_reader_that_wants_no_more_ends_a_command_quietly() -> None:
    done = tinyfleet("query", "--list", shell="| head -n 1")
    assert done.returncode in (0, 1) and done.stderr == "" and done.stdout.startswith("query")
    done = tinyfleet("query", "--list", shell="| true")
    assert done.returncode in (0, 1) and done.stderr == ""


def test_a_terminal_of_ascii_gets_question_marks() -> None:
    done = tinyfleet("query", "--list", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.isascii() and not done.stderr
