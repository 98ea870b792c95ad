"""The documents: their links lead somewhere, their commands exist, and the README's code prints what it says."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import pytest
from click.exceptions import Exit, UsageError

from tinyfleet.__main__ import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = {"commands", "python", "wire-protocol", "queries", "vocabulary", "boards"}  # by tools/site_pages.py
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def prose(text: str) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```|^ {4}.*?$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The names of a page's headings, as the site makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if path.parent.name == "reference" and path.stem in GENERATED:
            continue
        assert path.is_file(), target
        assert not anchor or anchor in anchors(path.read_text()), target


def commands(text: str) -> Iterator[str]:
    """The lines in blocks of code that call tinyfleet, without the comments behind them."""
    for block in re.findall(r"(?:^ {4}.*\n)+|^```\n.*?^```", text, re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n *", " ", block).splitlines():
            call = re.sub(r"\s+#.*$", "", line.strip()).removeprefix("$ ")
            if call.startswith("tinyfleet "):
                yield call.split(" > ")[0]


def parse(command: click.Command, context: click.Context | None, words: list[str]) -> None:
    """Parses as click would, without running anything. Raises UsageError for what the command does not know."""
    name = command.name or "tinyfleet"
    if isinstance(command, click.Group):
        with click.Context(command, context, info_name=name) as inner:
            found, inner_command, rest = command.resolve_command(inner, words)
            assert found is not None and inner_command is not None
            parse(inner_command, inner, rest)
        return
    for parameter in command.params:  # files of an example are not here
        if isinstance(parameter.type, click.Path):
            parameter.type.exists = False
    with suppress(Exit):
        command.make_context(name, list(words), parent=context)


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_commands_exist_with_their_options(document: Path) -> None:
    for call in commands(document.read_text()):
        words = shlex.split(call)[1:]
        if words == ["--version"] or words[-1] == "--help":
            continue
        try:
            parse(cli, None, words)
        except UsageError as error:
            pytest.fail(f"{call}: {error.format_message()}")


def test_the_code_in_the_readme_prints_what_stands_below_it() -> None:
    found = re.search(r"```python\n(.*?)```\n\n    (.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    done = subprocess.run([sys.executable, "-c", found[1]], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [found[2]]


def test_the_tutorials_task_can_be_learned(tmp_path: Path) -> None:
    from tinyfleet.edge.tasks import load

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tutorials/your-own-data.md").read_text(), re.DOTALL)
    record, task_file = blocks
    subprocess.run([sys.executable, "-c", record], cwd=tmp_path, check=True)
    (tmp_path / "gestures.py").write_text(task_file)
    task = load(str(tmp_path / "gestures.py"))
    for index in range(8):
        task.client(index, 8).check_compatible(task.program)
    episodes = task.draw("held_out", range(3), 5, 10)
    assert episodes.support_x.shape == (3, 10, 32) and episodes.query_x.shape == (3, 20, 32)
    assert task.stream(0).drifts == (120,)


def test_images_are_small() -> None:
    for path in (ROOT / "docs" / "images").iterdir():
        assert path.stat().st_size < 300_000, path.name
