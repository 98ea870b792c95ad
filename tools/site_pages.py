"""A hook of MkDocs: writes the documentation site's reference pages from the code they describe.

`make docs` calls it. Each function below reads one source (the command tree, the public names, the wire's CDDL file,
the query library, the vocabulary, the board files) and returns one page of Markdown.
"""

import tomllib
from collections.abc import Callable, Iterator
from html import escape
from inspect import cleandoc
from pathlib import Path
from types import ModuleType
from typing import Any

import click

ROOT = Path(__file__).parents[1]
MERMAID = ROOT / "build" / "mermaid.min.js"


def command_tree(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below `command`, with the words that call it, in the order of the help texts."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path[-1])
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                yield from command_tree(inner, (*path, name))


def commands_page() -> str:
    """The command line, from the click commands: usage, help text, arguments and options."""
    from tinyfleet.__main__ import cli

    lines = [
        "# Commands",
        "",
        "Written from the command line's own help texts. `tinyfleet --help` and every `tinyfleet COMMAND --help` print"
        " the same.",
        "",
    ]
    for path, command in command_tree(cli, ("tinyfleet",)):
        context = click.Context(command, info_name=" ".join(path))
        usage = " ".join(piece.replace("\\[", "[") for piece in command.collect_usage_pieces(context))
        lines += [f"{'#' * min(len(path) + 1, 4)} {' '.join(path)}", "", f"    {' '.join(path)} {usage}", ""]
        lines += [_help_text(command.help or ""), ""]
        rows = [row for parameter in command.get_params(context) if (row := _parameter_row(parameter, context))]
        if rows:
            lines += ["| option | meaning |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _help_text(text: str) -> str:
    """A command's help: paragraphs as they are, the examples as one block of code."""
    prose, _, examples = cleandoc(text).replace("\b", "").partition("Example")
    result = escape(prose.strip(), quote=False)
    if examples:
        calls = [line.strip() for line in examples.partition(":")[2].splitlines() if line.strip()]
        joined = ["    " + line if line.startswith("tinyfleet") else "      " + line for line in calls]
        result += "\n\n" + "\n".join(joined)
    return result


def _parameter_row(parameter: click.Parameter, context: click.Context) -> str:
    record = parameter.get_help_record(context)
    if record is None or "--help" in parameter.opts:
        return ""
    name, meaning = (part.replace("\\[", "[").replace("|", "\\|") for part in record)
    return f"| `{name}` | {escape(meaning, quote=False)} |"


def python_page() -> str:
    """The public Python names, each by mkdocstrings from its docstring."""
    import tinyfleet

    lines = ["# Python", "", "The public names. Everything else is internal and may change.", ""]
    lines += ["    import tinyfleet", ""]
    for name in sorted(getattr(tinyfleet, "__all__", ())):
        value = getattr(tinyfleet, name)
        if isinstance(value, str):  # the version
            continue
        path = value.__name__ if isinstance(value, ModuleType) else f"{value.__module__}.{value.__qualname__}"
        lines += [f"::: {path}", "    options:", f"      heading: {name}", f"      toc_label: {name}", ""]
    return "\n".join(lines)


def wire_page() -> str:
    """The wire protocol: the CDDL file itself, its opening comment as the introduction."""
    text = (ROOT / "edge" / "wire" / "protocol.cddl").read_text(encoding="utf-8")
    return cleandoc("""
        # Wire protocol

        What a server and its devices send each other, over MQTT or, framed, over a serial line. This is
        `edge/wire/protocol.cddl`, the one source of the messages' form: the C code that encodes and decodes them is
        generated from it, and the Python code is tested against it. Messages are CBOR (RFC 8949); the language of this
        file is CDDL (RFC 8610).

        ```text
        {}
        ```
        """).format(text.strip().replace("\n", "\n"))


def queries_page() -> str:
    """The query library, from the comment at the head of every .rq file."""
    from pyoxigraph import QuerySolutions, Store

    lines = [
        "# Query library",
        "",
        "`tinyfleet query NAME --param name=value` asks one; leave a parameter out and it is free. A query with a"
        " column `?id` also selects devices for `tinyfleet run start --select` and `tinyfleet deploy --select`.",
        "",
    ]
    for path in sorted((ROOT / "ontology" / "queries").glob("*.rq")):
        text = path.read_text(encoding="utf-8")
        head, _, body = text.partition("\n\n")
        about, _, parameters = "\n".join(line.removeprefix("#").strip() for line in head.splitlines()).partition("\n\n")
        lines += [f"## {path.stem}", "", escape(about.replace("\n", " "), quote=False), ""]
        if parameters.strip():
            pairs = [line.split(": ", 1) for line in parameters.splitlines() if ": " in line]
            lines += ["| parameter | meaning |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in pairs), ""]
        results = Store().query(text)
        if isinstance(results, QuerySolutions):
            lines += ["Columns: " + ", ".join(f"`{variable.value}`" for variable in results.variables), ""]
        lines += ['??? note "SPARQL"', "", "    ```sparql", *(f"    {line}" for line in body.strip().splitlines())]
        lines += ["    ```", ""]
    return "\n".join(lines)


def vocabulary_page() -> str:
    """The terms of the vocabulary, from tinyfleet.ttl."""
    from rdflib import OWL, RDF, RDFS, Graph, URIRef
    from rdflib.namespace import DCTERMS, SKOS

    graph = Graph().parse(ROOT / "ontology" / "vocabulary" / "tinyfleet.ttl")
    namespace = "https://w3id.org/tinyfleet#"
    ours = {term for term in graph.subjects(RDF.type) if isinstance(term, URIRef) and term.startswith(namespace)}

    def link(term: Any) -> str:
        if term in ours:
            return f"[`tf:{term.removeprefix(namespace)}`](#{term.removeprefix(namespace)})"
        return f"`{graph.namespace_manager.normalizeUri(term)}`" if isinstance(term, URIRef) else ""

    version = graph.value(URIRef(namespace), OWL.versionInfo)
    lines = ["# Vocabulary", "", f"`tf:` is `{namespace}`" + (f", version {version}." if version else "."), ""]
    lines += ["A server shows the same terms, with what the shapes require, at `/vocabulary`.", ""]
    kinds = [("Classes", [OWL.Class]), ("Properties", [OWL.ObjectProperty, OWL.DatatypeProperty])]
    relations = [
        ("subclass of", RDFS.subClassOf),
        ("same as", OWL.equivalentClass),
        ("subproperty of", RDFS.subPropertyOf),
        ("of", RDFS.domain),
        ("value", RDFS.range),
    ]
    for title, types in kinds:
        lines += [f"## {title}", "", "| term | meaning | relations |", "|---|---|---|"]
        for term in sorted({t for kind in types for t in graph.subjects(RDF.type, kind)} & ours, key=str.lower):
            name = str(term).removeprefix(namespace)
            meaning = next(
                (
                    str(text)
                    for predicate in (SKOS.definition, RDFS.comment, DCTERMS.description, RDFS.label)
                    for text in graph.objects(term, predicate)
                ),
                "",
            )
            others = [
                f"{label} {', '.join(links)}"
                for label, predicate in relations
                if (links := [text for other in sorted(graph.objects(term, predicate)) if (text := link(other))])
            ]
            text = escape(" ".join(meaning.split()), quote=False).replace("|", "\\|")
            lines.append(f'| <span id="{name}"></span>`tf:{name}` | {text} | {"; ".join(others)} |')
        lines.append("")
    return "\n".join(lines)


FILTER = """
<p><label>Show boards with <input id="filter" type="search" placeholder="M4, uart, 256 ..."></label></p>
<script>
document.getElementById("filter").addEventListener("input", event => {
  const words = event.target.value.toLowerCase().split(/\\s+/).filter(Boolean)
  for (const row of document.querySelectorAll("article table tbody tr"))
    row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word))
})
</script>
"""


def boards_page() -> str:
    """The boards that firmware_tools/boards describes."""
    lines = [
        "# Boards",
        "",
        "From the files in `firmware_tools/boards`. `tinyfleet firmware boards` prints the same list. A board with a"
        " serial driver runs a device node; one without runs measurements only; one without firmware runs the agent.",
        FILTER,
        "| board | name | processor | clock, MHz | RAM, KB | flash, KB | firmware | serial | emulated | sensors |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted((ROOT / "firmware_tools" / "boards").glob("*.toml")):
        board = tomllib.loads(path.read_text(encoding="utf-8"))
        build = board.get("build", {})
        uart = build.get("uart", {}).get("driver", "")
        machine = board.get("emulator", {}).get("machine", "")
        sizes = " | ".join(f"{board[key] // scale:,}" for key, scale in SIZES)
        cells = ["yes" if build else "no", uart or "none", f"QEMU {machine}" if machine else "no"]
        sensors = ", ".join(board.get("sensors", ())) or "none"
        lines.append(
            f"| `{board['id']}` | {board['title']} | {board['mcu']} | {sizes} | {' | '.join(cells)} | {sensors} |"
        )
    return "\n".join(lines) + "\n"


SIZES = (("clock_hz", 1_000_000), ("ram_bytes", 1024), ("flash_bytes", 1024))

PAGES: dict[str, Callable[[], str]] = {
    "reference/commands.md": commands_page,
    "reference/python.md": python_page,
    "reference/wire-protocol.md": wire_page,
    "reference/queries.md": queries_page,
    "reference/vocabulary.md": vocabulary_page,
    "reference/boards.md": boards_page,
}


def on_files(files: Any, config: Any) -> Any:
    """MkDocs calls this with the files of docs/: adds the generated pages, and mermaid where it has been fetched."""
    from mkdocs.structure.files import File

    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page()))
    files.append(File.generated(config, "assets/mermaid.min.js", abs_src_path=str(MERMAID)))
    return files
