"""The language of the house: finds phrases and public names that CONTRIBUTING's glossary forbids.

    python tests/language.py [--names | --phrases] [--count] [FILE ...]

Prints every hit as `file:line: phrase`, or with --count the number of hits of each file. Ends with 1 if there is any.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
GLOSSARY = ROOT / "CONTRIBUTING.md"
#: Third parties' words, generated lists, and the list of phrases itself.
EXEMPT = re.compile(
    r"LICENSE|THIRD_PARTY_NOTICES|.*\.lock|.*package(-lock)?\.json|tests/corpus/.*|.*\.(svg|png|ico|woff2?|npz|bin|mote)|"
    r"tests/(test_)?language\.py"
)
C_SUFFIXES = {".c", ".h", ".ino", ".in", ".cddl"}
#: Where a public name is part of what somebody else's code calls.
PACKAGES = ("edge", "server", "ontology", "firmware_tools", "tinyfleet")

Text = list[tuple[int, str]]
"""(line number, what a person reads on it)"""


@dataclass(frozen=True)
class Hit:
    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Forbidden:
    phrases: tuple[re.Pattern[str], ...]
    names: frozenset[str]


def section() -> str:
    """The part of CONTRIBUTING that lists what is forbidden."""
    match = re.search(r"^## Forbidden phrases\n(.*?)(?=^## |\Z)", GLOSSARY.read_text(), re.MULTILINE | re.DOTALL)
    assert match is not None, "CONTRIBUTING.md has no section 'Forbidden phrases'"
    return match[1]


def forbidden() -> Forbidden:
    """The regular expressions, from the first column of the table, and the names, from the paragraph behind it."""
    text = section()
    rows = re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)
    phrases = [re.compile(row.replace(r"\|", "|"), re.IGNORECASE) for row in rows]
    block = re.search(r"^Public names that the lint forbids.*?:\n`(.*?)`", text, re.MULTILINE | re.DOTALL)
    assert phrases and block is not None
    return Forbidden(tuple(phrases), frozenset(block[1].split()))


def files() -> list[str]:
    """Tracked text files that people read."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if not EXEMPT.fullmatch(name) and is_text(ROOT / name)]


def is_text(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        path.read_text()
    except UnicodeDecodeError:
        return False
    return True


def python_text(source: str) -> Text:
    """Comments and strings."""
    text: Text = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING) or "FSTRING_MIDDLE" in tokenize.tok_name[token.type]:
            text += [(token.start[0] + i, line) for i, line in enumerate(token.string.split("\n"))]
    return text


def c_text(source: str) -> Text:
    """Comments and strings of C, and of CDDL, whose comments begin with a semicolon at the start of a line or later."""
    text: Text = []
    for match in re.finditer(
        r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|(?:^|(?<= ));[^\n]*', source, re.DOTALL | re.MULTILINE
    ):
        first = source.count("\n", 0, match.start()) + 1
        text += [(first + i, line) for i, line in enumerate(match[0].split("\n"))]
    return text


def text_of(name: str, source: str) -> Text:
    """What a person reads of a file."""
    suffix = Path(name).suffix
    if suffix in (".py", ".pyi"):
        return python_text(source)
    if suffix in C_SUFFIXES:
        return c_text(source)
    if suffix == ".rq":
        return [(i, line) for i, line in enumerate(source.split("\n"), 1) if line.lstrip().startswith("#")]
    return list(enumerate(source.split("\n"), 1))


def phrases(text: Text, patterns: Iterable[re.Pattern[str]]) -> Iterator[tuple[int, str]]:
    """Hits, also of phrases that go on in the next line: comment signs and indents between two lines are left out."""
    joined = ""
    starts: list[tuple[int, int]] = []
    for line, words in text:
        starts.append((len(joined), line))
        joined += re.sub(r"^\s*(#:?|//|\*|;|>)?\s*|\s+$", "", words) + " "
    for pattern in patterns:
        for match in pattern.finditer(joined):
            line = max((start, line) for start, line in starts if start <= match.start())[1]
            yield line, match[0]


