"""JSON from anyone: bounded before anything is built from it, and strict."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
_INTEGER_DIGITS = 20
"""Of the longest integers: all of 64 bits."""


def parse_json(data: bytes, *, max_values: int, max_depth: int) -> Any:
    """Decode UTF-8 JSON text. Its length is the caller's to check.

    Parameters
    ----------
    data
        The text.
    max_values
        Members and elements in it, at most.
    max_depth
        Objects and arrays within each other, at most.

    Returns
    -------
    Any
        Its value.

    Raises
    ------
    ValueError
        If it is not JSON, or too large or too deep; also for a name twice in an object, NaN and infinities, integers of
        more than 64 bits and half surrogate pairs. The text says why in one line, without repeating what was sent.

    Examples
    --------
    >>> parse_json(b'{"a": [1, 2.5]}', max_values=10, max_depth=2)
    {'a': [1, 2.5]}
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > max_values:  # before anything is built; a comma in a text counts, too
        raise ValueError(f"it has more than {max_values} values")
    too_deep = ValueError(f"it nests deeper than {max_depth}")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_integer,
            parse_float=_float,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    except RecursionError:
        raise too_deep from None
    level = [value]
    for _ in range(max_depth + 1):
        level = [inner for node in level for inner in _parts(node)]
        if not level:
            return value
    raise too_deep


def _parts(node: Any) -> list[Any]:
    """What an object or array holds; its names, too. Raises ValueError for a text that cannot be written."""
    if isinstance(node, dict):
        return [*node, *node.values()]
    if isinstance(node, str) and not node.isascii() and _SURROGATE.search(node):
        raise ValueError("it has half of a surrogate pair in a text")
    return node if isinstance(node, list) else []


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object in it has the same name twice")
    return result


def _constant(name: str) -> float:
    raise ValueError(f"it is not JSON: {name} is not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) > _INTEGER_DIGITS:
        raise ValueError(f"an integer in it is too large: {len(digits)} digits")
    return int(digits)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number in it is too large")
    return value
