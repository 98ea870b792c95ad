"""Updates as the SPARQL 1.1 Protocol means them, where Oxigraph takes them otherwise.

Graphs that the request names (`using-graph-uri`, 2.2.3) are written into the update. A graph that is not there is an
empty one: clearing or dropping it is no error.
"""

import re
from collections.abc import Collection

from tinyfleet.ontology.store.store import OPAQUE, StoreError, term
from tinyfleet.ontology.vocabulary.namespaces import Iri

# What a brace or a keyword may not be looked for in comes first: comments, IRIs, strings, variables, names, tags.
_TOKEN = re.compile(
    OPAQUE + r"|[?$@]\w+"
    r"|(?:\w[\w.-]*)?:(?:[\w.:-]|%[0-9A-Fa-f]{2}|\\.)*"
    r"|(?P<word>[A-Za-z]+)"
    r"|(?P<brace>[{}])",
    re.DOTALL,
)
_EMPTIES = re.compile(r"\b(CLEAR|DROP)\b", re.IGNORECASE)


def prepared(update: str, default: Collection[Iri], named: Collection[Iri]) -> str:
    """The update with USING these graphs in each of its operations that look for something.

    Raises StoreError if one of them names its graphs itself (WITH, USING): that is for one of the two to say.
    """
    clause = " ".join([*(f"USING {term(g)}" for g in default), *(f"USING NAMED {term(g)}" for g in named)])
    if not clause and not _EMPTIES.search(update):
        return update
    out: list[str] = []
    copied, depth, before = 0, 0, ""
    shorthand = -1  # where the pattern of a DELETE WHERE { … } begins: it means DELETE { … } WHERE { … }
    for token in _TOKEN.finditer(update):
        word = (token["word"] or "").upper() if depth == 0 else ""
        insert = ""
        if token["brace"]:
            depth += 1 if token["brace"] == "{" else -1
            if depth == 0:
                before = ""
                if shorthand >= 0:
                    pattern = update[shorthand : token.end()]
                    out += [pattern, " ", clause, " WHERE ", pattern]
                    copied, shorthand = token.end(), -1
        elif word == "GRAPH" and before in ("CLEAR", "DROP"):
            insert = "SILENT "
        elif clause and word in ("USING", "WITH"):
            raise StoreError(f"the update says {word} and the request names graphs too; leave one out")
        elif clause and word == "WHERE" and before == "DELETE":
            out.append(update[copied : token.start()])
            copied = shorthand = token.end()
        elif clause and word == "WHERE":
            insert = f"{clause} "
        if insert:
            out += [update[copied : token.start()], insert]
            copied = token.start()
        before = word or before
    out.append(update[copied:])
    return "".join(out)
