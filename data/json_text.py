"""JSON as files of documents hold it: an object a line, or an array of objects.

It is read by the `json` module, and more strictly where that would lose data: bytes that are not UTF-8 (`json` accepts
encoded surrogates), and a duplicate key, of which `json` keeps the last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

BOM = b"\xef\xbb\xbf"  # may be at the beginning of a file, and where files were concatenated


def parse(data: bytes, keys: Sequence[str] = ()) -> Any:
    """The JSON value in `data`. `keys`: those whose value is used, and which no object may hold twice.

    Raises ValueError, with the reason, for what is not JSON in UTF-8.
    """
    try:
        text = data.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {data[error.start]:#04x} at offset {error.start} of it") from error
    twice = [key for key in keys if text.count(json.dumps(key, ensure_ascii=False)) > 1]
    try:
        return json.loads(text, object_pairs_hook=_once(twice) if twice else None)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: it is nested too deeply") from error


def elements(data: bytes, keys: Sequence[str] = ()) -> list[Any]:
    """The elements of the array that a whole file holds. Raises ValueError for anything else."""
    found = parse(data, keys)
    if not isinstance(found, list):
        raise ValueError(f"it is {type(found).__name__}, not an array")
    return found


def _once(keys: Sequence[str]) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def make(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key in keys:
            if sum(name == key for name, _ in pairs) > 1:
                raise ValueError(f"an object holds {key!r} twice")
        return dict(pairs)

    return make