def _targets(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def _is_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a command of the command line is called so, such as `tinyfleet model plan`."""
    return any("command" in ast.dump(decorator) for decorator in node.decorator_list)


def _public(body: list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """What a module or a class defines for others; not what a function keeps to itself or an underscore marks."""
    for node in body:
        yield from ((node.lineno, name) for name in _targets(node))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.lineno, node.name
            yield from _public(node.body)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_private(node.name):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [argument.arg for argument in arguments]
            if _is_command(node):
                continue  # `tinyfleet model plan`, and options such as --explain
            if not (node.name == "read" and names[1:] == ["size"]):
                yield node.lineno, node.name
            yield from ((argument.lineno, argument.arg) for argument in arguments)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, alias.asname) for alias in node.names if alias.asname)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def python_names(source: str) -> Iterator[tuple[int, str]]:
    """Public names: classes, functions, parameters, fields, constants and aliases of modules."""
    yield from _public(ast.parse(source).body)


def other_names(name: str, source: str) -> Iterator[tuple[int, str]]:
    """Identifiers of a public C header; rules and fields of CDDL; terms of a vocabulary."""
    if name.endswith(".h") and "/include/" in name:
        code = re.sub(
            r'/\*.*?\*/|//[^\n]*|"[^"\n]*"', lambda match: re.sub(r"[^\n]", " ", match[0]), source, flags=re.DOTALL
        )
        pattern = r"\b[A-Za-z_]\w*\b"
        exempt = {"do"}  # a keyword of C
    elif name.endswith(".cddl"):
        code = re.sub(r";[^\n]*", "", source)
        pattern = r"[A-Za-z][\w-]*(?=\s*[:=])"
        exempt = set()
    elif name.endswith(".ttl"):
        code = source
        pattern = r"(?<=\btf:)\w+"
        exempt = set()
    else:
        return
    for match in re.finditer(pattern, code):
        if match[0] not in exempt:
            yield source.count("\n", 0, match.start()) + 1, match[0]


def names(name: str, source: str) -> Iterator[tuple[int, str]]:
    if Path(name).parts[0] not in PACKAGES:
        return
    if name.endswith((".py", ".pyi")):
        yield from python_names(source)
    else:
        yield from other_names(name, source)


def check(listed: Iterable[str], want_phrases: bool = True, want_names: bool = True) -> list[Hit]:
    rules = forbidden()
    hits: set[Hit] = set()
    for name in listed:
        source = (ROOT / name).read_text()
        if want_phrases:
            text = text_of(name, source)
            if name == GLOSSARY.name:  # names the words in order to forbid them
                listed_words = set(section().split("\n"))
                text = [(i, line) for i, line in text if not line.startswith("|") and line not in listed_words]
            hits |= {Hit(name, line, f'"{phrase}"') for line, phrase in phrases(text, rules.phrases)}
        if want_names:
            hits |= {Hit(name, line, f"name {word}") for line, word in names(name, source) if word in rules.names}
    return sorted(hits, key=lambda hit: (hit.file, hit.line, hit.text))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="files or folders (default: all that are tracked)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--phrases", action="store_true", help="only phrases")
    only.add_argument("--names", action="store_true", help="only names")
    parser.add_argument("--count", action="store_true", help="print the number of hits of each file")
    options = parser.parse_args()
    chosen = [name for name in files() if not options.files or any(Path(name).is_relative_to(f) for f in options.files)]
    hits = check(chosen, not options.names, not options.phrases)
    if options.count:
        for name, count in Counter(hit.file for hit in hits).most_common():
            print(f"{count:5} {name}")
        print(f"{len(hits):5} hits")
    else:
        print(*hits, sep="\n")
    return 1 if hits else 0


if __name__ == "__main__":
    sys.exit(main())
